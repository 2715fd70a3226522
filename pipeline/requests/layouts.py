"""The layouts of requests: which fields give one away, and how its records become requests.

To add one, write the function from a record (a dict) to an EditRequest's fields (in benchmarks.py), and enter it
in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError
from pipeline.requests.benchmark_layouts import (
    Record,
    from_easyedit,
    from_original_counterfact,
    from_wikibio,
    from_zsre,
    is_blank,
)
from pipeline.requests.schema import EditRequest, Probe


class Layout(NamedTuple):
    """A layout's name, the fields that give it away, and its function from record to request fields.

    A record has all of `fields` and, where there are any, one of `signs`: they tell layouts with the same fields
    apart.
    """

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Record]
    signs: frozenset[str] = frozenset()

    def fits(self, record: Record) -> bool:
        """Whether a record can be read by this layout."""
        return self.fields <= record.keys() and (not self.signs or bool(self.signs & record.keys()))

    def mixes_with(self, other: Layout) -> bool:
        """Whether records of both may stand in one file: one has nothing that the other would read otherwise."""
        return self == other or (self.fields == other.fields and not (self.signs and other.signs))


def find_layout(record: Any) -> Layout:
    """The layout that a record's fields give away.

    Raises:
        UserError: without the record's place: what was found, and which fields were expected.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {type(record).__name__}")
    for layout in LAYOUTS:
        if layout.fits(record):
            return layout
    names: dict[frozenset[str], list[str]] = {}
    for layout in LAYOUTS:
        names.setdefault(layout.fields, []).append(layout.name)
    known = "; ".join(f"{' and '.join(sorted(fields))} ({', '.join(of)})" for fields, of in names.items())
    raise UserError(f"no prompt and new answer found; expected the fields {known}")


def to_request(record: Record, layout: Layout, number: int) -> tuple[EditRequest, int]:
    """A record as a request, and how many of its probes and rephrases were left out because a text is empty.

    Args:
        record: what the layout fits.
        layout: the record's layout.
        number: the record's number in its source: the request's id where the record has none.

    Raises:
        UserError: without the record's place: which field is wrong, and why.
    """
    fields = layout.read(record)
    left_out = 0 if layout is OWN else _leave_out_empty(fields)
    fields["id"] = str(number) if fields.get("id") is None else str(fields["id"])
    try:
        return EditRequest.model_validate(fields), left_out
    except ValidationError as error:
        read_as = "" if layout is OWN else f" (read as {layout.name})"  # its fields have other names
        raise UserError(f"{_wrong_field(error.errors()[0])}{read_as}") from None


def _leave_out_empty(fields: Record) -> int:
    """Take rephrases without text and probes without prompt or answer out of a request's fields; how many."""
    rephrases = [text for text in fields.get("rephrases", []) if not is_blank(text)]
    left_out = len(fields.get("rephrases", [])) - len(rephrases)
    fields["rephrases"] = rephrases
    for kind in ("locality", "portability"):
        probes = fields.get(kind, [])
        fields[kind] = [
            probe for probe in probes if not is_blank(probe["prompt"]) and not is_blank(probe["answer"])
        ]
        left_out += len(probes) - len(fields[kind])
    return left_out


OWN = Layout("golden-layers", frozenset({"prompt", "new_answer"}), dict)
EASYEDIT = frozenset({"prompt", "target_new"})

LAYOUTS = (
    Layout("CounterFact", frozenset({"requested_rewrite"}), from_original_counterfact),
    Layout("zsRE (MEND)", frozenset({"src", "alt"}), from_zsre),
    Layout("KnowEdit WikiBio", frozenset({"text", "labels", "concept"}), from_wikibio),
    Layout("KnowEdit", EASYEDIT, partial(from_easyedit, source="knowedit"), signs=frozenset({"locality"})),
    Layout(
        "CounterFact (EasyEdit)",
        EASYEDIT,
        partial(from_easyedit, source="counterfact"),
        signs=frozenset({"locality_prompt", "case_id"}),
    ),
    Layout("EasyEdit", EASYEDIT, partial(from_easyedit, source="easyedit")),
    OWN,
)


def without_empty(row: Record) -> Record:
    """A table's row without its empty cells, but for those that give a layout away."""
    telling = frozenset[str]().union(*(layout.fields for layout in LAYOUTS))
    return {name: cell for name, cell in row.items() if cell not in (None, "") or name in telling}


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
