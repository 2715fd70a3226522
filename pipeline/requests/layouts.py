"""The layouts of requests: which fields give one away, and how its records become requests.

To add one, write the function from a record (a dict) to an EditRequest's fields, and enter it in LAYOUTS.
Benchmarks hold a text or a list in the same field, leave some texts empty, and give several answers where one is
scored: the first that is not empty is taken, as EasyEdit does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError
from pipeline.requests.guessing import as_flag, named, suggested
from pipeline.requests.schema import EditRequest, Probe

Record = dict[str, Any]
PROBES = ("locality", "portability")
MOST_FIELDS = 1_000  # of a record


class Layout(NamedTuple):
    """A layout's name, the fields that a record of it has, and its function from record to request fields."""

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Record]


def from_easyedit(record: Record) -> Record:
    """EasyEdit's names: CounterFact's one neighbour, and KnowEdit's probes by axis."""
    flat = "counterfact" if {"locality_prompt", "case_id"} & record.keys() else "easyedit"
    fields = _renamed(record, id="case_id", new_answer="target_new", old_answer="ground_truth")
    neighbour = as_probes(
        first_text(record.get("locality_prompt")), record.get("locality_ground_truth"), "neighborhood"
    )
    return fields | {
        "locality": neighbour + fields["locality"],
        "source": "knowedit" if "locality" in record else flat,
    }


def from_wikibio(record: Record) -> Record:
    """KnowEdit's WikiBio: a passage, and the sentence that is to follow."""
    return _renamed(record, prompt="text", subject="concept", new_answer="labels") | {"source": "wikibio"}


def from_zsre(record: Record) -> Record:
    """zsRE in MEND's layout; `nq question: ` in front of `loc` marks its source and is not part of it."""
    fields = _renamed(record, prompt="src", new_answer="alt", old_answer="answers")
    question = first_text(record.get("loc"))
    if isinstance(question, str):
        question = question.removeprefix("nq question: ")
    return fields | {"locality": as_probes(question, record.get("loc_ans"), "nq"), "source": "zsre"}


def _renamed(record: Record, **names: str) -> Record:
    """The request fields of a record that holds each in a field of its own; names are those that differ."""
    texts = ("id", "prompt", "subject", "new_answer", "old_answer")
    fields = {name: first_text(record.get(names.get(name, name))) for name in texts}
    rephrase = record.get("rephrase_prompt", record.get("rephrase"))
    return fields | {
        "rephrases": [] if rephrase is None else [first_text(rephrase)],
        "locality": by_axis(record, "locality"),
        "portability": by_axis(record, "portability"),
    }


def from_counterfact(record: Record) -> Record:
    """CounterFact as published: neighbours share the rewrite's true answer."""
    rewrite = _object(record, "requested_rewrite")
    fields = _renamed(record | rewrite, id="case_id", new_answer="target_new", old_answer="target_true")
    if isinstance(fields["subject"], str) and isinstance(fields["prompt"], str):
        prompt, subject = fields["prompt"].strip(), fields["subject"].strip()
        fields["subject_start"] = len(prompt.rpartition("{}")[0].replace("{}", subject)) if "{}" in prompt else None
        fields["prompt"] = prompt.replace("{}", subject)
    return fields | {
        "rephrases": listed(record, "paraphrase_prompts"),
        "locality": as_probes(listed(record, "neighborhood_prompts"), fields["old_answer"], "neighborhood"),
        "source": "counterfact",
    }


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing that could be a text of its own."""
    return value is None or (isinstance(value, str) and not value.strip())


def first_text(value: Any) -> Any:
    """The value itself, or the first of a list, however deep, that is not empty; None where there is none.

    Of CounterFact's `{"str": text, "id": …}` the text.
    """
    if isinstance(value, list):
        return next((found for found in map(first_text, value) if found is not None), None)
    if isinstance(value, dict):
        value = value.get("str", value)
    return None if is_blank(value) else value


def _object(record: Record, name: str) -> Record:
    """A field that holds an object; empty where the record has none."""
    value = record.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"field {name!r}: expected an object, found {type(value).__name__}")
    return value


def listed(record: Record, name: str) -> list[Any]:
    """A field that holds a list, or one thing that could be of it."""
    value = record.get(name) or []
    return value if isinstance(value, list) else [value]


def as_probes(prompt: Any, answer: Any, axis: Any = None) -> list[Record]:
    """A probe, or one for each of a list of prompts, where a single answer is that of all; none without texts."""
    many = isinstance(prompt, list)
    count = len(prompt) if many else 1
    columns = [one if many and isinstance(one, list) else [one] * count for one in (prompt, answer, axis)]
    counts = [len(column) for column in columns]
    if len({*counts}) > 1:
        raise UserError("probes: {} prompts, {} answers, {} axes; expected as many of each".format(*counts))
    rows = [[first_text(one) for one in row] for row in zip(*columns, strict=True)]
    return [dict(zip(Probe.model_fields, row, strict=True)) for row in rows if row[:2] != [None, None]]


def by_axis(record: Record, kind: str) -> list[Record]:
    """KnowEdit's probes of a kind: an object of axes, each a list of probes."""
    axes = _object(record, kind)
    if "New Question" in axes:  # one probe about a further relation, as zsRE and CounterFact were extended
        return as_probes(first_text(axes["New Question"]), axes.get("New Answer"), "reasoning")
    for axis, probes in axes.items():
        if not isinstance(probes or [], list) or not all(isinstance(probe, dict) for probe in probes or []):
            raise UserError(f"field {f'{kind}.{axis}'!r}: expected a list of probes, each an object")
    return [
        {"prompt": first_text(probe.get("prompt")), "answer": first_text(probe.get("ground_truth")), "axis": axis}
        for axis, probes in axes.items()
        for probe in probes or []
    ]


OWN = Layout("golden-layers", frozenset({"prompt", "new_answer"}), dict)

LAYOUTS = (
    Layout("CounterFact", frozenset({"requested_rewrite"}), from_counterfact),
    Layout("zsRE (MEND)", frozenset({"src", "alt"}), from_zsre),
    Layout("KnowEdit WikiBio", frozenset({"text", "labels", "concept"}), from_wikibio),
    Layout("EasyEdit", frozenset({"prompt", "target_new"}), from_easyedit),
    OWN,
)


def find_layout(record: Any, given: Layout | None = None) -> Layout:
    """The layout that is given, or that a record's fields give away.

    UserError, without the record's place, where none does.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {type(record).__name__}")
    if len(record) > MOST_FIELDS:
        raise UserError(f"{len(record)} fields; the most are {MOST_FIELDS:,}")
    for layout in [given] if given else LAYOUTS:
        if layout.fields <= record.keys():
            return layout
    known = "; ".join(f"{' and '.join(sorted(layout.fields))} ({layout.name})" for layout in LAYOUTS)
    fields = as_flag(suggested(record))
    wanted = f"did you mean {fields}?" if fields else f"expected the fields {known}"
    raise UserError(f"no prompt and new answer found in {named(record)}; {wanted}")


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
    for kind in ("rephrases", "forms", *PROBES):
        if isinstance(found := fields.get(kind), list):
            fields[kind] = [one for one in found if not any(map(is_blank, _texts(one, kind)))]
            left_out += len(found) - len(fields[kind])
    return left_out


def _texts(one: Any, kind: str) -> list[Any]:
    """What a rephrase or probe cannot do without."""
    return [one.get("prompt"), one.get("answer")] if kind in PROBES and isinstance(one, dict) else [one]


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
