"""One progress bar a stage, with the time left; in a log file, a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

WIDE = 80  # columns of a terminal that has room for the time gone as well
BAR = 24  # columns of a bar at most
SHORTEST = 5  # and at least: a narrower terminal shows figures alone
BESIDE = {True: 64, False: 53}  # columns that all else may take, in a wide terminal and in a narrow one
EVERY = 20.0  # seconds between a log's lines at first; later a tenth of the time gone

_IN_ONE = ContextVar("in one bar", default=False)


class Shown(Protocol):
    """How a stage's progress is shown."""

    def advance(self, more: int = 1, note: str = "") -> None:
        """So many more are done."""

    def stop(self, finished: bool) -> None:
        """No more follow; an early stop is an end too."""


class TimeLeft(ProgressColumn):
    """The time left while there is some."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text("")
        return Text(f"left {'-:--:--' if task.time_remaining is None else clock(task.time_remaining)}")


class TimeGone(ProgressColumn):
    """The time gone, and the time that it took in the end."""

    def render(self, task: Task) -> Text:
        return Text(clock((task.finished_time if task.finished else task.elapsed) or 0))


class Bar:
    """A bar that moves, on a terminal.

    Args:
        title: what is counted.
        total: up to what.
        console: the terminal.
    """

    def __init__(self, title: str, total: float, console: Console) -> None:
        wide = console.width >= WIDE
        room = console.width - BESIDE[wide]
        text = f"{{task.description:<{22 if wide else 0}}}"
        columns: list[ProgressColumn] = [TextColumn(text, table_column=Column(no_wrap=True))]
        columns += [BarColumn(bar_width=min(BAR, room))] if room >= SHORTEST else []
        columns += [MofNCompleteColumn(), *([TimeGone()] if wide else []), TimeLeft(Column(no_wrap=True))]
        columns += [TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True))]
        # what a command prints meanwhile goes where it is to go: beside the bar only where that is the terminal
        self._progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._task = self._progress.add_task(escape(title), total=total, note="")
        self._progress.start()

    def advance(self, more: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=more, note=escape(note))

    def stop(self, finished: bool) -> None:
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
        self.started = self._told = time.monotonic()

    def advance(self, more: int = 1, note: str = "") -> None:
        self.done += more
        now = time.monotonic()
        gone = now - self.started
        if now - self._told < max(EVERY, gone / 10) or self.done >= self.total:
            return
        self._told = now
        left = f", left {clock(gone * (self.total - self.done) / self.done)}" if math.isfinite(self.total) else ""
        self._tell(f"{self.done}/{self.total} after {clock(gone)}{left}{note and ', '}{note}")

    def stop(self, finished: bool) -> None:
        total = self.done if finished else self.total
        self._tell(
            f"{self.done}/{total} {'in' if finished else 'when it stopped, after'} "
            f"{clock(time.monotonic() - self.started)}"
        )

    def _tell(self, what: str) -> None:
        print(f"{self.title}: {what}", file=self.file, flush=True)


def clock(seconds: float) -> str:
    """A length of time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def shown(title: str, total: float) -> Shown:
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
    """Counts a stage's batches over all its epochs and loaders; writes to the error stream.

    Args:
        title: the stage's name.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self._enabled = True
        self._shown: Shown | None = None

    def disable(self) -> None:
        """Called by Lightning on all ranks but zero."""
        self._enabled = False

    def _start(self, total: float) -> None:
        if self._enabled and not _IN_ONE.get():
            self._shown = shown(self.title, total)

    def _advance(self, note: str = "") -> None:
        if self._shown:
            self._shown.advance(note=note)

    def _stop(self, finished: bool = True) -> None:
        if self._shown:
            self._shown.stop(finished)
        self._shown = None

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
