"""Edit requests of a file, data set or the demo: its records, one after another, each read by its layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, check_at_least
from pipeline.requests.layouts import Layout, find_layout, to_request
from pipeline.requests.schema import EditRequest
from pipeline.requests.seen import Seen
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
    """Read edit requests one by one, in constant memory: what is wrong with a record is said when it is reached.

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
    """Each record of a source as a request or as what is wrong with it, in constant memory.

    Arguments, and what is raised beside what is wrong with a record: as for `stream_requests`.
    """
    check_at_least("offset", offset, 0)
    if limit is not None:
        check_at_least("limit", limit, 1)
    total = 0
    with closing(Seen()) as seen:
        reader = _Reader(source, seen)
        for place, record in islice(raw_records(source), None if limit is None else offset + limit):
            if total >= offset:
                yield reader.read(record, place, total)
            total += 1
    if not total:
        raise UserError(f"requests: {source}: holds no records")
    if total <= offset:
        raise UserError(f"offset: {offset} leaves nothing of the {total} records of {source}")


class _Reader:
    """Reads records one by one; knows the ids so far and the layout that the first record settled."""

    def __init__(self, source: str | Path, seen: Seen) -> None:
        self.source = source
        self.seen = seen
        self.layout: Layout | None = None
        self.told = ""  # where the layout was told

    def read(self, record: Any, place: str, number: int) -> Reading:
        """One record as a request, or what is wrong with it."""
        layout = None
        try:
            if isinstance(record, UserError):
                raise record
            layout = find_layout(record)
            self._check_layout(layout, place)
            request, left_out = to_request(record, layout, number)
            return Reading(place, request, layout.name, left_out, self.seen.add(request, place))
        except UserError as error:
            return Reading(place, UserError(f"{self.source}: {place}: {error}"), layout and layout.name)

    def _check_layout(self, layout: Layout, place: str) -> None:
        if self.layout is None:
            self.layout, self.told = layout, place
        elif layout != self.layout:
            raise UserError(
                f"is {layout.name}, but {self.told} is {self.layout.name}; expected one layout in a file"
            )
