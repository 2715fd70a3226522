"""A stage that a signal asks to end does so between two batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from pipeline.running.interrupts import interrupts


class StopBetweenBatches(Callback):
    """Postpones Ctrl-C and SIGTERM to the end of the batch at work; a second one ends at once.

    An interrupt that falls anywhere may break the queue that TensorBoard's writer waits on. Lightning's own handler
    of SIGTERM, which lets a stage run on, is set aside meanwhile.
    """

    def setup(self, *_: Any, **__: Any) -> None:
        interrupts.raise_if_noted()
        interrupts.postponing = True

    def _listen(self, *_: Any) -> None:
        interrupts.listen()

    def _stop(self, *_: Any) -> None:
        interrupts.raise_if_noted()

    on_train_start = on_predict_start = _listen  # type: ignore[assignment]
    # what keeps the results of the batch before was there
    on_train_batch_start = on_predict_batch_start = _stop  # type: ignore[assignment]
    on_train_end = on_predict_end = _stop  # type: ignore[assignment]

    def teardown(self, *_: Any, **__: Any) -> None:
        interrupts.postponing = False
        interrupts.raise_if_noted()

    def on_exception(self, *_: Any) -> None:
        interrupts.postponing = False
