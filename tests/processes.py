"""Commands of run.py on several processes, on CPU, with gloo: what tests of many devices share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cli import main

RUN = Path(__file__).parent.parent / "run.py"
IN_TURN = Path(__file__).parent / "in_turn.py"
CPU = ("--trainer.accelerator", "cpu")
TIMEOUT = 180  # seconds: processes that wait for each other wait for ever


def processes(
    *words: str, strategy: str = "ddp", number: int = 2, cache: Path | None = None, program: Path = RUN
) -> subprocess.CompletedProcess[str]:
    """Run a command on several processes, of which none outlives it; in a `cache` of their own, if one is named."""
    on = [*CPU, "--trainer.devices", str(number), "--trainer.strategy", strategy]
    return in_group(str(program), *words, *on, cache=cache)


def in_group(*words: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, and let nothing that it starts outlive it."""
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUN.parent)}
        | ({"XDG_CACHE_HOME": str(cache)} if cache else {}),
    ) as started:  # fmt: skip
        try:
            told, failed = started.communicate(timeout=TIMEOUT)
        finally:
            end_group(started.pid)
    return subprocess.CompletedProcess(words, started.returncode, told, failed)


def end_group(group: int) -> None:
    """Kill what is left of a group of processes."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def in_both_ways(
    folder: Path, commands: Mapping[str, Sequence[str]], strategies: Sequence[str] = ("ddp",), number: int = 2
) -> dict[str, tuple[Path, Path]]:
    """The output folders that one process wrote and that several wrote, which ran all commands in turn.

    Args:
        folder: takes all of them.
        commands: their words, by a name of one's own, which is that of their folders.
        strategies: of the several: each command is run under each.
        number: how many they are.

    Returns:
        both folders, by command and strategy.
    """
    pairs = {
        f"{name}, {strategy}": (folder / name / "one", folder / name / strategy)
        for name in commands
        for strategy in strategies
    }
    on = [*CPU, "--trainer.devices", str(number), "--trainer.strategy"]
    several = [
        [*words, *on, strategy, "--output", str(folder / name / strategy)]
        for name, words in commands.items()
        for strategy in strategies
    ]
    (folder / "commands.json").write_text(json.dumps(several))
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    cache = folder / "cache"  # its own: statistics of one process would hide what several make of them
    told = in_group(*agent, str(IN_TURN), str(folder / "commands.json"), cache=cache)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("written to") == len(several)
    for name, words in commands.items():
        assert main([*words, *CPU, "--output", str(folder / name / "one")]) == 0
    for expected, found in pairs.values():
        assert kinds(found) == kinds(expected)  # written once: no second events file, nothing of other processes
    return pairs


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.partition(".out.")[0] for path in folder.iterdir())


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


LOGIC = ["--trainer.precision", "64-true"]  # what is left is the logic, not the rounding
