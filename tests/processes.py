"""Commands of run.py on several processes, on CPU, with gloo: what tests of many devices share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from programs import RUN, TIMEOUT, Program

from pipeline.cli import main

IN_TURN = Path(__file__).parent / "in_turn.py"
CPU = ("--trainer.accelerator", "cpu")


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
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}  # its own: what one process has kept would be taken up
    port, words = free_port(), (IN_TURN, folder / "commands.json")
    with ExitStack() as stack:
        own = [cache | of_rank(rank, number, port) for rank in range(number)]
        started = [stack.enter_context(Program(*words, folder=folder, environment=one)) for one in own]
        ended = [one.finished() for one in started]
    assert [one.returncode for one in ended] == [0] * number, [one.stderr for one in ended]
    assert sum(one.stdout.count("written to") for one in ended) == len(several)
    for name, words in commands.items():
        assert main([*words, *CPU, "--output", str(folder / name / "one")]) == 0
    for expected, found in pairs.values():
        assert kinds(found) == kinds(expected)  # written once: no second events file, nothing of other processes
    return pairs


def of_rank(rank: int, number: int, port: int) -> dict[str, str]:
    """What torchrun tells one of so many processes of a host."""
    told = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 1}
    return {name: str(value) for name, value in told.items()}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.partition(".out.")[0] for path in folder.iterdir())


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


LOGIC = ["--trainer.precision", "64-true"]  # what is left is the logic, not the rounding
