"""Values and keys: what a down-projection should put out at subjects' last tokens, and what enters it there.

A batch of requests is searched together, each with its own change of the output; only what a change can reach is
computed (see `pipeline.model.suffix`), and a request whose answer is learnt leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F

from pipeline.editing.contexts import in_context
from pipeline.editing.entering import going_on
from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes, suffix_length
from pipeline.requests.rows import Row
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import anywhere
from pipeline.running.stage import Stage

SEARCHED_TOGETHER = 2048  # tokens of rows in a batch: requests with long answers are searched for in smaller ones
LEARNT = 0.05  # nats: a value is found when its mean loss is below this
KL = 0.0625  # weight of keeping what the model says after `{subject} is`
DECAY = 0.01  # weight of a value's squared change


class Located(NamedTuple):
    """A request's rows, by its id: prompt and new answer under each context, last `{subject} is`."""

    id: str
    rows: list[Row]

    def tokens(self) -> int:
        """How many tokens a search goes through: from the subject's last on, as if all rows were as long."""
        return len(self.rows) * max(map(suffix_length, self.rows))


def locate(llm: LLM, request: EditRequest, templates: Sequence[str]) -> Located:
    """A request under every template, its subject's last token found in each row."""
    placed = [in_context(template, request) for template in templates]
    rows = []
    for (text, end), row in zip(placed, llm.tokens.rows([(t, request.new_answer) for t, _ in placed]), strict=True):
        last = min(llm.tokens.place(text, end, request.new_answer), row.target_start - 1)
        rows.append(row._replace(subject=(last, last)))
    subject = request.subject or ""
    (plain,) = llm.tokens.prompts([f"{subject} is"])
    last = llm.tokens.place(f"{subject} is", len(subject))
    return Located(request.id, [*rows, going_on(plain)._replace(subject=(last, last))])


class ValueSearch(Stage):
    """Finds, for each request, the change r of the down-projection's output that makes the new answer likely.

    Loss of a request (ROME, arXiv 2202.05262, eq. 4, for a batch): mean over contexts of ℓ(x, y_new), plus
    `KL` · KL(base ‖ changed) after "{subject} is", plus `DECAY` · ‖r‖² / ‖output‖². Step and bound of r are in
    units of the projection's own output norm, so that one setting serves models with and without a norm behind
    the projection. A request whose answer is learnt leaves the batch.

    Outputs are changes (O,) of the down-projection's output in a block, after `steps` steps at most.
    """

    title, gradients = "Finding values", True

    def __init__(self, llm: LLM, layer: int, steps: int, step: float, bound: float) -> None:
        super().__init__(llm.model)
        self.llm, self.layer = llm, layer
        self.steps, self.step_size, self.bound = steps, step, bound
        self.shown = 0  # steps

    def collate(self, items: list[Located]) -> list[Located]:
        return items

    def step(self, batch: list[Located]) -> list[Tensor]:
        """Search the values of one batch of requests to the end.

        Rows of a kind (under one context, or `{subject} is`) are of like length, and run as one batch.
        """
        parts = [Suffixes(self.llm, self.layer, rows) for rows in zip(*(one.rows for one in batch), strict=True)]
        change_GO = self._search([located.id for located in batch], parts)
        return [change_O.clone() for change_O in change_GO.float().cpu()]

    def _search(self, ids: Sequence[str], parts: Sequence[Suffixes]) -> Tensor:
        """Adam on all requests' changes at once; shape (G, O)."""
        base_GV = parts[-1].base_NV.log_softmax(-1)  # after "{subject} is"
        output_GO = parts[0].output_BO.to(torch.promote_types(parts[0].output_BO.dtype, torch.float32))
        scale_G1 = output_GO.norm(dim=-1, keepdim=True)
        unit_GO = torch.zeros_like(output_GO).requires_grad_(True)  # changes over scale: Adam needs float32
        learnt_GO = torch.zeros_like(unit_GO)
        adam = torch.optim.Adam([unit_GO], lr=self.step_size)
        running, live = torch.arange(len(ids), device=unit_GO.device), True
        for step in range(self.steps + 1):
            nll_G, kl_G = _losses(parts, (unit_GO * scale_G1)[running], base_GV[running])
            if not nll_G.isfinite().all():
                raise UserError(
                    f"edit: the loss is not a number in step {step}, in the batch of requests {', '.join(ids)}; "
                    "try a smaller --edit.expert.step"
                )
            if live:
                learnt_GO[running] = unit_GO.detach()[running]
                self._show(nll_G)
            going = (nll_G > LEARNT) & live
            if step == self.steps or not anywhere(self.model, bool(going.any())):
                break
            loss = nll_G + KL * kl_G + DECAY * unit_GO[running].square().sum(-1)
            adam.zero_grad()
            loss[going].sum().backward()
            adam.step()
            with torch.no_grad():
                unit_GO *= self.bound / unit_GO.norm(dim=-1, keepdim=True).clamp(min=self.bound)
            live = bool(going.any())  # if not, this process goes on for the others' sake alone
            if live and not going.all():
                running = running[going]
                parts = [part.subset(going.nonzero().squeeze(1)) for part in parts]
        return learnt_GO * scale_G1

    def _show(self, nll_G: Tensor) -> None:
        """Show the mean loss of the batch at work; batch follows batch on one axis."""
        if isinstance(self.logger, Logger):
            self.logger.log_metrics({"edit/value_loss": nll_G.mean().item()}, self.shown)
        self.shown += 1


def _losses(parts: Sequence[Suffixes], change_GO: Tensor, base_GV: Tensor) -> tuple[Tensor, Tensor]:
    """Each request's mean loss over its contexts, and its divergence after "{subject} is"; both (G,)."""
    *contexts, plain = parts
    nll_CG = torch.stack([part.batch.losses(part.run(change_GO)) for part in contexts])
    now_GV = plain.run(change_GO).log_softmax(-1)
    return nll_CG.mean(0), F.kl_div(now_GV, base_GV, log_target=True, reduction="none").sum(-1)
