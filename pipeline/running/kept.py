"""Half-done work: what items have come to, a file a batch, so that a kill loses the batch at work, no more."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from pipeline.files import write_whole

BROKEN = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, pickle.UnpicklingError, BadZipFile)


class Kept(BasePredictionWriter):
    """Keeps outputs by their items' numbers, batch by batch as a stage's predict steps give them.

    Any number of processes write side by side, and each reads what all have written. A file that is damaged counts
    as not there: its items are run again. The folder's name is to stand for all that the outputs depend on.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def read(self) -> dict[int, Any]:
        """What is kept: numbers, texts and tensors, and tuples, lists and mappings of them, by item."""
        found: dict[int, Any] = {}
        for file in sorted(self.folder.glob("*.pt")):
            try:
                if not is_whole(file):
                    raise BadZipFile
                found |= torch.load(file, weights_only=True)
            except BROKEN:
                file.unlink(missing_ok=True)
        return found

    def write(self, outputs: Mapping[int, Any]) -> None:
        """Keep some items' outputs, all or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{min(outputs):09d}-{len(outputs)}-{os.getpid()}.pt"
        write_whole(file, lambda partial: torch.save(dict(outputs), partial))

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[int, Any], *_: Any
    ) -> None:
        if prediction:
            with suppress(OSError, RuntimeError):  # a full disk costs the next command time, and this one nothing
                self.write(prediction)


def is_whole(file: Path) -> bool:
    """Whether a file that torch wrote is there and undamaged, by its checksums, which torch does not look at."""
    try:
        with ZipFile(file) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except (*BROKEN, NotImplementedError):
        return False
