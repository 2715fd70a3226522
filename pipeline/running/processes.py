"""The processes of a command: joined before a model is loaded, and what they tell each other.

Commands run the same lines in every process; Lightning's environments tell each which one it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed

from pipeline.errors import UserError, one_line
from pipeline.files import digest
from pipeline.options.shared import SHARDED, TrainerOptions
from pipeline.output import STARTED, is_one_of_several, started

T = TypeVar("T")


@contextmanager
def trainer_errors(options: TrainerOptions) -> Iterator[None]:
    """What Lightning says of an accelerator, devices or a strategy that do not exist here, as a UserError."""
    try:
        yield
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        asked = f"accelerator {options.accelerator}, devices {options.devices}, strategy {options.strategy}"
        raise UserError(f"trainer: {asked}: not to be had on this machine ({one_line(error)})") from error


def devices_here(options: TrainerOptions) -> int:
    """How many devices of this host the options ask for; UserError when they do not exist."""
    with trainer_errors(options):
        return Trainer(accelerator=options.accelerator, devices=options.devices, logger=False).num_devices


def join(options: TrainerOptions) -> torch.device:
    """Join the other processes, if any; this one's device. UserError when what is asked for does not exist here."""
    with trainer_errors(options):
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices if is_one_of_several() else 1,
            num_nodes=options.num_nodes,
            strategy="ddp" if options.strategy in SHARDED else options.strategy,
        )
        if distributed.is_initialized():
            return fabric.device
        fabric.launch()
    rank_zero_only.rank = fabric.global_rank  # type: ignore[attr-defined]
    os.environ[STARTED] = from_first(started())
    return fabric.device


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def from_first(value: Any) -> Any:
    """What the first process has, in every process."""
    box = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives, or raises, in the first process, which alone does it, in every process.

    Of an error that is no UserError the others get the type's name and its words.
    """
    if world_size() == 1:
        return work()
    done: T | None = None
    failed: Exception | None = None
    if is_first := distributed.get_rank() == 0:
        try:
            done = work()
        except Exception as error:
            failed = error
    told = failed if isinstance(failed, UserError | None) else RuntimeError(f"{type(failed).__name__}: {failed}")
    done, told = from_first((done, told))
    if told:
        raise failed if is_first and failed else told
    return done


@contextmanager
def in_first(make: Callable[[], AbstractContextManager[T]]) -> Iterator[Any]:
    """What `make` gives, entered in the first process alone; the others have None, and fail where that one does."""
    with ExitStack() as stack:
        entered: list[Any] = []
        on_first(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None


def of_all(value: Any) -> list[Any]:
    """What every process has, in their order."""
    gathered = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


def check_alike(what: str, content: Sequence[object]) -> None:
    """Raise UserError, in all processes, unless the texts of the content, which `what` names, are alike in all."""
    if world_size() == 1:
        return
    found = of_all((digest(content), os.uname().nodename))
    other = [f"process {rank} on {host}" for rank, (read, host) in enumerate(found) if read != found[0][0]]
    if other:
        raise UserError(
            f"{what}: not the same in all {world_size()} processes: {', '.join(other[:4])} read something else "
            "than process 0; give every host the same files"
        )
