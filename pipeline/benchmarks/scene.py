"""A store to be ill-treated, and children that work on it.

Children are forked from a process that has the model loaded, so that a kill costs milliseconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.model import LLM
from pipeline.options import UpdateCommand
from pipeline.requests import EditRequest
from pipeline.updates import BusyError, Store, update

FINE, REFUSED, BUSY, FAULT = 0, 1, 3, 4


@dataclass
class Scene:
    """A store with its model, and requests dealt out into files of a few.

    Attributes:
        llm: the base model.
        options: how updates are made; `options.store` is the store's folder.
        files: request files.
        each: how many requests a file holds.
    """

    llm: LLM
    options: UpdateCommand
    files: list[Path]
    each: int

    @classmethod
    def made(
        cls, llm: LLM, options: UpdateCommand, requests: Sequence[EditRequest], each: int, folder: Path
    ) -> Scene:
        """Deal requests out into files in a folder, and make the store."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for start in range(0, len(requests) - each + 1, each):
            part = requests[start : start + each]
            lines = "".join(one.model_dump_json(exclude_defaults=True) + "\n" for one in part)
            files.append(write_text(folder / f"requests-{start}.jsonl", lines))
        Store(options.store, llm.name, make=True).close()
        return cls(llm, options, files, each)

    def open(self) -> Store:
        """The store, opened anew."""
        return Store(self.options.store)

    def update(self, store: Store) -> None:
        """Work through everything that is due."""
        update(store, self.options, lambda _: self.llm)


def forked(work: Callable[[], None]) -> int:
    """Run something in a child; returns its process number. The child ends with FINE, REFUSED, BUSY or FAULT."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = FAULT
    try:
        torch.set_num_threads(1)  # threads do not live through a fork
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            work()
        code = FINE
    except BusyError:
        code = BUSY
    except (UserError, OSError):
        code = REFUSED
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
