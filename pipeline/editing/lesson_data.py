"""How lessons are trained: the same steps on any number of devices, and a checkpoint from which they go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pipeline.editing.lessons import Lessons, collate_lessons
from pipeline.requests.rows import Batch
from pipeline.running.interrupts import interrupts
from pipeline.running.kept import is_whole
from pipeline.running.processes import from_first

EVERY = 30.0  # seconds


class LessonData(LightningDataModule):
    """Lessons in batches for `fit`; goes on within an epoch from where a checkpoint was written.

    A batch holds the same requests on any number of devices and in any number of micro-batches. Weights are such
    that the mean over devices and micro-batches is the mean over all rows. All devices take part in each step: one
    for which no row is left takes one along that counts nothing.

    Args:
        lessons: what is taught.
        batch_size: requests in an optimiser's step, over all devices.
        pad_token_id: fills rows.
        seed: of the order.
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
    """Keeps a training in one file: at the end of each epoch, and now and then within it, between two steps.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "training.ckpt"
        self.due = time.monotonic() + EVERY

    def found(self) -> Path | None:
        """The file that an interrupted training has left; one that is damaged counts as not there."""
        return from_first(self.file if is_whole(self.file) else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not between_steps or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if from_first(interrupts.noted is not None or time.monotonic() > self.due):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.file)  # whole or not at all; all processes take part
        self.due = time.monotonic() + EVERY
