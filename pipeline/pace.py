"""When work in progress is worth keeping: now and then, and at once when a signal asks the program to end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.interrupts import interrupts

EVERY = 10.0  # seconds
SHARE = 20  # keeping takes at most one part in so many of the time


class Pace:
    """Tells how long ago something was kept, and how long that took."""

    def __init__(self) -> None:
        self._kept = time.monotonic()
        self._took = 0.0

    def is_due(self) -> bool:
        """Whether it is time to keep what there is."""
        if interrupts.noted is not None:
            return True
        return time.monotonic() - self._kept >= max(EVERY, SHARE * self._took)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside the `with`, it is kept."""
        started = time.monotonic()
        yield
        self._kept = time.monotonic()
        self._took = self._kept - started
