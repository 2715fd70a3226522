"""Half-done work: what items have come to, a file a batch, so that a kill loses the batch at work, no more."""

from __future__ import annotations

import io
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

from pipeline.files import read_sealed, write_sealed

BROKEN = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, pickle.UnpicklingError, BadZipFile)


class Kept(BasePredictionWriter):
    """Keeps outputs by their items' numbers, batch by batch as a stage's predict steps give them.

    Any number of processes write side by side, and each reads what all have written. A file carries its SHA-256 and
    its folder's name, which is to stand for all that the outputs depend on; one that is damaged, or of another
    folder, is told of and counts as not there: its items are run again.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder
        self.about = {"outputs of": "/".join(folder.parts[-2:])}

    def read(self) -> dict[int, Any]:
        """What is kept: numbers, texts and tensors, and tuples, lists and mappings of them, by item."""
        found: dict[int, Any] = {}
        for file in sorted(self.folder.glob("*.pt")):
            content = read_sealed(file, self.about)
            try:
                found |= torch.load(io.BytesIO(content or b""), weights_only=True)
            except BROKEN:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
        return found

    def write(self, outputs: Mapping[int, Any]) -> None:
        """Keep some items' outputs, all or none."""
        content = io.BytesIO()
        torch.save(dict(outputs), content)
        file = self.folder / f"{min(outputs):09d}-{len(outputs)}-{os.getpid()}.pt"
        write_sealed(file, self.about, content.getvalue())

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[int, Any], *_: Any
    ) -> None:
        if prediction:
            self.write(prediction)


def is_whole(file: Path) -> bool:
    """Whether a file that torch wrote is there and undamaged, by its checksums, which torch does not look at."""
    try:
        with ZipFile(file) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except (*BROKEN, NotImplementedError):
        return False
