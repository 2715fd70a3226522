"""The processes of a command: started before a model is loaded, and told of an error once.

Commands run the same lines in every process; Lightning's environments tell each which one it is.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed

from pipeline.errors import UserError
from pipeline.options import TrainerOptions
from pipeline.options.shared import SHARDED
from pipeline.output import STARTED

GRACE = 20  # seconds that a process has to see that another has failed, and to tidy up


def is_one_of_several() -> bool:
    """Whether another process of this command, torchrun or SLURM has started this one."""
    return "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()


def launch(options: TrainerOptions) -> torch.device:
    """Start the other processes that the options ask for, where nobody has (torchrun, SLURM), and join them.

    All name the same default output folder from then on.

    Returns:
        this process's device.

    Raises:
        UserError: when the accelerator, devices or hosts do not exist here.
    """
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices_asked,
            num_nodes=options.num_nodes,
            strategy="ddp" if options.strategy in SHARDED else options.strategy,
        )
        if distributed.is_initialized():
            return fabric.device
        fabric.launch()
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer: {reason}") from error
    rank_zero_only.rank = fabric.global_rank  # type: ignore[attr-defined]
    if started := getattr(fabric.strategy.launcher, "procs", ()):
        _started.extend(started)
        _instead_of_lightnings_observer()
    os.environ[STARTED] = from_first(os.environ.get(STARTED, f"{datetime.now():%Y%m%d-%H%M%S}"))
    return fabric.device


_started: list[Any] = []  # processes that this one has started


def _instead_of_lightnings_observer() -> None:
    """Watch the started processes; Lightning's own watcher kills this one before it can tidy up and say why."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # with none to watch it ends by itself
    threading.Thread(target=_watch, daemon=True, name="watching-processes").start()


def _watch() -> None:
    """End all when one has failed; a collective mostly says so at once, but may also wait for ever."""
    while not any(process.poll() for process in _started):
        time.sleep(1)
    time.sleep(GRACE)
    if not is_told():
        rank = next(number for number, process in enumerate(_started, 1) if process.poll())
        print(f"error: trainer: process {rank} has ended", file=sys.stderr, flush=True)
    end()


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def from_first(value: Any) -> Any:
    """What the first process has, in every process."""
    box = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def of_all(value: Any) -> list[Any]:
    """What every process has, in their order."""
    gathered = [value]
    if world_size() > 1:
        gathered = [None] * world_size()
        distributed.all_gather_object(gathered, value)
    return gathered


def check_alike(what: str, content: Sequence[object]) -> None:
    """Raise UserError, in all processes, unless all were given the same.

    Args:
        what: what is compared, for the message.
        content: whose texts are compared.
    """
    if world_size() == 1:
        return
    own = hashlib.sha256(repr(content).encode()).hexdigest()
    found = of_all((own, os.uname().nodename))
    other = [f"process {rank} on {host}" for rank, (digest, host) in enumerate(found) if digest != found[0][0]]
    if other:
        raise UserError(
            f"{what}: not the same in all {world_size()} processes: {', '.join(other[:4])} read something else "
            "than process 0; give every host the same files"
        )


def is_told() -> bool:
    """Whether an error is another process's to tell: the first to fail tells, the others fail in its wake."""
    if world_size() == 1:
        return False
    with suppress(Exception):  # the first process keeps the note; when it is gone, each may tell
        store = distributed.distributed_c10d._get_default_store()
        return int(store.add("golden-layers-failed", 1)) > 1
    return False


def end(code: int = 1, told: bool = False) -> None:
    """End this process, of several, and those that it has started; others see that its connections have ended.

    Where another process tells of the failure, it is given the time to.
    """
    if world_size() == 1:
        return
    waiting = time.monotonic() + GRACE if told else 0.0
    while time.monotonic() < waiting and all(process.poll() is None for process in _started):
        time.sleep(0.1)
    for process in _started:
        with suppress(OSError):
            process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what else would be done at the end waits for processes that have failed, too
