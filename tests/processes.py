"""Commands of run.py on several processes, on CPU, with gloo: what tests of many devices share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cli import main

RUN = Path(__file__).parent.parent / "run.py"
CPU = ("--trainer.accelerator", "cpu")
TIMEOUT = 180  # seconds: processes that wait for each other wait for ever


def processes(
    *words: str, strategy: str = "ddp", number: int = 2, cache: Path | None = None, program: Path = RUN
) -> subprocess.CompletedProcess[str]:
    """Run a command on several processes, of which none outlives it; in a `cache` of their own, if one is named."""
    command = [sys.executable, str(program), *words, *CPU]
    command += ["--trainer.devices", str(number), "--trainer.strategy", strategy]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUN.parent)}
        | ({"XDG_CACHE_HOME": str(cache)} if cache else {}),
    ) as started:  # fmt: skip
        try:
            told, failed = started.communicate(timeout=TIMEOUT)
        finally:
            end_group(started.pid)
    return subprocess.CompletedProcess(command, started.returncode, told, failed)


def end_group(group: int) -> None:
    """Kill what is left of a group of processes."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def in_both_ways(folder: Path, *words: str, strategy: str = "ddp", number: int = 2) -> tuple[Path, Path]:
    """The output folders of a command that one process ran and that several ran."""
    one, several = folder / "one", folder / "several"
    if not one.exists():
        assert main([*words, *CPU, "--output", str(one)]) == 0
    cache = folder / "cache"  # its own: statistics of one process would hide what several make of them
    told = processes(*words, "--output", str(several), strategy=strategy, number=number, cache=cache)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("written to") == 1
    assert kinds(several) == kinds(one)  # written once: no second events file, nothing of the other processes
    return one, several


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.partition(".out.")[0] for path in folder.iterdir())


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


LOGIC = ["--trainer.precision", "64-true"]  # what is left is the logic, not the rounding
