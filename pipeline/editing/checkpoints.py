"""Checkpoints of a training: what is trained, the optimiser's and the loop's state, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from pipeline.pace import Pace

LAST = 2  # checkpoints that stay: should the last one be damaged, there is one before it
PATTERN = "step-*.ckpt"


class KeepTraining(Checkpoint):
    """Writes a checkpoint after every epoch, and on one device within an epoch as `Pace` says.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pace = Pace()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        within = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if within and trainer.world_size == 1 and self.pace.is_due():  # several devices hold a part each of a mean
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        file = self.folder / f"step-{trainer.global_step:09d}.ckpt"
        partial = file.with_suffix(".partial")
        with self.pace.keeping():
            trainer.save_checkpoint(partial)  # all processes take part
            _put_in_place(partial, file)


@rank_zero_only
def _put_in_place(partial: Path, file: Path) -> None:
    partial.replace(file)
    for old in sorted(file.parent.glob(PATTERN))[:-LAST]:
        old.unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a folder that is whole; damaged ones are named on the terminal's error stream."""
    damaged: list[Path] = []
    for file in sorted(folder.glob(PATTERN), reverse=True):
        if _is_whole(file):
            _tell(damaged, f"going on from {file.name}, which was written before")
            return file
        damaged.append(file)
    _tell(damaged, "training from the beginning")
    return None


def _is_whole(file: Path) -> bool:
    """Whether a checkpoint, which is an archive, agrees with its own checksums."""
    try:
        with ZipFile(file) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except (OSError, BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return False


@rank_zero_only
def _tell(damaged: list[Path], instead: str) -> None:
    if damaged:
        names = ", ".join(map(str, damaged))
        print(f"checkpoint: {names}: damaged; {instead}", file=sys.stderr, flush=True)
