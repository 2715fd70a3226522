"""One progress bar a stage, with the time left; in a log file, a plain line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

MOVING = "{desc} {n_fmt}/{total_fmt} left {remaining}{postfix} {bar:24}"  # a narrow terminal cuts the end
PLAIN = "{desc}: {n_fmt}/{total_fmt} after {elapsed}, left {remaining}{postfix}"
EVERY = 20.0  # seconds between a log's lines at first; later a tenth of the time gone

_IN_ONE = ContextVar("in one bar", default=False)


class Lines:
    """A file that does not move, in which each state of a bar is a line of its own."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.last = file, ""

    def write(self, state: str) -> None:
        """A state, if it says anything new."""
        if (line := state.strip()) not in ("", self.last):
            print(line, file=self.file, flush=True)
            self.last = line


class Shown(tqdm):
    """Progress on the error stream, as fits what that is."""

    monitor_interval = 0  # no thread watches the bars

    def __init__(self, title: str, total: float) -> None:
        self.moves = sys.stderr.isatty()
        super().__init__(
            total=total,
            desc=title,
            file=sys.stderr if self.moves else Lines(sys.stderr),
            disable=getattr(rank_zero_only, "rank", 0) != 0,
            bar_format=MOVING if self.moves else PLAIN,
            mininterval=0.1 if self.moves else EVERY,
            miniters=1,
            dynamic_ncols=self.moves,
        )

    def advance(self, more: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.set_postfix_str(note, refresh=False)
        if not self.moves:
            self.mininterval = max(EVERY, self.format_dict["elapsed"] / 10)
        self.update(more)

    def within(self, step: int, steps: int) -> None:
        """What is at work has come to a step of at most so many."""
        self.set_postfix_str(f"step {step} of {steps}", refresh=False)
        if not self.disable and self._time() - self.last_print_t >= self.mininterval:  # type: ignore[has-type]
            self.refresh()
            self.last_print_t = self._time()


@contextmanager
def one_bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """One bar over many stages, which show none; yields what takes how many more are done, and a note."""
    token = _IN_ONE.set(True)
    try:
        with Shown(title, total) as shown:
            yield shown.advance
    finally:
        _IN_ONE.reset(token)


class StageProgressBar(ProgressBar):
    """Counts a stage's batches over all its epochs; writes to the error stream."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.shown: Shown | None = None

    def disable(self) -> None:
        """Called by Lightning on all ranks but zero, where bars do not show anyway."""

    def start(self, total: float) -> None:
        """A stage of so many batches begins."""
        if not _IN_ONE.get():
            self.shown = Shown(self.title, total)

    def stop(self, *_: Any) -> None:
        """It has ended."""
        if self.shown:
            self.shown.close()
        self.shown = None

    on_predict_end = on_train_end = on_exception = stop  # type: ignore[assignment]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(sum(trainer.num_predict_batches))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer.num_training_batches * (trainer.max_epochs or 1))

    def on_predict_batch_end(self, *_: Any) -> None:
        if self.shown:
            self.shown.advance()

    def within(self, step: int, steps: int) -> None:
        """The batch at work has come to a step of at most so many."""
        if self.shown:
            self.shown.within(step, steps)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loss = trainer.progress_bar_metrics.get("loss")
        if self.shown:
            self.shown.advance(note=f"loss {loss:.3f}" if loss is not None else "")
