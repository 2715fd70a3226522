"""The layouts of requests: which fields give one away, and how its records become requests.

To add one, write the function from a record (a dict) to an EditRequest's fields (in benchmark_layouts.py), and
enter it in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError
from pipeline.requests import benchmark_layouts as of
from pipeline.requests.benchmark_layouts import Record, is_blank
from pipeline.requests.schema import EditRequest, Probe


class Layout(NamedTuple):
    """A layout's name, the fields that a record of it has, and its function from record to request fields."""

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Record]


OWN = Layout("golden-layers", frozenset({"prompt", "new_answer"}), dict)

LAYOUTS = (
    Layout("CounterFact", frozenset({"requested_rewrite"}), of.from_counterfact),
    Layout("zsRE (MEND)", frozenset({"src", "alt"}), of.from_zsre),
    Layout("KnowEdit WikiBio", frozenset({"text", "labels", "concept"}), of.from_wikibio),
    Layout("EasyEdit", frozenset({"prompt", "target_new"}), of.from_easyedit),
    OWN,
)


def find_layout(record: Any) -> Layout:
    """The layout that a record's fields give away; UserError, without the record's place, where none does."""
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {type(record).__name__}")
    for layout in LAYOUTS:
        if layout.fields <= record.keys():
            return layout
    known = "; ".join(f"{' and '.join(sorted(layout.fields))} ({layout.name})" for layout in LAYOUTS)
    raise UserError(f"no prompt and new answer found; expected the fields {known}")


def to_request(record: Record, layout: Layout, number: int) -> tuple[EditRequest, int]:
    """A record as a request, and how many of its probes and rephrases were left out because a text is empty.

    `number` is the id of a record without one. UserError, without the record's place, for a wrong field.
    """
    fields = layout.read(record)
    left_out = 0 if layout is OWN else _leave_out_empty(fields)
    fields["id"] = str(number if fields.get("id") is None else fields["id"])
    try:
        return EditRequest.model_validate(fields), left_out
    except ValidationError as error:
        read_as = "" if layout is OWN else f" (read as {layout.name})"  # its fields have other names
        raise UserError(f"{_wrong_field(error.errors()[0])}{read_as}") from None


def _leave_out_empty(fields: Record) -> int:
    """Take rephrases without text and probes without prompt or answer out of a request's fields; how many."""
    left_out = 0
    for kind in ("rephrases", "locality", "portability"):
        found = fields.get(kind, [])
        texts = [(one,) if kind == "rephrases" else (one["prompt"], one["answer"]) for one in found]
        fields[kind] = [one for one, its in zip(found, texts, strict=True) if not any(map(is_blank, its))]
        left_out += len(found) - len(fields[kind])
    return left_out


def without_empty(row: Record) -> Record:
    """A table's row without its empty cells, but for those that give a layout away."""
    telling = frozenset[str]().union(*(layout.fields for layout in LAYOUTS))
    return {name: cell for name, cell in row.items() if cell not in (None, "") or name in telling}


def _wrong_field(error: ErrorDetails) -> str:
    """Which field is wrong, in what, and what there is instead."""
    name = ".".join(str(part) for part in error["loc"])
    message = "expected a text, found none" if error["input"] is None else error["msg"]
    if error["type"] == "string_unicode":
        message = "not UTF-8 text"
    elif error["type"] == "tuple_type":
        message = f"expected a list of {'texts' if name == 'rephrases' else 'probes'}"
    elif error["type"] == "extra_forbidden":
        model = EditRequest if len(error["loc"]) == 1 else Probe
        message += f"; there is {', '.join(model.model_fields)}"
    return f"field {name!r}: {message}"
