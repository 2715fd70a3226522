"""What fine-tuning trains on: requests bare and under contexts, and prompts that are to be answered as before.

What training does not change is read once, before it: what enters the lowest trained block, for every row, and
what the unedited model says after the unrelated prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.editing.contexts import CONTEXTS, in_context, neighbours
from pipeline.model import LLM, TargetBatch, TargetRow, build_trainer, collate_targets, encode, target_logits
from pipeline.model.targets import prompt_tokens
from pipeline.model.trainer import predict
from pipeline.model.upper import handing_on, passing_through, reading_enter
from pipeline.options import TrainerOptions, TrainingOptions
from pipeline.requests import EditRequest, ListDataModule

UNRELATED = 1024  # the most unrelated prompts: what comes after each is kept, a vocabulary wide
NAMES_EACH = 3  # other names that a request's prompt is tried with, a new one every epoch
READ_TOGETHER = 16  # rows

Read = tuple[Tensor | None, Tensor | None]  # of a row, what enters the block (T, D), and what comes next (V)


@dataclass(frozen=True)
class Row:
    """A text to train on, with what was read of it.

    Attributes:
        target: its tokens, those that are scored, and the request's id (None: counts nothing).
        enter_TD: what enters the lowest trained block; None at block 0, below which nothing runs.
        base_V: of an unrelated prompt, the unedited model's log-probabilities after it.
    """

    target: TargetRow
    enter_TD: Tensor | None
    base_V: Tensor | None


@dataclass  # Lightning moves it to the device by setting its fields
class Lesson:
    """One device's part of a batch: `batch` holds requests' rows first, then unrelated prompts.

    Attributes:
        rows, others: how many of each the batch holds over all devices.
        enter_BTD, base_KV: what was read of them, as in `Row`.
    """

    batch: TargetBatch
    rows: int
    others: int
    enter_BTD: Tensor | None
    base_KV: Tensor | None

    def handed_on(self, llm: LLM, layer: int) -> AbstractContextManager[None]:
        """Inside the `with`, blocks below `layer` do not run where what they put out was read."""
        return nullcontext() if self.enter_BTD is None else handing_on(llm, layer, self.enter_BTD)

    def divergence(self, logits_NV: Tensor) -> Tensor:
        """Σ KL(base ‖ now), in nats, over what comes after the unrelated prompts; there must be some."""
        assert self.base_KV is not None
        now_KV = logits_NV[-len(self.base_KV) :].log_softmax(-1)
        return F.kl_div(now_KV, self.base_KV, log_target=True, reduction="sum")


def read_rows(
    llm: LLM,
    layer: int,
    lessons: Sequence[Sequence[EditRequest]],
    options: TrainingOptions,
    trainer: TrainerOptions,
) -> list[tuple[list[list[Row]], list[Row]]]:
    """Of each lesson, every request's rows (bare, then under each context) and the unrelated prompts, if any.

    Args:
        llm: the model as it is before training.
        layer: the lowest block that will be trained.
        lessons: requests that are taught together; one list, or several that know nothing of each other.
        options: `contexts` and `kl` say what is wanted.
        trainer: what it runs on.
    """
    templates = CONTEXTS[: 1 + options.contexts]
    requests = [request for lesson in lessons for request in lesson]
    texts = [(in_context(template, r)[0], r.new_answer) for r in requests for template in templates]
    taught = encode(llm, texts, tags=[r.id for r in requests for _ in templates])
    prompts = [
        [text for text, _ in neighbours(lesson, NAMES_EACH, UNRELATED)] if options.kl else [] for lesson in lessons
    ]
    flat = [prompt for each in prompts for prompt in each]
    others = [TargetRow([*ids, ids[-1]], len(ids)) for ids in prompt_tokens(llm, flat)]
    read = _read(llm, layer if options.reuse else 0, taught, others, trainer)
    rows = iter([Row(row, *read.get(number, (None, None))) for number, row in enumerate([*taught, *others])])
    own = [[list(islice(rows, len(templates))) for _ in lesson] for lesson in lessons]
    return [(mine, list(islice(rows, len(each)))) for mine, each in zip(own, prompts, strict=True)]


def collate(taught: Sequence[Row], others: Sequence[Row], rows: int, all_others: int, pad: int) -> Lesson:
    """One device's rows as a batch; `rows` and `all_others` count those of all devices."""
    own = [*taught, *others]
    batch = collate_targets([row.target for row in own], pad)
    enter = [row.enter_TD for row in own if row.enter_TD is not None]
    base = [row.base_V for row in others if row.base_V is not None]
    return Lesson(
        batch=batch,
        rows=rows,
        others=all_others,
        enter_BTD=nn.utils.rnn.pad_sequence(enter, batch_first=True) if enter else None,
        base_KV=torch.stack(base) if base else None,
    )


def _read(
    llm: LLM, layer: int, taught: Sequence[TargetRow], others: Sequence[TargetRow], trainer: TrainerOptions
) -> dict[int, Read]:
    """Readings by a row's number, requests' rows first; nothing is read that block 0 would not save."""
    numbered = [replace(row, tag=number) for number, row in enumerate([*taught, *others])]
    pad = partial(collate_targets, pad_token_id=llm.pad_token_id)
    streams = [
        (sorted(rows, key=lambda row: len(row.token_ids)), pad, READ_TOGETHER)
        for rows in (numbered[: len(taught)] if layer else [], numbered[len(taught) :])
        if rows
    ]
    if not streams:
        return {}
    module = Reading(llm, layer, first_other=len(taught))
    found: list[tuple[int, Read]] = predict(build_trainer(trainer, "Reading"), module, ListDataModule(*streams))
    return dict(found)


class Reading(LightningModule):
    """Runs rows through the model as it is: requests' up to a block, unrelated prompts to the end."""

    def __init__(self, llm: LLM, layer: int, first_other: int) -> None:
        super().__init__()
        self.llm = llm
        self.model = llm.model
        self.layer = layer
        self.first_other = first_other

    @torch.no_grad()
    def predict_step(self, batch: TargetBatch) -> list[tuple[int, Read]]:
        base: list[Tensor] | list[None] = [None] * len(batch.tags)
        with reading_enter(self.llm, self.layer) as entering:
            if batch.tags[0] >= self.first_other:
                base = list(target_logits(self.model, batch).log_softmax(-1).cpu())
            else:
                with passing_through(self.llm, self.layer):
                    self.model(input_ids=batch.input_ids_BT, use_cache=False, logits_to_keep=1)
        enter: list[Tensor] | list[None] = [None] * len(batch.tags)
        if self.layer:
            ends = [int(batch.position_N[batch.row_N == row].max()) + 2 for row in range(len(batch.tags))]
            enter = [enter_TD[:end].cpu().clone() for enter_TD, end in zip(entering[0], ends, strict=True)]
        return list(zip(batch.tags, zip(enter, base, strict=True), strict=True))
