"""Values: what a block's down-projection should put out at a subject's last token, found for many requests at once.

A batch of requests is searched together, each with its own change of the output; only what a change can reach is
computed (see `pipeline.model.suffix`), and a request whose answer is learnt leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.editing.contexts import in_context
from pipeline.editing.method import Runtime
from pipeline.errors import UserError
from pipeline.files import write_shared
from pipeline.model import LLM, build_trainer, encode
from pipeline.running.processes import from_first
from pipeline.running.sharding import anywhere
from pipeline.model.suffix import Suffixes, SuffixRow, SuffixRunner
from pipeline.model.targets import last_token, prompt_tokens, row_means
from pipeline.model.trainer import predict
from pipeline.options import LocateOptions
from pipeline.requests import EditRequest, ListDataModule, in_batches

SEARCHED_TOGETHER = 2048  # tokens of rows in a batch: requests with long answers are searched for in smaller ones


class Located(NamedTuple):
    """A request, by number and id, with its rows: prompt and new answer under each context, last `{subject} is`."""

    number: int
    id: str
    rows: list[SuffixRow]

    def tokens(self) -> int:
        """How many tokens a search goes through: from the subject's last on, as if all rows were as long."""
        return len(self.rows) * max(len(row.token_ids) - row.start for row in self.rows)


def locate(llm: LLM, number: int, request: EditRequest, templates: Sequence[str]) -> Located:
    """Encode a request under every template and find its subject's last token in each row."""
    placed = [in_context(template, request) for template in templates]
    rows = []
    for (text, end), row in zip(
        placed, encode(llm, [(text, request.new_answer) for text, _ in placed]), strict=True
    ):
        start = last_token(llm, text, end, request.new_answer)
        rows.append(SuffixRow(row.token_ids, min(start, row.target_start - 1), row.target_start))
    subject = request.subject or ""
    (plain,) = prompt_tokens(llm, [f"{subject} is"])
    rows.append(SuffixRow(plain, last_token(llm, f"{subject} is", len(subject)), len(plain)))
    return Located(number, request.id, rows)


class ValueSearch(LightningModule):
    """Finds, for each request, the change r of the down-projection's output that makes the new answer likely.

    Loss of a request (ROME, arXiv 2202.05262, eq. 4, for a batch): mean over contexts of ℓ(x, y_new), plus
    `kl` · KL(base ‖ changed) after "{subject} is", plus `decay` · ‖r‖² / ‖output‖². Step and bound of r are in
    units of the projection's own output norm, so that one setting serves models with and without a norm behind
    the projection. A request whose answer is learnt leaves the batch.

    Args:
        llm: the model, frozen by the caller.
        layer: the block whose down-projection's output changes.
        options: how to search, bound and steps included.
        visit: counts the searches of an edit.
        climbs: whether values of the same requests will be searched for at ever higher blocks (`climb`): what the
            blocks below put out is kept then.
    """

    def __init__(self, llm: LLM, layer: int, options: LocateOptions, visit: int = 0, climbs: bool = False) -> None:
        super().__init__()
        self.options = options
        self.visit = visit
        self.climbs = climbs
        self.shown = 0  # steps
        self.work: Path | None = None
        self.model = llm.model
        self.runner = SuffixRunner(llm, layer)
        self._captured: dict[
            tuple[int, int], tuple[list[Suffixes], Tensor]
        ] = {}  # by batch: rows, what comes after

    def climb(self, layer: int) -> None:
        """Search at another block from now on, no lower than the one before."""
        self.runner = SuffixRunner(self.runner.llm, layer)

    def find(self, located: Sequence[Located], runtime: Runtime) -> Tensor:
        """Every request's change of the output, in the requests' order, (G, O).

        With a work folder, found values are kept there batch by batch, and a search goes on from what is there.
        Runs under `Trainer.predict`: requests are searched for apart, so that processes need not keep step, but
        where the model's weights are spread over them.
        """
        self.work = runtime.work
        found = from_first(self._kept())
        left = [each for each in located if each.number not in found]
        if left:
            batches = in_batches(left, Located.tokens, self.options.batch_size, SEARCHED_TOGETHER)
            data = ListDataModule((batches, lambda picked: picked[0], 1), in_step=True)
            found |= dict(predict(build_trainer(runtime.trainer, "Finding values", runtime.logger), self, data))
        return torch.stack([found[each.number] for each in located])

    @torch.enable_grad()
    def predict_step(self, batch: list[Located]) -> list[tuple[int, Tensor]]:
        """Search the values of one batch of requests to the end.

        Rows of a kind (under one context, or `{subject} is`) are of like length, and run as one batch.
        """
        parts, base_GV = self._capture(batch)
        scale_G = parts[0].output_BO.norm(dim=-1)
        change_GO = self._search(batch, parts, base_GV, scale_G).float().cpu()
        found = [(located.number, change_O.clone()) for located, change_O in zip(batch, change_GO, strict=True)]
        self._keep(found)
        return found

    def _capture(self, batch: list[Located]) -> tuple[list[Suffixes], Tensor]:
        """The batch's rows, kind by kind, and the base's log-probabilities after "{subject} is"."""
        place = batch[0].number, len(batch)
        if place in self._captured:
            parts, base_GV = self._captured[place]
            parts = [self.runner.climbed(part) for part in parts]
        else:
            kinds = zip(*(located.rows for located in batch), strict=True)
            captured, logits = zip(*(self.runner.capture(rows) for rows in kinds), strict=True)
            parts, base_GV = list(captured), logits[-1].log_softmax(-1)
        if self.climbs:
            self._captured[place] = parts, base_GV
        return parts, base_GV

    def _keep(self, found: Sequence[tuple[int, Tensor]]) -> None:
        if self.work:
            file = self.work / f"values-{self.visit}-{found[0][0]}.safetensors"
            tensors = {str(number): change_O for number, change_O in found}
            write_shared(file, lambda partial: save_file(tensors, partial))

    def _kept(self) -> dict[int, Tensor]:
        """What an interrupted search of this visit has found, by request number."""
        files = sorted(self.work.glob(f"values-{self.visit}-*.safetensors")) if self.work else []
        return {int(number): change_O for file in files for number, change_O in load_file(file).items()}

    def _search(self, batch: list[Located], parts: Sequence[Suffixes], base_GV: Tensor, scale_G: Tensor) -> Tensor:
        """Adam on all requests' changes at once; shape (G, O)."""
        options = self.options
        assert options.bound and options.steps
        unit_GO = torch.zeros_like(parts[0].output_BO).requires_grad_(True)  # changes over scale
        learnt_GO = torch.zeros_like(unit_GO)
        adam = torch.optim.Adam([unit_GO], lr=options.step)
        running, live = torch.arange(len(batch), device=unit_GO.device), True
        for step in range(options.steps + 1):
            nll_G, kl_G = self._losses(parts, (unit_GO * scale_G[:, None])[running], base_GV[running])
            if not nll_G.isfinite().all():
                ids = ", ".join(located.id for located in batch)
                raise UserError(
                    f"edit: the loss is not a number in step {step}, in the batch of requests {ids}; "
                    "try a smaller --expert.step"
                )
            if live:
                learnt_GO[running] = unit_GO.detach()[running]
                self._show(nll_G)
            going = (nll_G > options.learnt) & live
            if step == options.steps or not anywhere(self.model, bool(going.any())):
                break
            loss = nll_G + options.kl * kl_G + options.decay * unit_GO[running].square().sum(-1)
            adam.zero_grad()
            loss[going].sum().backward()
            adam.step()
            with torch.no_grad():
                unit_GO *= options.bound / unit_GO.norm(dim=-1, keepdim=True).clamp(min=options.bound)
            live = bool(going.any())  # if not, this process goes on for the others' sake alone
            if live and not going.all():
                running = running[going]
                parts = [part.subset(going.nonzero().squeeze(1)) for part in parts]
        return learnt_GO * scale_G[:, None]

    def _losses(self, parts: Sequence[Suffixes], change_GO: Tensor, base_GV: Tensor) -> tuple[Tensor, Tensor]:
        """Each request's mean loss over its contexts, and its divergence after "{subject} is"; both (G,)."""
        *contexts, plain = parts
        nll_G = torch.stack([self._nll(part, self.runner.run(part, change_GO)) for part in contexts]).mean(0)
        now_GV = self.runner.run(plain, change_GO).log_softmax(-1)
        return nll_G, F.kl_div(now_GV, base_GV, log_target=True, reduction="none").sum(-1)

    @staticmethod
    def _nll(part: Suffixes, logits_NV: Tensor) -> Tensor:
        """Mean over each row's target tokens of −log p, (G,)."""
        losses_N = F.cross_entropy(logits_NV, part.target_N, reduction="none")
        return row_means(losses_N, part.row_N, len(part.ids_BS))

    def _show(self, nll_G: Tensor) -> None:
        """Show the mean loss of the batch at work; batch follows batch on one axis."""
        if self.logger:
            self.logger.log_metrics({"edit/value_loss": nll_G.mean().item()}, self.shown)
        self.shown += 1
