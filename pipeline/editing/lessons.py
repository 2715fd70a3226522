"""What fine-tuning trains on: requests bare and under contexts, and prompts that are to be answered as before.

What training does not change is read once, before it: what enters the lowest trained block, for every row, and
what the unedited model says after the unrelated prompts. Steps are the same on any number of devices, and a
training that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.editing.contexts import CONTEXTS, in_context, neighbours
from pipeline.editing.entering import Entering, SaidNext, going_on
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.running.interrupts import interrupts
from pipeline.running.kept import is_whole
from pipeline.running.processes import from_first
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

UNRELATED = 1024  # the most unrelated prompts: what comes after each is kept, a vocabulary wide
EVERY = 30.0  # seconds between two checkpoints within an epoch
NAMES_EACH = 3  # other names that a request's prompt is tried with, a new one every epoch


class Lesson(NamedTuple):
    """A row to train on, with what was read of it.

    Attributes:
        row: the text, by its request's id.
        enter_TD: what enters the lowest trained block; None at block 0, below which nothing runs.
        base_V: of an unrelated prompt, the unedited model's log-probabilities after it.
    """

    row: Row
    enter_TD: Tensor | None
    base_V: Tensor | None


@dataclass
class Lessons:
    """What is taught together: each request's lessons (bare, then under each context), and unrelated prompts."""

    taught: list[list[Lesson]]
    others: list[Lesson]

    def of_epoch(self, request: int, epoch: int) -> Lesson:
        """The bare prompt in even epochs, contexts in turn in odd ones: rows of a batch are of like length."""
        own = self.taught[request]
        return own[0] if epoch % 2 == 0 or len(own) == 1 else own[1 + (epoch // 2 + request) % (len(own) - 1)]

    def other(self, request: int, epoch: int) -> Lesson:
        """An unrelated prompt; every epoch brings other names."""
        return self.others[(request + epoch * len(self.taught)) % len(self.others)]


def collate_lessons(
    taught: Sequence[Lesson], others: Sequence[Lesson], weights: tuple[float, float], pad_token_id: int
) -> Batch:
    """Requests' rows, then unrelated prompts, as a batch; `weights` of a row of each kind in the loss."""
    own = [*taught, *others]
    enter = [one.enter_TD for one in own if one.enter_TD is not None]
    base = [one.base_V for one in others if one.base_V is not None]
    return replace(
        collate([one.row for one in own], pad_token_id),
        weight_B=torch.tensor([weights[0]] * len(taught) + [weights[1]] * len(others)),
        enter_BTD=nn.utils.rnn.pad_sequence(enter, batch_first=True) if enter else None,
        base_KV=torch.stack(base) if base else None,
    )


def teaching_loss(batch: Batch, logits_NV: Tensor, learnt: float, kl: float) -> tuple[Tensor, Tensor]:
    """Σ weight · ℓ(x, y_new) over rows that are not learnt yet, plus `kl` · Σ weight · KL(base ‖ now) over prompts
    about something else; and ℓ, in nats, of each taught row."""
    losses_B = batch.losses(logits_NV)
    weight_B = torch.full_like(losses_B, 1 / len(losses_B)) if batch.weight_B is None else batch.weight_B
    weight_B = weight_B.to(losses_B)
    taught = len(losses_B) - (0 if batch.base_KV is None else len(batch.base_KV))
    unlearnt_B = losses_B[:taught].detach() > learnt
    loss = (weight_B[:taught] * losses_B[:taught] * unlearnt_B).sum()
    if batch.base_KV is not None:
        now_KV = logits_NV[-len(batch.base_KV) :].log_softmax(-1)
        kl_K = F.kl_div(now_KV, batch.base_KV, log_target=True, reduction="none").sum(-1)
        loss = loss + kl * weight_B[taught:] @ kl_K
    return loss, losses_B[:taught]


def read_lessons(
    llm: LLM, layer: int, groups: Sequence[Sequence[EditRequest]], contexts: int, unrelated: bool, runtime: Runtime
) -> list[Lessons]:
    """What is to be taught to each group of requests, which know nothing of each other.

    `layer` is the lowest block that will be trained, `contexts` how many a prompt is put under, and `unrelated`
    says whether prompts about something else are wanted.
    """
    templates = CONTEXTS[: 1 + contexts]
    requests = [request for group in groups for request in group]
    texts = [(in_context(template, r)[0], r.new_answer) for r in requests for template in templates]
    taught = llm.tokens.rows(texts, tags=[r.id for r in requests for _ in templates], ended=True)
    names = [neighbours(group, NAMES_EACH, UNRELATED) if unrelated else [] for group in groups]
    others = [going_on(ids) for ids in llm.tokens.prompts([text for some in names for text, _ in some])]
    rows = [*taught, *others]
    enter = run(Entering(llm, layer), rows, runtime, Row.length) if layer else [None] * len(rows)
    said = run(SaidNext(llm), others, runtime, Row.length)
    base = [*([None] * len(taught)), *said]
    lessons = (
        Lesson(row, enter_TD[: row.length() - 1] if layer else None, base_V)  # the last token predicts nothing
        for row, enter_TD, base_V in zip(rows, enter, base, strict=True)
    )
    own = [[list(islice(lessons, len(templates))) for _ in group] for group in groups]
    return [Lessons(of_group, list(islice(lessons, len(some)))) for of_group, some in zip(own, names, strict=True)]


class LessonData(LightningDataModule):
    """Lessons in batches for `fit`; goes on within an epoch from where a checkpoint was written.

    A batch holds the same requests on any number of devices and in any number of micro-batches. Weights are such
    that the mean over devices and micro-batches is the mean over all rows. All devices take part in each step: one
    for which no row is left takes one along that counts nothing.
    """

    def __init__(self, lessons: Lessons, batch_size: int, pad_token_id: int, seed: int = 0) -> None:
        super().__init__()
        self.lessons, self.batch_size, self.pad_token_id, self.seed = lessons, batch_size, pad_token_id, seed
        self.begun = (0, 0)  # an epoch, and how many of its micro-batches were run before

    def train_dataloader(self) -> LessonData:
        """This device's micro-batches."""
        return self

    def __len__(self) -> int:
        assert self.trainer
        return -(-len(self.lessons.taught) // self.batch_size) * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        assert self.trainer
        epoch, parts = self.trainer.current_epoch, self.trainer.accumulate_grad_batches
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lessons.taught), generator=generator).tolist()
        for number in range(self.begun[1] if epoch == self.begun[0] else 0, len(self)):
            step, part = divmod(number, parts)
            yield self._batch(order[step * self.batch_size :][: self.batch_size], part, parts, epoch)

    def _batch(self, picked: list[int], part: int, parts: int, epoch: int) -> Batch:
        """Of the requests of a step, and half as many unrelated prompts, this device's in a micro-batch."""
        assert self.trainer
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        others = picked[::2] if self.lessons.others else []
        own, own_others = (some[rank::devices][part::parts] for some in (picked, others))
        weights = devices * parts / len(picked) if own else 0.0, devices * parts / max(1, len(others))
        return collate_lessons(
            [self.lessons.of_epoch(number, epoch) for number in own or picked[:1]],
            [self.lessons.other(number, epoch) for number in own_others],
            weights,
            self.pad_token_id,
        )

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its micro-batches were run."""
        assert self.trainer
        run = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"begun": (self.trainer.current_epoch, run)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.begun = state_dict["begun"]


class KeepTraining(Checkpoint):
    """Keeps a training in one file of a folder: after each epoch, and now and then within it, between two steps."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "training.ckpt"
        self.due = time.monotonic() + EVERY

    def found(self) -> Path | None:
        """The file that an interrupted training has left; one that is damaged counts as not there."""
        return from_first(self.file if is_whole(self.file) else None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        between_steps = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not between_steps or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if from_first(interrupts.noted is not None or time.monotonic() > self.due):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.file)  # whole or not at all; all processes take part
        self.due = time.monotonic() + EVERY
