"""Requests written as our own JSONL, which every command reads back as they were."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.requests.schema import EditRequest


@contextmanager
def request_writer(path: Path | None, packed: bool = False) -> Iterator[Callable[[EditRequest], object] | None]:
    """What writes a request a line into a file, gzipped where asked for; nothing without a file."""
    if path is None:
        yield None
        return
    with gzip.open(path, "wb") if packed else path.open("wb") as file:
        yield lambda request: file.write(request.model_dump_json(exclude_defaults=True).encode() + b"\n")


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UserError when requests cannot be written there; touches nothing."""
    if path.is_dir():
        raise UserError(f"to: {path}: a folder; expected a file's name")
    if path.exists() and not overwrite:
        raise UserError(f"to: {path}: exists already; name another file or pass --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"to: {path}: there is no folder {path.parent}")
