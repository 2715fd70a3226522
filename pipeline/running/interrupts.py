"""Ctrl-C and SIGTERM (`kill`, a SLURM requeue) end a command where nothing is half done; a second one at once.

Imports no torch, so that the signals are heeded while torch and the model are still being loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"\nstopping when this batch is done; Ctrl-C again: at once\n"
RESTORE_CURSOR = b"\x1b[?25h"  # which a progress bar hides


class Interrupted(BaseException):
    """A signal asks to end; no KeyboardInterrupt, which Lightning turns into an exit code of its own."""


class Interrupts:
    """What became of the signals that ask this process to end."""

    def __init__(self) -> None:
        self.noted: int | None = None  # the last of them
        self.postponing = False  # whether a first one waits for `raise_if_noted`
        self._heeding = False
        self._raised = False
        self._handlers: dict[int, Callable[[int, Any], None]] = dict.fromkeys(SIGNALS, self._note)

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Inside the `with`, a signal raises Interrupted; in another thread than the main one none arrives."""
        if self._heeding or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.noted, self._raised, self._heeding = None, False, True
        try:
            self.listen()
            yield
        finally:
            self._heeding = self.postponing = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals back from a library that has taken them, and would keep them to itself."""
        if self._heeding and threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def left_to(self, handler: Callable[[int, Any], None], number: int) -> Iterator[None]:
        """Inside the `with`, a signal is another's to handle, also while a stage runs."""
        before, self._handlers[number] = self._handlers[number], handler
        installed = signal.signal(number, handler)
        try:
            yield
        finally:
            self._handlers[number] = before
            signal.signal(number, installed)

    def end(self, number: int) -> None:
        """Raise Interrupted for a signal that has come."""
        self.noted = number
        self.raise_if_noted()

    def raise_if_noted(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.noted is not None:
            self._raised = True
            raise Interrupted

    def _note(self, number: int, _: Any) -> None:
        if self._raised:  # and what is done at the end takes too long
            os.write(2, RESTORE_CURSOR)
            os._exit(128 + number)  # as safe as kill -9: files are written whole or not at all
        first, self.noted = self.noted is None, number
        if not (first and self.postponing):
            self.end(number)
        elif number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, STOPPING)


interrupts = Interrupts()
