"""What versions that build on each other have learnt, kept once: a file each, which goes on from the one before it.

    learnt/0004.safetensors   the requests and columns that version 4 learnt, and which of earlier ones it left out

Each names the file before it by its SHA-256, so that a version's own digest vouches for all of them. What a version
holds is gathered from the newest on. One that earlier versions make up less than half of stands alone: what is read
stays in proportion to what is held, and what is written to what is learnt.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor

from pipeline.editing.columns import columns_in, gathered_columns, learnt_columns, owner
from pipeline.editing.tensors import read_tensors
from pipeline.errors import UserError, one_line
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about

if TYPE_CHECKING:
    from pipeline.editing.update import WeightUpdate

FILE = r"\d{4,9}\.safetensors"


class About(BaseModel, frozen=True, extra="forbid"):
    """What stands in a file beside its columns."""

    # name and SHA-256 of the file that it goes on from; None where it stands alone
    before: tuple[Annotated[str, Field(pattern=f"^{FILE}$")], str] | None
    entries: NonNegativeInt  # how many requests were learnt or left out since the last that stands alone
    requests: list[dict[str, Any]]  # what was learnt, in this order
    gone: list[str]  # ids of requests before it that are no longer held


class Kept(NamedTuple):
    """Where it is kept what an update has learnt: the newest file's name and SHA-256, and its `entries`."""

    name: str
    sha256: str
    entries: int


class Part(NamedTuple):
    """What a file holds, and its SHA-256 where it was read from one."""

    about: About
    columns: dict[str, Tensor]
    sha256: str = ""


def parts(file: Path, sha256: str, known: Container[str] = ()) -> Iterator[Part]:
    """What is in a file and in those before it, the newest first, up to one whose SHA-256 is known.

    UserError when one is missing, damaged, or not what the one after it says.
    """
    before: tuple[str, str] | None = (file.name, sha256)
    while before and before[1] not in known:
        file = file.with_name(before[0])
        columns, about = read_tensors(file, before[1])
        try:
            part = Part(About.model_validate_json(about), columns, before[1])
        except ValidationError as error:
            raise UserError(f"update: {file}: damaged: {one_line(error)}") from None
        yield part
        before = part.about.before


def gathered(newest_first: Iterable[Part]) -> tuple[list[EditRequest], dict[str, Tensor]]:
    """All requests and columns that are held after the newest part; UserError when they do not belong together."""
    requests: list[dict[str, Any]] = []
    gone: set[str] = set()
    columns: list[dict[str, Tensor]] = []
    for part in newest_first:
        requests += [one for one in reversed(part.about.requests) if str(one.get("id")) not in gone]
        gone.update(part.about.gone)
        columns.append(part.columns)
    held = [EditRequest.model_validate(one) for one in reversed(requests)]
    try:
        return held, gathered_columns(columns)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(f"update: what was learnt does not belong together ({type(error).__name__})") from None


def next_part(update: WeightUpdate, base: WeightUpdate | None) -> Part:
    """What an update has learnt beyond the one that it was made on, as that is kept."""
    if base and base.kept:
        held, own = set(update.requests), columns_in(update.state)
        left, gone = ([one for one in base.requests if (one in held) == side] for side in (True, False))
        added, entries = update.requests[len(left) :], base.kept.entries + len(gone)
        subjects = {about(one) for one in [*added, *gone]}  # facts about one are found together
        found_anew = [owner(one) for one in update.requests if about(one) in subjects]
        columns = learnt_columns(base.state, update.state, found_anew)
        found = gathered_columns([columns, columns_in(base.state)])
        same = [*left, *added] == update.requests and found.keys() == own.keys()
        same = same and all(torch.equal(tensor, found[name]) for name, tensor in own.items())
        if same and entries + len(added) <= 2 * len(update.requests):
            before, left_out = base.kept[:2], [one.id for one in gone]
            about_it = About(before=before, entries=entries + len(added), requests=_written(added), gone=left_out)
            return Part(about_it, columns)
    requests = update.requests
    alone = About(before=None, entries=len(requests), requests=_written(requests), gone=[])
    return Part(alone, columns_in(update.state))


def _written(requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    return [one.model_dump(exclude_defaults=True) for one in requests]
