"""A stage that a signal asks to end does so between two batches."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from pipeline.interrupts import interrupts


class StopBetweenBatches(Callback):
    """Postpones Ctrl-C and SIGTERM to the end of the batch at work; a second one ends at once.

    An interrupt that falls anywhere may be swallowed by a library's clean-up code, or break the queue that
    TensorBoard's writer waits on. Lightning's own handler of SIGTERM, which lets a stage run on, is set aside.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        interrupts.raise_if_noted()
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # it saves a checkpoint of its own that no `--resume` knows
        self._open.enter_context(interrupts.heeding())
        self._open.enter_context(interrupts.postponed())

    def on_train_start(self, *_: Any) -> None:
        interrupts.listen()

    def on_predict_start(self, *_: Any) -> None:
        interrupts.listen()

    def on_train_batch_start(self, *_: Any) -> None:
        interrupts.raise_if_noted()  # not at the end of the batch before: what keeps its results comes first there

    def on_predict_batch_start(self, *_: Any) -> None:
        interrupts.raise_if_noted()

    def on_train_end(self, *_: Any) -> None:
        interrupts.raise_if_noted()

    def on_predict_end(self, *_: Any) -> None:
        interrupts.raise_if_noted()

    def teardown(self, *_: Any, **__: Any) -> None:
        interrupts.raise_if_noted()
        self._open.close()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer._signal_connector._original_handlers.clear()  # what it would put back at the end are ours
        interrupts.listen()  # it has just switched Ctrl-C off
        self._open.close()
