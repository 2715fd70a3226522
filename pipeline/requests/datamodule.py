"""The LightningDataModule that hands items, already encoded, to a Trainer in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class ListDataModule(LightningDataModule):
    """Batches of items that are in memory: for `fit` shuffled anew each epoch, for `predict` in order.

    For `predict` they are dealt out to devices batch by batch, in batches of even size.
    Sort the items by length before, so that little is padded.

    Args:
        streams: for `predict`, one or several (items, collate, batch size); for `fit`, exactly one.
        seed: seed of the shuffling.
        in_step: for `predict`, give all devices as many batches, some of them twice: what comes of them must be
            known by its number, not counted. So must it be where there are fewer items than devices.
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

    def train_dataloader(self) -> DataLoader:
        ((items, collate, batch_size),) = self.streams
        epoch = self.trainer.current_epoch if self.trainer else 0
        order = torch.Generator().manual_seed(self.seed + epoch)  # so that a resumed epoch has the order it had
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=torch.randperm(len(items), generator=order).tolist(),
            collate_fn=collate,
        )

    def predict_dataloader(self) -> list[DataLoader]:
        def loader(items: Sequence[Any], collate: Callable[[list[Any]], Any], size: int) -> DataLoader:
            return DataLoader(self._dealt(items, size), collate_fn=lambda one: collate(one[0]))  # type: ignore[arg-type]

        return [loader(*stream) for stream in self.streams]

    def _dealt(self, items: Sequence[Any], size: int) -> list[list[Any]]:
        """This device's batches of items; at least one, if need be a copy of another's."""
        rank, devices = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        number = max(-(-len(items) // size), min(len(items), devices))
        ends = [min(size * n, len(items)) if devices == 1 else len(items) * n // number for n in range(number + 1)]
        batches = [list(items[start:end]) for start, end in pairwise(ends)]
        short = -number % devices if self.in_step else max(0, devices - number)
        return (batches + [batches[-1]] * short)[rank::devices]
