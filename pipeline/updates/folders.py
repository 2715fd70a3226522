"""Versions on disk: a folder each, written whole, with a manifest that finds a changed byte before it is loaded.

    versions/0004/  update.safetensors  update.json  state.safetensors  golden_profile.json  metrics.json
                    manifest.json

`update.*` are a WeightUpdate's files: the base model and one read give the version, whatever went before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as tensors_from_bytes

from pipeline.editing.update import TENSORS_FILE, WeightUpdate
from pipeline.errors import UserError
from pipeline.files import file_digest

BASE = 0
VERSIONS, MANIFEST = "versions", "manifest.json"
CHANGED = "changed since it was written (SHA-256 differs)"
NAME = re.compile(r"\d{4,9}")
PART = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
FileName = Annotated[str, Field(pattern=f"^{PART}(/{PART})?$")]  # no name leads out of the folder


class Manifest(BaseModel):
    """What a version's folder holds, and what it is.

    Attributes:
        version, parent: its number and that of the version it was made on.
        model, fingerprint: the base model; the fingerprint of version 0 is not known when it is made.
        files: SHA-256 of every other file, by its name in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    parent: int | None
    model: str
    fingerprint: str
    files: dict[FileName, str] = {}


def version_folder(store: Path, number: int) -> Path:
    """The folder of a version."""
    return store / VERSIONS / f"{number:04d}"


def write_version(store: Path, manifest: Manifest, fill: Callable[[Path], Any] = lambda _: None) -> str:
    """Write a version's folder, whole or not at all; returns its manifest's SHA-256.

    Args:
        store: the store's folder.
        manifest: all but `files`.
        fill: writes the files into the folder that it is given.
    """
    folder = version_folder(store, manifest.version)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        files = {name: file_digest(partial / name) for name in _files(partial)}
        body = manifest.model_copy(update={"files": files}).model_dump_json(indent=1)
        (partial / MANIFEST).write_text(f"{text_digest(body)}\n{body}\n", encoding="utf-8")
        digest = file_digest(partial / MANIFEST)
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        partial.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def _files(folder: Path) -> list[str]:
    """The names of all files in a folder, however deep."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


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
        if path.name.endswith(".partial") or (NAME.fullmatch(path.name) and int(path.name) > newest):
            shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """A version's manifest.

    Raises:
        UserError: when there is none, or it was changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"version: {folder}: holds no {MANIFEST}")
    digest, _, body = file.read_bytes().decode(errors="replace").partition("\n")
    if text_digest(body.removesuffix("\n")) != digest:
        raise UserError(f"version: {file}: {CHANGED}")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError:
        raise UserError(f"version: {file}: of a layout that this program does not know") from None
    if folder.name != f"{manifest.version:04d}":
        raise UserError(f"version: {folder}: its manifest is that of version {manifest.version}")
    return manifest


def read_file(folder: Path, name: str) -> bytes:
    """A version's file, whose bytes are those that the manifest knows.

    Raises:
        UserError: when the file or the manifest is missing or changed.
    """
    path, known = folder / name, read_manifest(folder).files
    if not path.is_file() or path.is_symlink():
        raise UserError(f"version: {path}: missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != known.get(name):
        raise UserError(f"version: {path}: {CHANGED}")
    return content


def check_version(store: Path, number: int, digest: str) -> None:
    """See that all of a version's files are as they were written.

    Args:
        store: the store's folder.
        number: the version.
        digest: the manifest's SHA-256, as the database knows it.

    Raises:
        UserError: naming what is missing, changed or there in excess.
    """
    folder = version_folder(store, number)
    known = read_manifest(folder).files
    if file_digest(folder / MANIFEST) != digest:
        raise UserError(f"version: {folder / MANIFEST}: not the one that the database knows (SHA-256 differs)")
    for name in known:
        read_file(folder, name)
    if strange := [name for name in _files(folder) if name not in (*known, MANIFEST)]:
        raise UserError(f"version: {folder / strange[0]}: not of this version")


def load_version(store: Path, number: int, digest: str) -> WeightUpdate | None:
    """A version, checked, as the update of the base model that it is; None for the base itself."""
    check_version(store, number, digest)
    return WeightUpdate.load(version_folder(store, number)) if number != BASE else None


def load_weights(store: Path, number: int) -> WeightUpdate | None:
    """As `load_version` without what later edits need; the database and the other files are not looked at."""
    folder = version_folder(store, number)
    manifest = read_manifest(folder)
    if number == BASE:
        return None
    tensors = tensors_from_bytes(read_file(folder, TENSORS_FILE))
    return WeightUpdate(manifest.model, manifest.fingerprint, "version", [], tensors)


def read_metrics(store: Path, number: int) -> dict[str, Any]:
    """A version's figures; UserError when they are missing or changed."""
    return dict(json.loads(read_file(version_folder(store, number), "metrics.json")))


def text_digest(text: str) -> str:
    """A text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()
