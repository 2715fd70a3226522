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
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pipeline.errors import UserError
from pipeline.model.batch_log import BatchLog
from pipeline.model.interrupts import StopBetweenBatches
from pipeline.model.memory import in_halves
from pipeline.model.progress import StageProgressBar
from pipeline.options import TrainerOptions
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
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=int(options.devices) if str(options.devices).isdigit() else options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision=options.precision,  # type: ignore[arg-type]
            logger=logger,
            callbacks=[StageProgressBar(title), *callbacks, StopBetweenBatches()],
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,  # the data modules deal batches out
            **{"enable_checkpointing": False, **settings},
        )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
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
    done = log.read() if log else {}
    data.done = {*data.done, *done}
    items = [item for outputs in done.values() for item in outputs]
    if data.places(devices) - data.done:
        with in_halves(trainer, module, data, not _in_step(trainer), log):
            outputs: list[Any] = trainer.predict(module, datamodule=data) or []
        if len(data.streams) > 1:  # of several loaders Lightning gives a list each
            outputs = [batch for stream in outputs for batch in stream]
        found = [item for batch in outputs for item in batch]
        gathered = [found]
        if devices > 1:
            gathered = [[] for _ in range(devices)]
            torch.distributed.all_gather_object(gathered, found)
        items += [item for part in gathered for item in part]
    if log:
        log.close()
    return items


def _in_step(trainer: Trainer) -> bool:
    """Whether a pass on one device needs one on every other."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, ModelParallelStrategy)


def hush(verbose: bool) -> None:
    """Keep the libraries' own messages from the terminal unless asked for."""
    if verbose:
        return
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|torch|torchmetrics)(\.|$)")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
