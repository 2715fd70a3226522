"""The LightningDataModule that hands items, already encoded, to a Trainer in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler


class Dealt(NamedTuple):
    """A batch for `predict`: its number in its stream, its items, and whether it counts nothing."""

    number: int
    items: list[Any]
    is_copy: bool = False


class ListDataModule(LightningDataModule):
    """Batches of items that are in memory: for `fit` shuffled anew each epoch, for `predict` in order.

    For `predict` they are dealt out to devices batch by batch, in batches of even size.
    Sort the items by length before, so that little is padded.

    Args:
        streams: for `predict`, one or several (items, collate, batch size); for `fit`, exactly one.
        seed: seed of the shuffling.
        in_step: for `predict`, let all devices run as many batches.

    Attributes:
        done: for `predict`, batches to leave out, by stream and number.
        dealt: by stream, this device's batches, once they are dealt.
        begun: for `fit`, an epoch that an interrupted fit began, and how many of its batches were run.
    """

    def __init__(
        self,
        *streams: tuple[Sequence[Any], Callable[[list[Any]], Any], int],
        seed: int = 0,
        in_step: bool = False,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.seed = seed
        self.in_step = in_step
        self.done: set[tuple[int, int]] = set()
        self.dealt: list[list[Dealt]] = []
        self.begun = (0, 0)

    def sizes(self, devices: int) -> list[str]:
        """By stream, how many items there are, at most in a batch, and in how many batches."""
        return [
            f"{len(items)}x{size}x{len(self._batches(stream, devices))}"
            for stream, (items, _, size) in enumerate(self.streams)
        ]

    def places(self, devices: int) -> set[tuple[int, int]]:
        """All batches, by stream and number."""
        return {
            (stream, number) for stream in range(len(self.streams)) for number, _ in self._batches(stream, devices)
        }

    def train_dataloader(self) -> DataLoader:
        ((items, collate, size),) = self.streams
        epoch = self.trainer.current_epoch if self.trainer else 0
        generator = torch.Generator().manual_seed(self.seed + epoch)  # so that a resumed epoch has the order it had
        order = torch.randperm(len(items), generator=generator).tolist()
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        begun, done = self.begun
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_sampler=_Rest(batches, done if epoch == begun else 0),
            collate_fn=collate,
        )

    def predict_dataloader(self) -> list[DataLoader]:
        def loader(collate: Callable[[list[Any]], Any], dealt: list[Dealt]) -> DataLoader:
            return DataLoader(dealt, collate_fn=lambda one: collate(one[0].items))  # type: ignore[arg-type]

        self.dealt = [self._dealt(number) for number in range(len(self.streams))]
        return [loader(collate, dealt) for (_, collate, _), dealt in zip(self.streams, self.dealt, strict=True)]

    def _dealt(self, stream: int) -> list[Dealt]:
        """This device's batches of a stream: at least one, for Lightning takes no fewer, if need be a copy."""
        rank, devices = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = [Dealt(number, items) for number, items in self._batches(stream, devices)]
        left = [batch for batch in batches if (stream, batch.number) not in self.done]
        short = -len(left) % devices if self.in_step and left else max(0, devices - len(left))
        return (left + [batches[-1]._replace(is_copy=True)] * short)[rank::devices]

    def _batches(self, stream: int, devices: int) -> list[tuple[int, list[Any]]]:
        """A stream's batches of items, each with its number; on several devices, of even size."""
        items, _, size = self.streams[stream]
        number = max(-(-len(items) // size), min(len(items), devices))
        ends = [min(size * n, len(items)) if devices == 1 else len(items) * n // number for n in range(number + 1)]
        return [(n, list(items[start:end])) for n, (start, end) in enumerate(pairwise(ends))]


class _Rest(Sampler[list[int]]):
    """An epoch's batches without the first ones, but counted in full, as Lightning counts."""

    def __init__(self, batches: Sequence[list[int]], done: int) -> None:
        self.batches = batches
        self.done = done

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.done :])

    def __len__(self) -> int:
        return len(self.batches)
