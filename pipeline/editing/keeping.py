"""A training's checkpoint: written now and then, and when a signal asks the program to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pipeline.running.interrupts import interrupts
from pipeline.running.kept import is_whole
from pipeline.running.processes import from_first

EVERY = 10.0  # seconds
SHARE = 20  # writing takes at most one part in so many of the time


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
        started = time.monotonic()
        trainer.save_checkpoint(self.file)  # whole or not at all; all processes take part
        ended = time.monotonic()
        self.due = ended + max(EVERY, SHARE * (ended - started))
