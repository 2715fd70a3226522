"""A command on several devices of a host: started and watched by torchrun's own agent.

The agent runs in the process that the user started, which runs no part of the command itself. When any of the
command's processes fails or dies, the agent ends the others, and one line says why. On several hosts the user
starts `torchrun` (or `srun`) on each, whose agents do the same. What is imported here brings no torch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.output import STARTED, is_one_of_several, started

SUPERVISED = "GOLDEN_LAYERS_SUPERVISED"  # the environment variable of processes whose failures the agent tells
ENDING_SECONDS = 60  # that a process has to end the batch at work after a signal,
ENDING_UPDATE_SECONDS = 3600  # and an update of a store
PROCESSES_A_CORE = 2  # at most
IN_ITS_WAKE = "another process of this command has ended"


def may_start_others(options: Any) -> bool:
    """Whether a command's options may ask for several processes of this host, which nobody has started."""
    trainer = options.trainer
    alone = str(trainer.devices) == "1" or (trainer.accelerator == "cpu" and trainer.devices == "auto")
    return not alone and not is_one_of_several() and getattr(options, "model", None) != ""


def supervise(words: Sequence[str], devices: int, options: Any) -> int:
    """Run the command of these words on so many devices of this host, a process each; its exit code.

    UserError for several hosts, on each of which the command must be started, or processes that would stand in each
    other's way.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if options.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes: {options.trainer.num_nodes} hosts: start the command on each, by torchrun or srun"
        )
    cores = os.cpu_count() or 1
    if devices > PROCESSES_A_CORE * cores:
        most = PROCESSES_A_CORE * cores
        raise UserError(
            f"trainer.devices: {devices} processes; the {cores} cores of this machine run {most} at most"
        )
    for name in logging.root.manager.loggerDict:  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    own = {SUPERVISED: "1", STARTED: started()}
    os.environ |= {"OMP_NUM_THREADS": str(max(1, cores // devices))} | own | os.environ
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="golden-layers",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=ENDING_UPDATE_SECONDS if hasattr(options, "store") else ENDING_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(sys.argv[0], *words)
    except SignalException as signalled:
        print(of_interrupt(signalled.sigval), file=sys.stderr)
        return 128 + signalled.sigval
    except ChildFailedError as failed:
        return _tell(failed)
    finally:
        os.environ.pop(SUPERVISED, None)
    return 0


def beside(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command as one process of its own, beside those that this one belongs to."""
    of_group = re.compile(r"RANK$|WORLD_SIZE$|^MASTER_|^TORCHELASTIC_|^GROUP_|^ROLE_|^SLURM_|^GOLDEN_LAYERS_SUP")
    environment = {name: value for name, value in os.environ.items() if not of_group.search(name)}
    return subprocess.Popen([sys.executable, sys.argv[0], *words], env=environment)


def of_interrupt(number: int | None) -> str:
    """What is said of a command that a signal ended."""
    return "interrupted by SIGTERM" if number == signal.SIGTERM else "interrupted"


def leave(code: int, line: str) -> int:
    """Say why a command ends; its exit code. One of several processes ends at once, and its agent has the word."""
    if SUPERVISED in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(UserError(line))
    else:
        print(line, file=sys.stderr)
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what else would be done at the end waits for processes that have failed, too
    return code


def _tell(failed: Any) -> int:
    """Print why the first process failed that did not fail in another's wake; its exit code."""
    failures = sorted(failed.failures.items(), key=lambda one: one[1].timestamp)
    for rank, failure in failures:
        told = failure.message  # what the process has recorded, or what its agent says of it
        line = str(told["message"] if isinstance(told, dict) else told).removeprefix("UserError: ")
        if failure.exitcode < 0:
            line = f"error: trainer: process {rank} has ended ({failure.signal_name()})"
        if IN_ITS_WAKE not in line and failure.exitcode not in (-signal.SIGTERM, 128 + signal.SIGTERM):
            break
    print(line, file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 1
