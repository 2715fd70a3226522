"""Lightning's Trainer as every stage uses it: one progress bar a stage, quiet, nothing saved by itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pipeline.errors import UserError
from pipeline.model.interrupts import StopBetweenBatches
from pipeline.model.progress import StageProgressBar
from pipeline.options import TrainerOptions

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


def predict(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> list[Any]:
    """Run `Trainer.predict` over a data module whose steps return lists; all ranks' items, as one list."""
    outputs: list[Any] = trainer.predict(module, datamodule=data) or []
    batches = [batch for stream in outputs for batch in stream] if outputs and _nested(outputs) else outputs
    items = [item for batch in batches for item in batch]
    if trainer.world_size == 1:
        return items
    gathered: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def _nested(outputs: list[Any]) -> bool:
    """Lightning wraps the outputs of several loaders in a list a loader; of one loader, it does not."""
    return isinstance(outputs[0], list) and bool(outputs[0]) and isinstance(outputs[0][0], list)


def hush(verbose: bool) -> None:
    """Keep the libraries' own messages from the terminal unless asked for."""
    if verbose:
        return
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|torch|torchmetrics)(\.|$)")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
