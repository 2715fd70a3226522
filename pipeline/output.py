"""A command's output folder: never half-written, never over something else, gone on with where asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without torch

from pipeline.errors import UserError, one_line
from pipeline.files import read_text_file, write_text
from pipeline.options.base import LARGEST_YAML, read_yaml

OPTIONS_FILE = "options.yaml"  # written first into every output folder: it marks the folder as ours
STARTED = "GOLDEN_LAYERS_STARTED"  # the environment variable that tells a command's processes when it began
NOT_RESUMED = {"output", "overwrite", "resume", "verbose"}  # options that a resumed command may change


def is_one_of_several() -> bool:
    """Whether this command's own agent, torchrun or SLURM has started this process beside others."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def started() -> str:
    """When this command began, as its default output folder says it; its processes say the same."""
    return os.environ.setdefault(STARTED, f"{datetime.now():%Y%m%d-%H%M%S}")


def check_resumed(folder: Path, options: dict[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise UserError unless `folder` holds what a command left whose options differ in those named at most."""
    file = folder / OPTIONS_FILE
    if not file.is_file():
        raise UserError(f"resume: {folder}: holds no {OPTIONS_FILE}; expected an interrupted command's --output")
    given = yaml.safe_load(yaml.safe_dump(options))
    try:
        started = dict(read_yaml(read_text_file(file, LARGEST_YAML)))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"resume: {file}: cannot be read ({one_line(error)})") from None
    names = sorted({*started, *given} - NOT_RESUMED - {*may_change})
    if changed := [name for name in names if started.get(name) != given.get(name)]:
        raise UserError(f"resume: {folder}: was started with another {', '.join(changed)}; give the same options")


def is_fresh(folder: Path) -> bool:
    """Whether a folder holds nothing, or does not exist; a file that a kill has cut off is nothing."""
    return not folder.exists() or (folder.is_dir() and all(at.suffix == ".partial" for at in folder.iterdir()))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError when `folder` cannot become the output folder; touches nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder}: a file; expected a folder's name")
    if not is_fresh(folder):
        if not overwrite:
            raise UserError(f"output: {folder}: holds something already; name another folder or pass --overwrite")
        if Path.cwd().is_relative_to(folder.resolve()):
            raise UserError(f"output: {folder}: the working folder lies in it; start from outside to replace it")
        if not (folder / OPTIONS_FILE).is_file():
            raise UserError(f"output: {folder}: was not written by this program; --overwrite leaves it alone")


class OutputFolder:
    """A command's output folder while it works: its path, and what to do with it on an error."""

    def __init__(self, path: Path, resumed: bool = False, may_change: Collection[str] = ()) -> None:
        self.path = path
        self.resumed = resumed  # whether the command goes on with what one before it left
        self.may_change = may_change  # options that a resumed command may be given anew
        self.finished: set[str] = set()  # files in it that are whole and worth more than a clean disk
        self.unfinished = path / "unfinished"  # in progress, left by an interrupted command for `--resume`

    @rank_zero_only
    def drop_unfinished(self, stage: str = "") -> None:
        """What was in progress is finished: all of it, or one stage's part."""
        shutil.rmtree(self.unfinished / stage, ignore_errors=True)

    @property
    def goes_on(self) -> bool:
        """Whether there is work in progress worth keeping."""
        return any(file.is_file() for file in self.unfinished.rglob("*"))

    @property
    def kept(self) -> set[str]:
        """What in it is worth more than a clean disk, by name: nothing, or that and the options."""
        going_on = [OPTIONS_FILE, *(file.name for file in self.path.glob("events.*"))] if self.goes_on else []
        names = {*going_on, *(name for name in self.finished if (self.path / name).exists())}
        return names | {OPTIONS_FILE} if names else names


@contextmanager
def output_folder(output: OutputFolder, overwrite: bool, options: dict[str, Any]) -> Iterator[None]:
    """The folder a command writes to, on rank zero; on an error only what is `finished` stays in it.

    An interrupt leaves the work in progress as well. What an overwritten folder held comes back when the command
    fails, and goes when it succeeds.
    UserError when the folder holds something and may not be overwritten, or is not what can be gone on with.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    path = output.path.resolve() if output.path.is_symlink() else output.path
    if output.resumed:
        check_resumed(path, options, output.may_change)
    else:
        check_output(path, overwrite)
    replaced = None if output.resumed or is_fresh(path) else _set_aside(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        saved = options | ({"resume": False} if "resume" in options else {})  # as the first command's
        write_text(path / OPTIONS_FILE, yaml.safe_dump(saved, sort_keys=False))
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not output.goes_on:
            output.drop_unfinished()  # it led to the error, or is none
        _clear(path, set() if replaced else output.kept)
        for folder in made:
            with suppress(OSError):  # it is not empty, or could not be made
                folder.rmdir()
        if replaced:
            replaced.rename(path)
        raise
    output.drop_unfinished()
    if replaced:
        shutil.rmtree(replaced)


def _set_aside(path: Path) -> Path:
    """Move away what is to be overwritten, until it is known what becomes of it; where to."""
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.exists():
        raise UserError(f"output: {replaced}: left by a command that was killed; move it back or remove it")
    path.rename(replaced)
    return replaced


def _clear(path: Path, kept: set[str]) -> None:
    """Remove the files of a folder but those that are kept; where none is, its folders too."""
    for file in path.iterdir() if path.is_dir() else ():
        if file.is_dir() and not kept:
            shutil.rmtree(file, ignore_errors=True)
        elif file.is_file() and file.name not in kept:
            file.unlink()
