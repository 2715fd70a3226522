"""Lessons in the order and the parts that they are trained in: the same steps on any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from pipeline.editing.lessons import Lessons, collate_lessons
from pipeline.requests.rows import Batch


class Part(NamedTuple):
    """A micro-batch of one device: requests and unrelated prompts by number, the epoch, and the weights of both."""

    requests: list[int]
    others: list[int]
    epoch: int
    weights: tuple[float, float]


class EpochOrder(DistributedSampler[Part]):
    """Each epoch's order, and this device's part of every batch over all devices.

    A batch holds the same requests on any number of devices and in any number of micro-batches. Weights are such
    that the mean over devices and micro-batches is the mean over all rows. All devices take part in each step: one
    for which no row is left takes one along that counts nothing.

    Args:
        lessons: what is taught.
        batch_size: requests in a step.
        parts: micro-batches in a step.
        place: this device's number, and how many there are.
        seed: of the order.
        begun: an epoch that was begun before, and how many of its micro-batches were run.
    """

    def __init__(
        self,
        lessons: Lessons,
        batch_size: int,
        parts: int,
        place: tuple[int, int],
        seed: int,
        begun: tuple[int, int],
    ) -> None:
        super().__init__(lessons.taught, num_replicas=place[1], rank=place[0], seed=seed)  # type: ignore[arg-type]
        self.lessons, self.batch_size, self.parts, self.begun = lessons, batch_size, parts, begun

    def __len__(self) -> int:
        return -(-len(self.lessons.taught) // self.batch_size) * self.parts

    def __iter__(self) -> Iterator[Part]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lessons.taught), generator=generator).tolist()
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        parts = (self._part(picked, part) for picked in batches for part in range(self.parts))
        yield from islice(parts, self.begun[1] if self.epoch == self.begun[0] else 0, None)

    def _part(self, picked: list[int], part: int) -> Part:
        others = picked[::2] if self.lessons.others else []
        own, own_others = (some[self.rank :: self.num_replicas][part :: self.parts] for some in (picked, others))
        share = float(self.num_replicas * self.parts)
        weights = share / len(picked) if own else 0.0, share / max(1, len(others))
        return Part(own or picked[:1], own_others, self.epoch, weights)


class LessonData(LightningDataModule):
    """Lessons in batches for `fit`; goes on within an epoch from where a checkpoint was written.

    Args:
        lessons: what is taught.
        batch_size: requests in an optimiser's step, over all devices.
        pad_token_id: fills rows.
        seed: of the order.

    Attributes:
        parts: micro-batches in a step, which is the Trainer's `accumulate_grad_batches`.
    """

    def __init__(self, lessons: Lessons, batch_size: int, pad_token_id: int, seed: int = 0) -> None:
        super().__init__()
        self.lessons, self.batch_size, self.pad_token_id, self.seed = lessons, batch_size, pad_token_id, seed
        self.begun = (0, 0)

    def train_dataloader(self) -> DataLoader:
        """This device's micro-batches."""
        assert self.trainer
        place = self.trainer.global_rank, self.trainer.world_size
        order = EpochOrder(
            self.lessons, self.batch_size, self.trainer.accumulate_grad_batches, place, self.seed, self.begun
        )
        return DataLoader(self, sampler=order, batch_size=None)  # type: ignore[arg-type]

    def __getitem__(self, part: Part) -> Batch:
        taught = [self.lessons.of_epoch(number, part.epoch) for number in part.requests]
        others = [self.lessons.other(number, part.epoch) for number in part.others]
        weights = [part.weights[0]] * len(taught) + [part.weights[1]] * len(others)
        return collate_lessons(taught, others, weights, self.pad_token_id)

    def __len__(self) -> int:
        return len(self.lessons.taught)

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
