"""Files that are written whole or not at all, and output folders that never hide a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError

OPTIONS_FILE = "options.yaml"  # written first into every output folder: it marks the folder as ours


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there."""
    partial = path.with_name(f".{path.name}.partial")
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


def require_room(folder: Path, size: int) -> None:
    """Raise UserError when fewer than `size` bytes are free where `folder` is or will be."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"output: {folder}: needs {size / 1e6:.0f} MB; {free / 1e6:.0f} MB are free on the disk")


def default_output(command: str) -> Path:
    """A new folder under runs/, named by command and time."""
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError when `folder` cannot become the output folder; touches nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder}: a file; expected a folder's name")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"output: {folder}: holds something already; name another folder or pass --overwrite")
        if Path.cwd().is_relative_to(folder.resolve()):
            raise UserError(f"output: {folder}: the working folder lies in it; start from outside to replace it")
        if not (folder / OPTIONS_FILE).is_file():
            raise UserError(f"output: {folder}: was not written by this program; --overwrite leaves it alone")


class OutputFolder:
    """A command's output folder while it works: its path, and what to do with it on an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: set[str] = set()  # files that are whole and worth more than a clean disk


@contextmanager
def output_folder(output: OutputFolder, overwrite: bool, options: str) -> Iterator[None]:
    """The folder a command writes to, on rank zero; on an error only what is `finished` stays in it.

    What an overwritten folder held comes back when the command fails, and goes when it succeeds.

    Args:
        output: the folder, to be made with its parents.
        overwrite: whether what an earlier command wrote may be replaced.
        options: the resolved options, saved first.

    Raises:
        UserError: when the folder holds something and may not be overwritten.
    """
    path = output.path.resolve() if output.path.is_symlink() else output.path
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    check_output(path, overwrite)
    existed = path.is_dir()
    replaced = path.with_name(f".{path.name}.replaced") if path.is_dir() and any(path.iterdir()) else None
    if replaced:
        if replaced.exists():
            raise UserError(f"output: {replaced}: left by a command that was killed; move it back or remove it")
        path.rename(replaced)
    made = [parent for parent in [path, *path.parents] if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / OPTIONS_FILE, options)
        yield
    except BaseException:
        if output.finished and not replaced:
            for file in path.iterdir():
                if file.name not in output.finished | {OPTIONS_FILE}:
                    file.unlink()
            raise
        shutil.rmtree(path, ignore_errors=True)
        for parent in made[1:]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if replaced:
            replaced.rename(path)
        elif existed:
            path.mkdir()
        raise
    if replaced:
        shutil.rmtree(replaced)
