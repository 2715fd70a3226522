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
from pipeline.errors import UserError
from pipeline.model.activations import Activations
from pipeline.model.blocks import by_row
from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes, SuffixRunner, suffix_length
from pipeline.requests.rows import Batch, Row, collate, means_by
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
    return Located(request.id, [*rows, Row(plain, len(plain), (last, last))])


class ValueSearch(Stage):
    """Finds, for each request, the change r of the down-projection's output that makes the new answer likely.

    Loss of a request (ROME, arXiv 2202.05262, eq. 4, for a batch): mean over contexts of ℓ(x, y_new), plus
    `KL` · KL(base ‖ changed) after "{subject} is", plus `DECAY` · ‖r‖² / ‖output‖². Step and bound of r are in
    units of the projection's own output norm, so that one setting serves models with and without a norm behind
    the projection. A request whose answer is learnt leaves the batch.

    Args:
        llm: the model, frozen by the caller.
        layer: the block whose down-projection's output changes.
        steps: the most optimiser steps.
        step: Adam's step size.
        bound: the largest change.
        climbs: whether values of the same requests will be searched for at ever higher blocks: what the blocks
            below put out is kept then.

    Outputs are changes (O,), on the CPU.
    """

    title, gradients = "Finding values", True

    def __init__(self, llm: LLM, layer: int, steps: int, step: float, bound: float, climbs: bool = False) -> None:
        super().__init__(llm.model)
        self.runner = SuffixRunner(llm, layer)
        self.steps, self.step_size, self.bound, self.climbs = steps, step, bound, climbs
        self.shown = 0  # steps
        self.captured: dict[tuple[str, ...], tuple[list[Suffixes], Tensor]] = {}  # by batch, and what comes after

    def climb(self, layer: int) -> None:
        """Search at another block from now on, no lower than the one before."""
        self.runner = SuffixRunner(self.runner.llm, layer)

    def collate(self, items: list[Located]) -> list[Located]:
        return items

    def step(self, batch: list[Located]) -> list[Tensor]:
        """Search the values of one batch of requests to the end.

        Rows of a kind (under one context, or `{subject} is`) are of like length, and run as one batch.
        """
        parts, base_GV = self._capture(batch)
        change_GO = self._search([located.id for located in batch], parts, base_GV)
        return [change_O.clone() for change_O in change_GO.float().cpu()]

    def _capture(self, batch: list[Located]) -> tuple[list[Suffixes], Tensor]:
        """The batch's rows, kind by kind, and the base's log-probabilities after "{subject} is"."""
        place = tuple(located.id for located in batch)
        if place in self.captured:
            parts, base_GV = self.captured[place]
            parts = [self.runner.climbed(part) for part in parts]
        else:
            kinds = zip(*(located.rows for located in batch), strict=True)
            found, logits = zip(*(self.runner.capture(rows) for rows in kinds), strict=True)
            parts, base_GV = list(found), logits[-1].log_softmax(-1)
        if self.climbs:
            self.captured[place] = parts, base_GV
        return parts, base_GV

    def _search(self, ids: Sequence[str], parts: Sequence[Suffixes], base_GV: Tensor) -> Tensor:
        """Adam on all requests' changes at once; shape (G, O)."""
        assert parts[0].output_BO is not None
        scale_G1 = parts[0].output_BO.norm(dim=-1, keepdim=True)
        unit_GO = torch.zeros_like(parts[0].output_BO).requires_grad_(True)  # changes over scale
        learnt_GO = torch.zeros_like(unit_GO)
        adam = torch.optim.Adam([unit_GO], lr=self.step_size)
        running, live = torch.arange(len(ids), device=unit_GO.device), True
        for step in range(self.steps + 1):
            nll_G, kl_G = self._losses(parts, (unit_GO * scale_G1)[running], base_GV[running])
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

    def _losses(self, parts: Sequence[Suffixes], change_GO: Tensor, base_GV: Tensor) -> tuple[Tensor, Tensor]:
        """Each request's mean loss over its contexts, and its divergence after "{subject} is"; both (G,)."""
        *contexts, plain = parts
        losses = []
        for part in contexts:
            losses_N = F.cross_entropy(self.runner.run(part, change_GO), part.target_N, reduction="none")
            losses.append(means_by(losses_N, part.row_N, len(change_GO)))
        now_GV = self.runner.run(plain, change_GO).log_softmax(-1)
        return torch.stack(losses).mean(0), F.kl_div(now_GV, base_GV, log_target=True, reduction="none").sum(-1)

    def _show(self, nll_G: Tensor) -> None:
        """Show the mean loss of the batch at work; batch follows batch on one axis."""
        if isinstance(self.logger, Logger):
            self.logger.log_metrics({"edit/value_loss": nll_G.mean().item()}, self.shown)
        self.shown += 1


class KeyReading(Stage):
    """Reads keys, what enters a block's down-projection, by running the blocks up to that one.

    Rows come with their number as a tag, and with the places from the first to the last of those that are read as
    their subject. Outputs are keys (places, I), float32, on the CPU.

    Args:
        llm: the model.
        layer: the block.
        climbs: whether the same rows will be read at ever higher blocks: what enters a block is kept then, and the
            blocks below it run once.
    """

    title = "Reading keys"

    def __init__(self, llm: LLM, layer: int, climbs: bool = False) -> None:
        super().__init__(llm.model)
        self.activations, self.layer, self.climbs = Activations(llm), layer, climbs
        self.entered: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # by batch: a block, and what enters it

    def collate(self, items: list[Row]) -> Batch:
        return collate(items, self.activations.llm.pad_token_id)

    def step(self, batch: Batch) -> list[Tensor]:
        llm, numbers = self.activations.llm, tuple(row.tag for row in batch.texts)
        (down,), block = llm.blocks[self.layer].down, llm.blocks[self.layer].name
        with (
            self.activations.from_block(*self.entered.get(numbers, (0, None))),
            self.activations.up_to_block(self.layer + 1),
            self.activations.entering(block, down) as seen,
        ):
            self.activations.run(batch.input_ids_BT)
        if self.climbs:
            self.entered[numbers] = self.layer, seen[block]
        keys = []
        for row, key_TI in zip(batch.texts, by_row(seen[down], len(batch.texts)), strict=True):
            first, last = row.subject or (0, len(row.token_ids) - 1)
            keys.append(key_TI[first : last + 1].float().cpu().clone())
        return keys
