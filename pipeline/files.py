"""Files that are written whole or not at all, read with distrust, and what is kept of earlier commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import DEEPEST, UserError, note

LARGEST = 250_000_000  # bytes of a text file that is read whole


def write_whole(path: Path, write: Callable[[Path], Any], shared: bool = False) -> Path:
    """Let `write` fill a file beside `path`, then move it there; several may write a `shared` one at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


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


def read_text_file(path: Path, largest: int = LARGEST) -> str:
    """A UTF-8 file of somebody else's; ValueError when it is larger than anybody means, or no UTF-8."""
    if path.stat().st_size > largest:
        raise ValueError(f"larger than {largest / 1e6:.0f} MB")
    return path.read_text(encoding="utf-8")


def read_plain_text(flag: str, file: str | Path) -> str:
    """A user's own text; UserError, which names the flag, when there is none, or it is not UTF-8."""
    if not Path(file).is_file():
        raise UserError(f"{flag}: {file}: no such file; expected plain UTF-8 text")
    try:
        return read_text_file(Path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {file}: cannot be read; expected plain UTF-8 text ({error})") from None


def parse_json(text: str | bytes) -> Any:
    """What JSON says; ValueError when it is malformed, or nested deeper than anything that is meant."""
    with suppress(RecursionError):
        level: list[Any] = [[value := json.loads(text)]]
        for _ in range(DEEPEST + 1):
            within = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
            level = [one for one in within if isinstance(one, dict | list)]
            if not level:
                return value
    raise ValueError(f"nested more than {DEEPEST} deep")


def cached(name: str) -> Path | None:
    """Where in the user's cache folder something is kept that is found once; None where there is no such folder.

    The folder is golden-layers in XDG_CACHE_HOME, which counts where it is absolute, or in the home's .cache.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        note("cache: there is no home folder, so nothing is kept; XDG_CACHE_HOME can name a folder")
        return None
    return folder / "golden-layers" / name


def unusable(file: Path, error: OSError) -> None:
    """Tell that something cannot be kept, which costs the next command time, and this one nothing."""
    note(f"cache: {file.parent}: cannot be used ({error.strerror}); XDG_CACHE_HOME can name another folder")


def write_sealed(file: Path | None, about: dict[str, Any], content: bytes) -> None:
    """Keep something with its SHA-256 and what it is about; where it cannot be kept, that is told."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda partial: partial.write_bytes(_seal(about, content) + b"\n" + content), shared=True)
    except OSError as error:
        unusable(file, error)


def read_sealed(file: Path | None, about: dict[str, Any]) -> bytes | None:
    """What `write_sealed` has kept; None where there is nothing, or, which is told, something else or damaged."""
    if file is None:
        return None
    try:
        head, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        unusable(file, error)
        return None
    if head == _seal(about, content):
        return content
    note(f"cache: {file}: damaged or of something else; it is made anew")
    return None


def _seal(about: dict[str, Any], content: bytes) -> bytes:
    digest = hashlib.sha256(json.dumps(about).encode() + b"\n" + content).hexdigest()
    return json.dumps({"sha256": digest, **about}).encode()
