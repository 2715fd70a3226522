"""Files that are written whole or not at all, and folders for what is kept or in progress."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def write_whole(path: Path, write: Callable[[Path], Any], mark: str = "") -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there; `mark` makes its name one's own."""
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_shared(path: Path, write: Callable[[Path], Any]) -> Path:
    """As `write_whole`, where several commands may write the same file at once: the last one stays, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, write, f".{os.getpid()}")


def write_text(path: Path, text: str) -> Path:
    """Write text, whole or not at all."""
    return write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def file_digest(path: Path) -> str:
    """A file's SHA-256, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*content: object) -> str:
    """A name for what something depends on: 24 hexadecimal digits of the texts of all of it."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


def require_room(folder: Path, size: int) -> None:
    """Raise UserError when fewer than `size` bytes are free where `folder` is or will be."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"output: {folder}: needs {size / 1e6:.0f} MB; {free / 1e6:.0f} MB are free on the disk")


def cache_folder(named: str | None) -> Path:
    """The folder for what is found once and kept: as named, or golden-layers in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(named) if named else home / "golden-layers"
