"""Lightning's Trainer as every stage uses it: one progress bar a stage, quiet, nothing saved by itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pipeline.errors import UserError
from pipeline.model.batch_log import BatchLog
from pipeline.model.interrupts import StopBetweenBatches
from pipeline.model.memory import in_halves
from pipeline.model.processes import from_first, of_all, world_size
from pipeline.model.progress import StageProgressBar
from pipeline.model.sharding import KeepStep, is_sharded
from pipeline.model.strategy import ShardedStrategy
from pipeline.options import TrainerOptions
from pipeline.options.shared import SHARDED
from pipeline.requests import ListDataModule

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


def weights_dtype(options: TrainerOptions | None) -> torch.dtype:
    """The dtype that the model's weights are loaded in under these options' precision."""
    return DTYPES.get(options.precision, torch.float32) if options else torch.float32


def build_trainer(
    options: TrainerOptions,
    title: str,
    logger: Logger | bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """A Trainer for one stage.

    Args:
        options: what it runs on.
        title: the stage's name on the progress bar.
        logger: where `fit` logs to.
        callbacks: what watches the stage.
        settings: anything else that Trainer takes.

    Raises:
        UserError: when the accelerator, devices or strategy do not exist here.
    """
    precision: dict[str, Any] = {"precision": options.precision}
    strategy: str | Strategy = options.strategy
    if strategy in SHARDED:
        strategy = ShardedStrategy(world_size())
        if options.precision == "64-true":  # which Lightning takes of a model-parallel strategy as a plugin only
            precision = {"plugins": [DoublePrecision()]}
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices_asked,
            num_nodes=options.num_nodes,
            strategy=strategy,
            logger=logger,
            callbacks=[StageProgressBar(title), KeepStep(), *callbacks, StopBetweenBatches()],
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,  # the data modules deal batches out
            **{"enable_checkpointing": False, **precision, **settings},
        )
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer: {reason}") from error


def check_shares(trainer: Trainer, items: int) -> None:
    """Raise UserError when a device would get no request."""
    if items < trainer.world_size:
        raise UserError(
            f"trainer.devices: {trainer.world_size} devices for {items} requests; give at least one a device"
        )


def predict(trainer: Trainer, module: LightningModule, data: ListDataModule, kept: Path | None = None) -> list[Any]:
    """Run `Trainer.predict` over a data module whose steps return lists; all processes' items, as one list.

    A batch for which the memory does not suffice is run in halves.

    Args:
        trainer: runs the stage.
        module: what is run.
        data: its batches.
        kept: where each batch's items are kept as they come (see `BatchLog`); what is found there is not done
            again, and its items come first.

    Raises:
        UserError: when the memory does not suffice for one item.
    """
    log, devices = None, trainer.world_size
    if kept:
        sizes = "-".join(data.sizes(devices))  # batches of other sizes are others
        log = BatchLog(kept.with_name(f"{kept.name}-{sizes}"), trainer.global_rank)
    done = from_first(log.read() if log else {})
    data.done = {*data.done, *done}
    items = [item for outputs in done.values() for item in outputs]
    if data.places(devices) - data.done:
        alone = devices == 1 or not is_sharded(module)
        with in_halves(trainer, module, data, alone, log):
            outputs: list[Any] = trainer.predict(module, datamodule=data) or []
        if len(data.streams) > 1:  # of several loaders Lightning gives a list each
            outputs = [batch for stream in outputs for batch in stream]
        items += [item for part in of_all([item for batch in outputs for item in batch]) for item in part]
    if log:
        log.close()
    return items


def hush(verbose: bool) -> None:
    """Keep the libraries' own messages from the terminal unless asked for."""
    if verbose:
        return
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|torch|torchmetrics)(\.|$)")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
