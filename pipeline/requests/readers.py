"""Edit requests of a file, data set or the demo: its records, one after another, each read by its layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, check_at_least
from pipeline.requests.conflicts import fact
from pipeline.requests.layouts import Layout, find_layout, to_request
from pipeline.requests.schema import EditRequest
from pipeline.requests.sources import raw_records


class Reading(NamedTuple):
    """What came of one record.

    Attributes:
        place: where it stands in its source, in words.
        request: the request, or what is wrong with the record.
        layout: its layout's name, where one was found.
        left_out: how many of its probes and rephrases had an empty text.
        earlier: place and new answer of the last request before it about the same subject and prompt.
    """

    place: str
    request: EditRequest | UserError
    layout: str | None = None
    left_out: int = 0
    earlier: tuple[str, str] | None = None


def load_requests(
    source: str | Path,
    limit: int | None = None,
    offset: int = 0,
    skip_bad: bool = False,
    tell: Callable[[str], Any] = warnings.warn,
) -> list[EditRequest]:
    """Read edit requests: `stream_requests`, as a list.

    Example:
        >>> load_requests("demo", limit=1)[0].prompt
        'The capital of Germany is'
        >>> try:
        ...     load_requests("facts.jsonl")
        ... except UserError as error:
        ...     print(error)
        requests: facts.jsonl: no such file; expected a JSON, JSONL or CSV file, `hf:NAME`, or `demo`
    """
    return list(stream_requests(source, limit, offset, skip_bad, tell))


def stream_requests(
    source: str | Path,
    limit: int | None = None,
    offset: int = 0,
    skip_bad: bool = False,
    tell: Callable[[str], Any] = warnings.warn,
) -> Iterator[EditRequest]:
    """Read edit requests one by one: what is wrong with a record is said when it is reached.

    Of those before, only id, subject, prompt and new answer stay in memory.

    Args:
        source: a JSONL, JSON or CSV file, gzipped or not, `hf:NAME` for a Hugging Face data set, or `demo`.
        limit: take at most this many records; what comes after them is not read.
        offset: leave out this many records first; what is wrong with them is not said.
        skip_bad: leave bad records out.
        tell: called with one line that counts bad records and names the first, when any were left out.

    Raises:
        UserError: naming file and line or record, when there is no such file, it is empty or malformed, its
            layout is unknown, a field is missing, empty or of the wrong type, two requests share an id, or two
            layouts a file; or naming limit or offset, when it is out of range.
    """
    first_bad, bad, good = None, 0, 0
    for reading in read_requests(source, limit, offset):
        if isinstance(reading.request, EditRequest):
            good += 1
            yield reading.request
        elif not skip_bad:
            raise reading.request
        else:
            first_bad, bad = first_bad or reading.request, bad + 1
    if first_bad and not good:
        raise UserError(f"requests: {source}: all {bad} records are bad; the first: {first_bad}")
    if first_bad:
        tell(f"note: left out {bad} bad of {bad + good} records; the first: {first_bad}")


def read_requests(source: str | Path, limit: int | None = None, offset: int = 0) -> Iterator[Reading]:
    """Each record of a source as a request or as what is wrong with it, one after another.

    Arguments, and what is raised beside what is wrong with a record: as for `stream_requests`.
    """
    check_at_least("offset", offset, 0)
    if limit is not None:
        check_at_least("limit", limit, 1)
    total, seen = 0, _Seen()
    for place, record in islice(raw_records(source), None if limit is None else offset + limit):
        if total >= offset:
            yield _read(record, f"{source}: {place}", place, total, seen)
        total += 1
    if not total:
        raise UserError(f"requests: {source}: holds no records")
    if total <= offset:
        raise UserError(f"offset: {offset} leaves nothing of the {total} records of {source}")


def _read(record: Any, where: str, place: str, number: int, seen: _Seen) -> Reading:
    """One record as a request, or what is wrong with it."""
    layout = None
    try:
        if isinstance(record, UserError):
            raise record
        layout = find_layout(record)
        seen.check_layout(layout, place)
        request, left_out = to_request(record, layout, number)
        return Reading(place, request, layout.name, left_out, seen.add(request, place))
    except UserError as error:
        return Reading(place, UserError(f"{where}: {error}"), layout and layout.name)


class _Seen:
    """What was read before.

    Attributes:
        layout: the name of the first record's layout, and the record's place.
        ids: by id, the place where it was used.
        facts: by subject and prompt, place and new answer of the last request about it.
    """

    def __init__(self) -> None:
        self.layout: tuple[str, str] | None = None
        self.ids: dict[str, str] = {}
        self.facts: dict[tuple[str, str], tuple[str, str]] = {}

    def check_layout(self, layout: Layout, place: str) -> None:
        """Raise UserError when records before had another layout."""
        name, told = self.layout = self.layout or (layout.name, place)
        if layout.name != name:
            raise UserError(f"is {layout.name}, but {told} is {name}; expected one layout in a file")

    def add(self, request: EditRequest, place: str) -> tuple[str, str] | None:
        """Keep a request; place and new answer of the last one before it about the same subject and prompt.

        Raises:
            UserError: when its id was used before.
        """
        if request.id in self.ids:
            raise UserError(f"id {request.id!r} was used before, at {self.ids[request.id]}")
        self.ids[request.id] = place
        earlier = self.facts.get(fact(request))
        self.facts[fact(request)] = place, request.new_answer
        return earlier
