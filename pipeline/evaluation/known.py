"""What a model knows of requests before any edit: old answers that it gives, new answers that it gives already.

An answer is given when the model's greedy continuation of the bare prompt begins with it, token by token. That is
so exactly when each of its tokens is the model's first choice after the ones before it, so one forward pass tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning.pytorch import LightningModule

from pipeline.errors import UserError
from pipeline.model import LLM, TargetBatch, TargetRow, build_trainer, collate_targets, encode, target_logits
from pipeline.model.trainer import check_shares, predict
from pipeline.options import TrainerOptions
from pipeline.requests import EditRequest, ListDataModule


@dataclass
class Known:
    """Ids of requests by what the model gives.

    Attributes:
        asked: requests with an old answer.
        old: those of them whose old answer the model gives.
        new: requests whose new answer the model gives already.
        unusable: what is wrong with requests that the model cannot take: an answer of no token, a text too long.
    """

    asked: int = 0
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def find_known(
    llm: LLM, requests: Sequence[EditRequest], batch_size: int = 16, trainer: TrainerOptions | None = None
) -> Known:
    """Which old and new answers a model gives, as it is.

    Args:
        llm: the model.
        requests: whose answers are looked for; those that the model cannot take are named, not raised.
        batch_size: answers in a batch.
        trainer: what it runs on.
    """
    known = Known()
    rows: list[TargetRow] = []
    for request in requests:
        answers = [("new", request.new_answer)]
        answers += [("old", request.old_answer)] if request.old_answer else []
        try:
            rows += encode(
                llm,
                [(request.prompt, answer) for _, answer in answers],
                [(kind, request.id) for kind, _ in answers],
                what=f"request {request.id}",
            )
        except UserError as error:
            known.unusable.append(str(error))
            continue
        known.asked += bool(request.old_answer)
    if rows:
        for kind, id in _given(llm, rows, batch_size, trainer or TrainerOptions()):
            getattr(known, kind).append(id)
    return known


def _given(llm: LLM, rows: list[TargetRow], batch_size: int, trainer: TrainerOptions) -> list[tuple[str, str]]:
    """Tags of the rows whose answers the model gives."""
    rows.sort(key=lambda row: len(row.token_ids))
    runner = build_trainer(trainer, "What the model knows")
    check_shares(runner, len(rows))
    data = ListDataModule((rows, partial(collate_targets, pad_token_id=llm.pad_token_id), batch_size))
    with llm.frozen():
        return predict(runner, KnownModule(llm), data)


class KnownModule(LightningModule):
    """Wraps an LLM; each predict step returns the tags of the answers that it gives."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.model = llm.model

    def predict_step(self, batch: TargetBatch) -> list[tuple[str, str]]:
        right_N = target_logits(self.model, batch).argmax(-1) == batch.target_N
        whole_B = batch.row_means(right_N.double()) == 1
        return [tag for tag, whole in zip(batch.tags, whole_B.tolist(), strict=True) if whole]
