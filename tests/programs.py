"""Python programs that start in a moment: forked from a process that has imported what they need, once for all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Self

FORKING = multiprocessing.get_context("forkserver")
SAID = ("out", "err")
HERE = Path(__file__).parent
RUN = HERE.parent / "run.py"
TIMEOUT = 180  # seconds: processes that wait for each other wait for ever
IMPORTED = (  # what commands import as they come to it
    *("programs", "pipeline.commands", "pipeline.update_commands", "pipeline.editing.lora", "matplotlib.pyplot"),
    *("torch.distributed.fsdp", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"),
)


class Program:
    """A program in a process, and a group, of its own; after the `with` nothing that it started is left.

    Args:
        words: its file and its command line.
        folder: its working folder.
        environment: its variables, beside those of the tests.
        before: called in it first; it is sent there, and so are functions of this file.
    """

    def __init__(
        self,
        *words: str | Path,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], Any] | None = None,
    ) -> None:
        start_server()
        self.words, self._said = [*map(str, words)], Path(tempfile.mkdtemp())
        whole = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
        self._process = FORKING.Process(target=_become, args=(self.words, folder, whole, self._said, before))
        self._process.start()

    def send_signal(self, number: int) -> None:
        assert self._process.pid
        os.kill(self._process.pid, number)

    def finished(self, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """How it ended and what it said, once it has."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"{self.words} has not ended after {timeout} s"
        return subprocess.CompletedProcess(self.words, code, *[(self._said / name).read_text() for name in SAID])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        shutil.rmtree(self._said)


def ran(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """How a program ended, and what it said."""
    with Program(*words, **how) as program:
        return program.finished()


def wait_for(condition: Callable[[], Any]) -> None:
    """Until it is so, a minute and a half at most."""
    until = time.monotonic() + 90
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)


def small_files(most: int) -> None:
    """Let no file be written of more bytes than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def at_terminal(name: str) -> None:
    """Let a terminal be the program's own; there, each token of an answer takes a moment."""
    from pipeline.serving.asked import Asked

    number = os.open(name, os.O_RDWR)  # of a process that leads its session: it becomes the controlling one
    os.dup2(number, 0)
    os.dup2(number, 1)
    sys.stdin, sys.stdout = (os.fdopen(at, mode, closefd=False) for at, mode in ((0, "r"), (1, "w")))
    take = Asked.take
    Asked.take = lambda *how: (time.sleep(0.1), take(*how))[1]  # type: ignore[method-assign]


def start_server() -> None:
    """Start the process that programs are forked from, unless it runs; it ends with the tests."""
    FORKING.set_forkserver_preload([*IMPORTED])
    own = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if own is None else os.environ.update(PYTHONPATH=own)


def _become(
    words: list[str], folder: Path, environment: dict[str, str], said: Path, before: Callable[[], Any] | None
) -> None:
    """Be a program that was just started."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, number in zip(SAID, (1, 2), strict=True):
        with (said / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv[:] = words
    if before:
        before()
    runpy.run_path(words[0], run_name="__main__")
