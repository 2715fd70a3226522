"""The LightningDataModule that hands items, already encoded, to a Trainer in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class ListDataModule(LightningDataModule):
    """Batches of items that are in memory: for `fit` shuffled anew each epoch, for `predict` in order.

    Sort the items by length before, so that little is padded.

    Args:
        streams: for `predict`, one or several (items, collate, batch size); for `fit`, exactly one.
        seed: seed of the shuffling.
    """

    def __init__(
        self,
        *streams: tuple[Sequence[Any], Callable[[list[Any]], Any], int],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.seed = seed

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
        return [DataLoader(items, batch_size=size, collate_fn=collate) for items, collate, size in self.streams]  # type: ignore[arg-type]
