"""Ctrl-C ends a stage between two batches, where nothing is half done."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning.pytorch import Callback


class StopBetweenBatches(Callback):
    """Notes Ctrl-C and raises KeyboardInterrupt at the end of the batch; a second Ctrl-C raises at once.

    An interrupt that falls anywhere may be swallowed by a library's clean-up code, or break the queue that
    TensorBoard's writer waits on.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = None

    def setup(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: Any) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def _stop_if_noted(self) -> None:
        if self.noted:
            raise KeyboardInterrupt

    def on_train_batch_end(self, *_: Any) -> None:
        self._stop_if_noted()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._stop_if_noted()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
