"""The stage that reads: rows are scored, questions are answered, batch after batch, under one Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.evaluation.answering import Question, QuestionBatch, answer, collate_questions
from pipeline.evaluation.divergence import compared_places, divergences, head_reads_also
from pipeline.evaluation.readings import Item, Readings
from pipeline.evaluation.rows import Row, RowBatch, collate_rows
from pipeline.model import LLM
from pipeline.model.targets import head_reads_only


def collate(batches: Sequence[list[Row] | list[Question]], pad_token_id: int) -> RowBatch | QuestionBatch:
    """The one batch, formed beforehand, that a loader's item is."""
    (items,) = batches
    rows = [item for item in items if isinstance(item, Row)]
    if rows:
        return collate_rows(rows, pad_token_id)
    return collate_questions([item for item in items if isinstance(item, Question)], pad_token_id)


class Reader(LightningModule):
    """Reads every batch with the model as it is now.

    Args:
        llm: the model.
        offsets: of each text whose next-token distributions are compared: at which of its scored tokens.
        base: what the base model said; None: it is the base that is read.
    """

    def __init__(self, llm: LLM, offsets: dict[int, range], base: Readings | None) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.offsets = offsets
        self.base = base

    def predict_step(self, batch: RowBatch | QuestionBatch) -> list[Item]:
        """A batch's readings, as items."""
        if isinstance(batch, QuestionBatch):
            said = answer(self.llm, batch)
            return [("said", number, text) for number, text in zip(batch.numbers, said, strict=True)]
        return self._score(batch)

    def _score(self, batch: RowBatch) -> list[Item]:
        places = compared_places(batch, self.offsets)
        taken = [place for each in places.values() for place in each]
        before = self.base.hidden if self.base else {}
        hidden_MD = torch.cat([before[number] for number in places]).to(self.device) if before and taken else None
        with (
            head_reads_only(self.model, batch.row_N, batch.position_N),
            head_reads_also(self.model, hidden_MD) as sight,
        ):
            logits_NV = self.model(input_ids=batch.input_ids_BT, use_cache=False).logits.squeeze(0)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        scored = len(batch.target_N)
        items = self._answers(batch, logits_NV[:scored])
        sizes = [len(each) for each in places.values()]
        if hidden_MD is not None:
            moved = divergences(logits_NV[scored:], logits_NV[taken]).cpu().split(sizes)
            items += [("divergences", n, each.mean().item()) for n, each in zip(places, moved, strict=True)]
        elif self.base is None and taken:
            kept = sight.hidden_ND[taken].float().cpu().split(sizes)
            items += [("hidden", n, each.clone()) for n, each in zip(places, kept, strict=True)]
        return items

    def _answers(self, batch: RowBatch, logits_NV: Tensor) -> list[Item]:
        """First choices and mean losses."""
        losses_N = F.cross_entropy(logits_NV, batch.target_N, reduction="none").cpu().double()
        span_N = batch.span_N.cpu()
        counts = torch.bincount(span_N)
        losses_S = losses_N.new_zeros(len(counts)).index_add(0, span_N, losses_N) / counts
        if not losses_S.isfinite().all():
            raise UserError("evaluation: the model's loss is not a number: its weights are broken")
        choices = logits_NV.argmax(-1).cpu().split(counts.tolist())
        return [("choices", n, chosen.tolist()) for n, chosen in zip(batch.numbers, choices, strict=True)] + [
            ("losses", n, loss) for n, loss in zip(batch.numbers, losses_S.tolist(), strict=True)
        ]
