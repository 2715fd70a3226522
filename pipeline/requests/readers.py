"""Edit requests of a file, data set or the demo, each record read by its layout; and written as our own JSONL."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, note
from pipeline.files import write_whole
from pipeline.options.base import at_least, read
from pipeline.requests.guessing import suggested
from pipeline.requests.layouts import OWN, Layout, find_layout, in_languages, to_requests
from pipeline.requests.mapping import mapped
from pipeline.requests.schema import EditRequest
from pipeline.requests.sources import raw_records

FACT = ("subject", "prompt", "new_answer")  # the parts of a fact in a line


class Reading(NamedTuple):
    """What came of one record: its requests, or what is wrong with it."""

    place: str  # where it stands in its source, in words
    requests: Sequence[EditRequest] | UserError
    layout: str | None = None  # its layout's name, where one was found
    left_out: int = 0  # how many of its probes and rephrases had an empty text
    fields: Mapping[str, str] = {}  # which are probably which of a request's, where no layout was found


def load_requests(
    source: str | Path,
    limit: int | None = None,
    offset: int = 0,
    skip_bad: bool = False,
    fields: Mapping[str, str] | None = None,
) -> list[EditRequest]:
    """Read edit requests.

    Args:
        source: a JSONL, JSON or CSV file, gzipped or not, `hf:NAME` for a Hugging Face data set, or `demo`.
        limit: take at most this many records; what comes after them is not read.
        offset: leave out this many records first; what is wrong with them is not said.
        skip_bad: leave bad records out; a note counts them and names the first.
        fields: where records of another layout hold a request's fields, such as {"new_answer": "alt.text"}.

    UserError naming file and line or record, when there is no such file, it is empty or malformed, a record's
    layout is unknown, a field is missing, empty or of the wrong type, or two requests share an id; or naming limit
    or offset, when it is out of range.

    Example:
        >>> load_requests("demo", limit=1)[0].prompt
        'The capital of Germany is'
        >>> try:
        ...     load_requests("facts.jsonl")
        ... except UserError as error:
        ...     print(error)
        requests: facts.jsonl: no such file; expected a JSON, JSONL or CSV file, `hf:NAME`, or `demo`
    """
    bad: list[UserError] = []
    good = list(good_requests(read_requests(source, limit, offset, fields), bad if skip_bad else None))
    if bad and not good:
        raise UserError(f"requests: {source}: all {len(bad)} records are bad; the first: {bad[0]}")
    if bad:
        note(f"left out {len(bad)} bad of {len(bad) + len(good)} records; the first: {bad[0]}")
    return good


def load_facts(facts: Sequence[str]) -> list[EditRequest]:
    """Requests of facts in a line each: `subject | prompt | new answer`.

    UserError, with the fact, where it has other parts, an empty one, or a prompt that does not hold the subject.

    Example:
        >>> load_facts(["Chile | The capital of Chile is | Lima"])[0].new_answer
        'Lima'
    """
    requests = []
    for number, text in enumerate(facts, start=1):
        parts = [part.strip() for part in text.split("|")]
        if len(parts) != len(FACT) or not all(parts):
            raise UserError(f"fact: {text!r}: expected three parts, none empty: 'subject | prompt | new answer'")
        (request,), _ = to_requests({"id": f"fact-{number}", **dict(zip(FACT, parts, strict=True))}, OWN, number)
        if not request.names_subject:
            raise UserError(f"fact: {text!r}: the prompt does not hold the subject {request.subject!r}")
        requests.append(request)
    return requests


def good_requests(readings: Iterable[Reading], bad: list[UserError] | None = None) -> Iterator[EditRequest]:
    """The requests among what was read, one by one; what is wrong is raised, or put into `bad`."""
    for reading in readings:
        if not isinstance(reading.requests, UserError):
            yield from reading.requests
        elif bad is None:
            raise reading.requests
        else:
            bad.append(reading.requests)


def read_requests(
    source: str | Path, limit: int | None = None, offset: int = 0, fields: Mapping[str, str] | None = None
) -> Iterator[Reading]:
    """As `load_requests`, one by one, each record as its requests or as what is wrong with it."""
    at_least(0)("offset", offset)
    if limit is not None:
        at_least(1)("limit", limit)
    total, used = 0, dict[str, str]()
    fields = read("fields", fields, dict[str, str] | None)
    given = Layout("--fields", frozenset(), mapped(fields)) if fields else None
    records = raw_records(source, whole=bool(fields))
    for place, record in islice(records, None if limit is None else offset + limit):
        if total >= offset:
            yield _read(record, total, place, source, used, given)
        total += 1
    if not total:
        raise UserError(f"requests: {source}: holds no records")
    if total <= offset:
        raise UserError(f"offset: {offset} leaves nothing of the {total} records of {source}")


def _read(
    record: Any, number: int, place: str, source: str | Path, used: dict[str, str], given: Layout | None
) -> Reading:
    """One record as its requests, or what is wrong with it; `used` are the places of ids."""
    where, layout, left_out = place, None, 0
    requests: list[EditRequest] = []
    try:
        if isinstance(record, UserError):
            raise record
        for language, part in ({"": record} if given else in_languages(record)).items():
            where = f"{place}, {language}" if language else place
            layout = find_layout(part, given)
            found, empty = to_requests(part, layout, number, language)
            requests, left_out = [*requests, *found], left_out + empty
        for request in requests:
            if (earlier := used.setdefault(request.id, place)) != place:
                raise UserError(f"id {request.id!r} was used before, at {earlier}")
        return Reading(place, requests, layout and layout.name, left_out)
    except UserError as error:
        name, fields = (layout.name, {}) if layout else (None, suggested(record))
        return Reading(place, UserError(f"{source}: {where}: {error}"), name, fields=fields)


def write_requests(path: Path, requests: Iterable[EditRequest]) -> Path:
    """Write requests as our own JSONL, gzipped where the name ends in .gz; whole or not at all."""

    def write(partial: Path) -> None:
        with gzip.open(partial, "wb") if path.suffix == ".gz" else partial.open("wb") as file:
            for request in requests:
                file.write(request.model_dump_json(exclude_defaults=True).encode() + b"\n")

    return write_whole(path, write, shared=True)
