"""One progress bar a stage, with the time left, that is also right in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_IN_ONE = ContextVar("in one bar", default=False)


def _columns() -> Progress:
    """An empty display on the terminal's error stream."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr),
    )


@contextmanager
def one_bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """One bar over many stages, which show none of their own inside the `with`.

    Args:
        title: what it counts.
        total: up to what.

    Yields:
        a function that takes how many more are done, and a note.
    """
    with _columns() as progress:
        progress.disable = getattr(rank_zero_only, "rank", 0) != 0
        task = progress.add_task(title, total=total, note="")
        token = _IN_ONE.set(True)
        try:
            yield lambda more, note: progress.update(task, advance=more, note=note)
        finally:
            _IN_ONE.reset(token)


class StageProgressBar(ProgressBar):
    """Counts a stage's batches over all its epochs and loaders; writes to the terminal's error stream.

    Args:
        title: the stage's name.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self._enabled = True
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Called by Lightning on all ranks but zero."""
        self._enabled = False

    def _start(self, total: float) -> None:
        if not self._enabled or _IN_ONE.get():
            return
        self._progress = _columns()
        self._progress.add_task(self.title, total=total, note="")
        self._progress.start()

    def _advance(self, note: str = "") -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], advance=1, note=note)

    def _stop(self, finished: bool = True) -> None:
        if not self._progress:
            return
        if finished:  # an early stop is an end too
            task = self._progress.tasks[0]
            self._progress.update(task.id, total=task.completed)
        self._progress.stop()
        self._progress = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *_: Any) -> None:
        self._advance()

    def on_predict_end(self, *_: Any) -> None:
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer.num_training_batches * (trainer.max_epochs or 1))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loss = trainer.progress_bar_metrics.get("loss")
        self._advance(f"loss {loss:.3f}" if loss is not None else "")

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop(finished=False)
