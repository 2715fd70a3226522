"""Lightning's Trainer as every stage uses it: one progress bar a stage, quiet, nothing saved by itself."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy

from pipeline.errors import UserError, one_line
from pipeline.options.shared import NF4, SHARDED, TrainerOptions
from pipeline.running.interrupts import interrupts
from pipeline.running.processes import trainer_errors, world_size
from pipeline.running.progress import StageProgressBar
from pipeline.running.sharding import KeepStep
from pipeline.running.strategy import ShardedStrategy

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, NF4: torch.bfloat16}
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

Loggers = Logger | Sequence[Logger] | bool


@dataclass(frozen=True)
class Runtime:
    """What stages run with."""

    # options to make a Trainer of for each stage, or a Trainer of one's own
    trainer: TrainerOptions | Trainer = field(default_factory=TrainerOptions)
    logger: Loggers = False  # where the curves go
    seed: int = 0  # of every draw
    work: Path | None = None  # a folder for half-done work; what is found there is not done again

    @property
    def options(self) -> TrainerOptions:
        """The options; those by default where there is a Trainer."""
        return self.trainer if isinstance(self.trainer, TrainerOptions) else TrainerOptions()

    @property
    def precision(self) -> str:
        """Lightning's name of the precision."""
        return str(self.trainer.precision)


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the `with`, arithmetic is in its tensors' own precision, whatever the Trainer's is for the model."""
    return torch.autocast(device.type, enabled=False)


def precision_of(options: TrainerOptions, device: torch.device) -> AbstractContextManager[Any]:
    """Inside the `with`, arithmetic is as a Trainer's of these options would be."""
    mixed = MIXED.get(options.precision)
    return torch.autocast(device.type, mixed) if mixed else nullcontext()


def weights_dtype(options: TrainerOptions) -> torch.dtype:
    """The dtype that the model's weights are loaded in under these options' precision."""
    return DTYPES.get(options.precision, torch.float32)


@contextmanager
def trainer_of(
    runtime: Runtime, title: str, callbacks: Sequence[Callback] = (), **settings: Any
) -> Iterator[Trainer]:
    """The Trainer for one stage: made of the options, or one's own with the stage's callbacks added meanwhile.

    `title` names the stage on the progress bar; `settings` are what else Trainer takes, unless it is one's own.
    UserError when the accelerator, devices or strategy do not exist here.
    """
    with interrupts.heeding():  # outside of the Trainer, which puts back the signals' handlers that it found
        if isinstance(runtime.trainer, TrainerOptions):
            yield build_trainer(runtime.trainer, title, callbacks, **settings)
        else:
            with _lent(runtime.trainer, callbacks):
                yield runtime.trainer


@contextmanager
def _lent(trainer: Trainer, callbacks: Sequence[Callback]) -> Iterator[None]:
    """A user's Trainer with a stage's callbacks; after the `with` as it was."""
    callbacks_now: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own, parts = list(callbacks_now), trainer.accumulate_grad_batches
    inference_mode, trainer.predict_loop.inference_mode = trainer.predict_loop.inference_mode, False
    callbacks_now += [KeepStep(), *callbacks]
    batches = trainer.fit_loop.epoch_loop
    for progress in (  # one that has fitted before counts epochs and steps from 0
        trainer.fit_loop.epoch_progress,
        batches.batch_progress,
        batches.scheduler_progress,
        batches.automatic_optimization.optim_progress,
    ):
        progress.reset()
    try:
        yield
    finally:
        callbacks_now[:], trainer.accumulate_grad_batches = own, parts
        trainer.predict_loop.inference_mode = inference_mode


def build_trainer(
    options: TrainerOptions, title: str, callbacks: Sequence[Callback] = (), **settings: Any
) -> Trainer:
    """A Trainer made of options: see `trainer_of`."""
    precision: dict[str, Any] = {"precision": "bf16-true" if options.precision == NF4 else options.precision}
    strategy: str | Strategy = options.strategy
    plugins: list[Any] = []
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # it would save a checkpoint that no `--resume` knows
    if strategy in SHARDED:
        strategy = ShardedStrategy(world_size())
        if options.precision == "64-true":  # which Lightning takes of a model-parallel strategy as a plugin only
            precision, plugins = {}, [*plugins, DoublePrecision()]
    if options.profiler:
        file = re.sub(r"\W+", "_", title.lower())
        settings["profiler"] = PROFILERS[options.profiler]((options.folder or Path()) / "profile", file)
    with trainer_errors(options):
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=strategy,
            plugins=plugins or None,
            callbacks=[
                StageProgressBar(title),
                KeepStep(),
                *callbacks,
                *callbacks_of(options),
                StopBetweenBatches(),
            ],
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,  # the data modules deal batches out
            **{"enable_checkpointing": False, "logger": False, **precision, **settings},
        )


def callbacks_of(options: TrainerOptions) -> list[Callback]:
    """The callbacks that options name, made anew; UserError for one that cannot be made."""
    made: list[Callback] = []
    for one in options.callbacks:
        given: dict[str, Any] = one if isinstance(one, dict) else {"class_path": one}
        home, _, name = str(given.get("class_path")).rpartition(".")
        try:
            make = getattr(import_module(home or "lightning.pytorch.callbacks"), name)
            made.append(make(**given.get("init_args", {})))
            if not isinstance(made[-1], Callback):
                raise TypeError("it is no Callback of lightning.pytorch")
        except Exception as error:
            expected = "expected such as LearningRateMonitor, mypackage.Watch or {class_path: NAME, init_args: ...}"
            raise UserError(f"trainer.callbacks: {one}: {one_line(error)}; {expected}") from error
    return made


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


def hush(verbose: bool) -> None:
    """Keep the libraries' own messages from the terminal unless asked for."""
    if verbose:
        return
    own = ("lightning", "lightning.pytorch", "lightning.fabric")  # each has a level of its own
    for name in (*own, "transformers", "torch", "matplotlib", "lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|torch|torchmetrics)(\.|$)")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
