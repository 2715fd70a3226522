"""Lessons in the order and the parts that they are trained in: the same steps on any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from pipeline.editing.lessons import Lessons, collate_lessons
from pipeline.requests.rows import Batch


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
        """The epoch, how many of its micro-batches were run, and how many make a step."""
        assert self.trainer
        run = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"begun": [self.trainer.current_epoch, run], "parts": self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        assert self.trainer
        epoch, run = state_dict["begun"]
        self.begun, self.trainer.accumulate_grad_batches = (epoch, run), state_dict["parts"]
