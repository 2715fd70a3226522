"""Readers of edit requests: our JSONL and the benchmark layouts, recognised by their fields.

A layout is a function from one record (a dict) to an EditRequest's fields and the field names that give it
away: to add one, write the function and enter it in LAYOUTS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError, check_at_least
from pipeline.requests.schema import EditRequest, Probe

DEMO_REQUESTS = Path(__file__).with_name("demo.jsonl")

Record = dict[str, Any]


def _first(value: Any) -> Any:
    """The value itself, or a list's first item: benchmarks hold either in the same field."""
    return (value[0] if value else None) if isinstance(value, list) else value


def _probes(prompt: Any, answer: Any, axis: str) -> list[Record]:
    """One probe, or none where the record leaves its prompt or its answer empty."""
    return [{"prompt": prompt, "answer": answer, "axis": axis}] if prompt and answer else []


def _from_own(record: Record) -> Record:
    return record


def _from_counterfact(record: Record) -> Record:
    """CounterFact in EasyEdit's layout."""
    return {
        "id": record.get("case_id"),
        "prompt": record["prompt"],
        "subject": record.get("subject"),
        "new_answer": _first(record["target_new"]),
        "old_answer": _first(record.get("ground_truth")) or None,
        "rephrases": [p for p in [_first(record.get("rephrase_prompt"))] if p],
        "locality": _probes(
            _first(record.get("locality_prompt")), _first(record.get("locality_ground_truth")), "neighborhood"
        ),
        "source": "counterfact",
    }


def _from_zsre(record: Record) -> Record:
    """zsRE in MEND's layout; `nq question: ` in front of `loc` marks its source and is not part of it."""
    return {
        "id": record.get("id"),
        "prompt": record["src"],
        "subject": record.get("subject"),
        "new_answer": _first(record["alt"]),
        "old_answer": _first(record.get("answers")) or None,
        "rephrases": [p for p in [_first(record.get("rephrase"))] if p],
        "locality": _probes(
            str(_first(record.get("loc")) or "").removeprefix("nq question: "), _first(record.get("loc_ans")), "nq"
        ),
        "source": "zsre",
    }


OWN = "golden-layers JSONL"


class Layout(NamedTuple):
    """A layout's name, the fields that give it away, and its function from record to request fields."""

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Record]


LAYOUTS = (
    Layout("zsRE (MEND)", frozenset({"src", "alt"}), _from_zsre),
    Layout("CounterFact (EasyEdit)", frozenset({"prompt", "target_new"}), _from_counterfact),
    Layout(OWN, frozenset({"prompt", "new_answer"}), _from_own),
)


def load_requests(source: str | Path, limit: int | None = None, offset: int = 0) -> list[EditRequest]:
    """Read the edit requests of a file; see `stream_requests`."""
    return list(stream_requests(source, limit, offset))


def stream_requests(source: str | Path, limit: int | None = None, offset: int = 0) -> Iterator[EditRequest]:
    """Read the edit requests of a file one by one: what is wrong with a record is said when it is reached.

    Args:
        source: a JSONL file, a JSON file holding a list, or `demo`.
        limit: take at most this many records; lines after them are not read.
        offset: leave out this many records first; their contents are not checked.

    Raises:
        UserError: naming file and line or record, when there is no such file, it is empty or malformed, its
            layout is unknown, a field is missing or of the wrong type, or two requests share an id; or
            naming limit or offset, when it is out of range.
    """
    check_at_least("offset", offset, 0)
    if limit is not None:
        check_at_least("limit", limit, 1)
    path = DEMO_REQUESTS if str(source) == "demo" else Path(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"requests: {path}: {found}; expected a JSON or JSONL file, or `demo`")
    seen: dict[str, str] = {}
    total = 0
    for number, (where, record) in enumerate(islice(_records(path), None if limit is None else offset + limit)):
        total = number + 1
        if number < offset:
            continue
        request = _read(record, number, where)
        if request.id in seen:
            raise UserError(f"{where}: id {request.id!r} was used before, at {seen[request.id]}")
        seen[request.id] = where
        yield request
    if not total:
        raise UserError(f"requests: {path}: holds no records")
    if not seen:
        raise UserError(f"offset: {offset} leaves nothing of the {total} records of {path}")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON list or a JSONL file, with the words that say where it stands."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # with or without a byte order mark
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from ((f"{path}: record {i}", record) for i, record in enumerate(json.load(file)))
                return
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {line_number}", _parse_line(path, line_number, line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: malformed JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: byte {_first_bad_byte(path)}: not UTF-8 text") from None


def _first_bad_byte(path: Path) -> int:
    """Where a file stops being UTF-8, from its start: a decoder that reads in pieces counts from the last one."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number}: malformed JSON: {error.msg}") from None


def _read(record: Any, number: int, where: str) -> EditRequest:
    """One record as an EditRequest, or a UserError that says where it stands and what is wrong."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {type(record).__name__}")
    layout = next((known for known in LAYOUTS if known.fields <= record.keys()), None)
    if layout is None:
        known = "; ".join(f"{' and '.join(sorted(one.fields))} ({one.name})" for one in LAYOUTS)
        raise UserError(f"{where}: no prompt and new answer found; expected the fields {known}")
    fields = layout.read(record)
    fields["id"] = str(number) if fields.get("id") is None else str(fields["id"])
    try:
        return EditRequest.model_validate(fields)
    except ValidationError as error:
        read_as = "" if layout.name == OWN else f" (read as {layout.name})"  # its fields have other names
        raise UserError(f"{where}: {_wrong_field(error.errors()[0])}{read_as}") from None


def _wrong_field(error: ErrorDetails) -> str:
    """Which field is wrong, in what, and what there is instead."""
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"]
    if error["type"] == "tuple_type":
        message = f"expected a list of {'texts' if name == 'rephrases' else 'probes'}"
    elif error["type"] == "extra_forbidden":
        model = EditRequest if len(error["loc"]) == 1 else Probe
        message += f"; there is {', '.join(model.model_fields)}"
    return f"field {name!r}: {message}"
