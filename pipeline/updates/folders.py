"""Versions on disk: a folder each, written whole or not at all.

    versions/0004/  update.safetensors  update.json  state.safetensors  golden_profile.json  metrics.json

`update.*` are a WeightUpdate's files: the base model and one read give the version, whatever went before it. The
database knows the SHA-256 of every file. Version 0, the base model, is an empty folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import file_digest

BASE = 0
VERSIONS, METRICS = "versions", "metrics.json"


def version_folder(store: Path, number: int) -> Path:
    """The folder of a version."""
    return store / VERSIONS / f"{number:04d}"


def write_version(store: Path, number: int, fill: Callable[[Path], Any]) -> dict[str, str]:
    """Let `fill` write a version's folder, whole or not at all; returns its files' SHA-256 by name."""
    folder = version_folder(store, number)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        digests = digests_of(partial)
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        partial.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digests


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of all files in a folder, however deep, by name."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): file_digest(path) for path in paths}


def _to_disk(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_unfinished(store: Path, newest: int) -> None:
    """Remove folders that no version is known for: what an update that did not end well was writing."""
    for path in (store / VERSIONS).iterdir():
        if path.name.endswith(".partial") or (path.name.isdecimal() and int(path.name) > newest):
            shutil.rmtree(path, ignore_errors=True)


def read_metrics(store: Path, number: int) -> dict[str, Any]:
    """A version's figures; UserError when they are missing or cannot be read."""
    file = version_folder(store, number) / METRICS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"version: {file}: cannot be read ({error})") from None
