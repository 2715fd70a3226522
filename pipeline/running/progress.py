"""One progress bar a stage, with the time left; in a log file, a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

WIDEST = 24  # columns of a bar
BESIDE = 53  # columns that all else may take
EVERY = 20.0  # seconds between a log's lines at first; later a tenth of the time gone

_IN_ONE = ContextVar("in one bar", default=False)


class Bar:
    """A bar that moves, on a terminal; without the bar itself where the terminal is too narrow.

    Args:
        title: what is counted.
        total: up to what.
        console: the terminal.
    """

    def __init__(self, title: str, total: float, console: Console) -> None:
        one_line = Column(no_wrap=True)
        room = min(WIDEST, console.width - BESIDE)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=one_line),
            *([BarColumn(bar_width=room)] if room > 4 else []),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=one_line),
            TextColumn("{task.fields[note]}", table_column=one_line),
            console=console,
            redirect_stdout=sys.stdout.isatty(),  # what is printed goes beside the bar only where that is the terminal
        )
        self._task = self._progress.add_task(escape(title), total=total, note="")
        self._progress.start()

    def advance(self, more: int = 1, note: str = "") -> None:
        """So many more are done."""
        self._progress.update(self._task, advance=more, note=escape(note))

    def stop(self, finished: bool) -> None:
        """No more follow; an early stop is an end too."""
        if finished:
            self._progress.update(self._task, total=self._progress.tasks[0].completed)
        self._progress.stop()


class Lines:
    """Plain lines, in a log file or on a terminal that cannot move: now and then, and at the end.

    Args: as `Bar`'s.
    """

    def __init__(self, title: str, total: float, console: Console) -> None:
        self.title, self.total, self.file = title, total, console.file
        self.done = 0
        self.started = self._last = time.monotonic()

    def advance(self, more: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.done += more
        now = time.monotonic()
        gone = now - self.started
        if now - self._last < max(EVERY, gone / 10) or self.done >= self.total:
            return
        self._last = now
        left = f", left {clock(gone * (self.total - self.done) / self.done)}" if math.isfinite(self.total) else ""
        self._say(f"{self.done}/{self.total} after {clock(gone)}{left}{note and ', '}{note}")

    def stop(self, finished: bool) -> None:
        """No more follow; an early stop is an end too."""
        gone = clock(time.monotonic() - self.started)
        how = f"{self.done} in {gone}" if finished else f"{self.total} when it stopped, after {gone}"
        self._say(f"{self.done}/{how}")

    def _say(self, what: str) -> None:
        print(f"{self.title}: {what}", file=self.file, flush=True)


def clock(seconds: float) -> str:
    """A length of time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def shown(title: str, total: float) -> Bar | Lines:
    """Progress on the error stream, as fits what that is."""
    console = Console(file=sys.stderr)
    moves = console.is_terminal and not console.is_dumb_terminal
    return (Bar if moves else Lines)(title, total, console)


@contextmanager
def one_bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """One bar over many stages, which show none of their own inside the `with`.

    Args:
        title: what it counts.
        total: up to what.

    Yields:
        a function that takes how many more are done, and a note.
    """
    progress = shown(title, total) if getattr(rank_zero_only, "rank", 0) == 0 else None
    token, finished = _IN_ONE.set(True), False
    try:
        yield progress.advance if progress else lambda more, note: None
        finished = True
    finally:
        _IN_ONE.reset(token)
        if progress:
            progress.stop(finished)


class StageProgressBar(ProgressBar):
    """Counts a stage's batches over all its epochs; writes to the error stream.

    Args:
        title: the stage's name.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title, self.enabled = title, True
        self.shown: Bar | Lines | None = None

    def disable(self) -> None:
        """Called by Lightning on all ranks but zero."""
        self.enabled = False

    def start(self, total: float) -> None:
        """A stage of so many batches begins."""
        if self.enabled and not _IN_ONE.get():
            self.shown = shown(self.title, total)

    def stop(self, finished: bool = True) -> None:
        """It has ended."""
        if self.shown:
            self.shown.stop(finished)
        self.shown = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(sum(trainer.num_predict_batches))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer.num_training_batches * (trainer.max_epochs or 1))

    def on_predict_batch_end(self, *_: Any) -> None:
        if self.shown:
            self.shown.advance()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loss = trainer.progress_bar_metrics.get("loss")
        if self.shown:
            self.shown.advance(note=f"loss {loss:.3f}" if loss is not None else "")

    def on_predict_end(self, *_: Any) -> None:
        self.stop()

    def on_train_end(self, *_: Any) -> None:
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop(finished=False)
