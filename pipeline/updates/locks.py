"""Locks between processes: kept by the operating system, so that a dead process holds none."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockedError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file's lock inside the `with`.

    Raises:
        LockedError: when another process holds it and `wait` is false.
    """
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError from None
        yield
