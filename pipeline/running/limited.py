"""A program of somebody else's, such as a chat template: run in a process of its own, which ends in time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS, MEMORY = 10.0, 1 << 30  # that it may take; bytes, on top of what this process has
LONGEST = 1 << 20  # characters that it may give


def limited(work: Callable[[], list[str]]) -> list[str]:
    """What `work` gives; RuntimeError when it fails, says too much, or takes too long or too much memory."""
    forking = get_context("fork")
    answer, mouth = forking.Pipe(duplex=False)
    process = forking.Process(target=_work, args=(work, mouth), daemon=True)
    process.start()
    mouth.close()
    try:
        if not answer.poll(SECONDS):
            raise RuntimeError(f"it did not end within {SECONDS:g} seconds")
        texts, failed = answer.recv()
    except EOFError:
        raise RuntimeError("it ended its process") from None
    finally:
        process.kill()
        process.join()
        answer.close()
    if failed:
        raise RuntimeError(failed)
    return texts


def _work(work: Callable[[], list[str]], mouth: Connection) -> None:
    with suppress(OSError, ValueError):  # where the system does not tell, time is the limit
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    try:
        texts = work()
        said = sum(map(len, texts))
        mouth.send((texts, "") if said <= LONGEST else ([], f"it says {said:,} characters"))
    except Exception as error:
        mouth.send(([], f"{type(error).__name__}: {error}"[:LONGEST]))
