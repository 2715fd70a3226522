"""Records of any layout, read through a mapping from a request's fields to theirs.

As `--fields prompt=src,new_answer=alt`. On the left stands a field of a request, or of probes
(`locality.prompt`, or `locality.near.prompt` of the axis `near`). On the right stands where the record holds it,
from the outside in, parted by dots: `alt.text`, `answers.0`, `probes.prompt` (of each in a list).

Benchmarks hold a text or a list in the same field, leave some texts empty, and give several answers where one is
scored: the first that is not empty is taken, as EasyEdit does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.errors import UserError, did_you_mean
from pipeline.requests.guessing import PROBES, named, paths
from pipeline.requests.schema import EditRequest, Probe

Record = dict[str, Any]
LISTS = ("rephrases", "forms")
TEXTS = ("id", "prompt", "subject", "new_answer", "old_answer", "source")
OWN_NAMES, PARTS = tuple(EditRequest.model_fields), tuple(Probe.model_fields)
NAMES = (*TEXTS, *LISTS, *(f"{kind}.{part}" for kind in PROBES for part in PARTS))
OF_PROBES = re.compile(rf"(({'|'.join(PROBES)})(?:\.[^.]+)?)\.({'|'.join(PARTS)})")
NQ = "nq question: "


def mapped(fields: Mapping[str, str]) -> Callable[[Record], Record]:
    """The function from a record to a request's fields that a mapping says; UserError for a wrong left side."""
    for name in fields:
        probe = OF_PROBES.fullmatch(str(name))
        if name not in NAMES and not probe:
            hint = did_you_mean(str(name), NAMES)
            raise UserError(f"fields: {name!r} is no field of a request{hint}; there is {', '.join(NAMES)}")
        for other in ("prompt", "answer"):
            if probe and f"{probe[1]}.{other}" not in fields:
                raise UserError(f"fields: {name} is given without {probe[1]}.{other}; a probe needs both")
    return _reader(fields, _look_up)


def by_names(text: str) -> Callable[[Record], Record]:
    """The same of a layout that not every record fills: what one lacks is none. `a|b`: the first that is there.

    `locality.near=q:a` are probes of the axis `near`, with their prompts at `q` and their answers at `a`.
    """
    fields = dict[str, str]()
    for name, path in (one.split("=") for one in text.split(",")):
        parts = zip(("prompt", "answer"), path.split(":"), strict=True) if ":" in path else ()
        fields |= {f"{name}.{part}": its for part, its in parts} or {name: path}
    return _reader(fields, lambda record, path, _: look_for(record, path))


def _reader(fields: Mapping[str, str], look_up: Callable[[Record, str, str], Any]) -> Callable[[Record], Record]:
    groups = {probe[1]: probe[2] for name in fields if (probe := OF_PROBES.fullmatch(name))}
    own = [kind for kind in PROBES if look_up is not _look_up or kind not in groups.values()]

    def read(record: Record) -> Record:
        found = {name: record[name] for name in OWN_NAMES if name in record}
        found |= {name: look_up(record, path, name) for name, path in fields.items()}
        found |= {kind: by_axis(record, kind) if kind in own else [] for kind in PROBES}
        for group, kind in groups.items():
            prompt, answer, axis = (found.pop(f"{group}.{part}", None) for part in PARTS)
            found[kind] += as_probes(kind, prompt, answer, axis or group.partition(".")[2] or None)
        found |= {name: [first_text(one) for one in listed(found, name)] for name in LISTS}
        return found | {name: first_text(found.get(name)) for name in TEXTS}

    return read


def _look_up(record: Record, path: str, name: str) -> Any:
    """What stands at a path of a record; UserError, with what the record has, where nothing does."""
    try:
        return _at(record, path)
    except (LookupError, TypeError, ValueError):
        hint = did_you_mean(path, paths(record))
        raise UserError(f"no field {path!r}{hint}, which is to be its {name}; there is {named(record)}") from None


def look_for(record: Record, path: str) -> Any:
    """What stands at the first of paths, parted by `|`, that holds something; UserError where one meets text."""
    try:
        return next((found for one in path.split("|") if (found := _at(record, one, None)) is not None), None)
    except TypeError:
        raise UserError(f"field {path!r}: a text or number stands where an object or a list was expected") from None


def _at(value: Any, path: str, *missing: Any) -> Any:
    """What stands at a path; where an object lacks it, `missing`, or an error if there is none."""
    if value is None or (isinstance(value, dict) and path in value):  # a name may hold dots
        return value and value[path]
    name, inner, rest = path.partition(".")
    if isinstance(value, list) and not name.isdecimal():
        return [_at(one, path, *missing) for one in value]
    try:
        found = value[int(name)] if isinstance(value, list) else value[name]
    except LookupError:
        if missing:
            return missing[0]
        raise
    return _at(found, rest, *missing) if inner else found


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing that could be a text of its own."""
    return value is None or (isinstance(value, str) and not value.strip())


def first_text(value: Any) -> Any:
    """The value itself, or the first of a list, however deep, that is not empty; None where there is none.

    Of CounterFact's `{"str": text, "id": …}` the text, and of MEND's questions not `nq question: `, their source.
    """
    if isinstance(value, list):
        return next((found for found in map(first_text, value) if found is not None), None)
    if isinstance(value, dict):
        value = value.get("str", value)
    return None if is_blank(value) else value.removeprefix(NQ) if isinstance(value, str) else value


def listed(record: Record, name: str) -> list[Any]:
    """A field that holds a list, or one thing that could be of it."""
    value = record.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def as_probes(kind: str, prompt: Any, answer: Any, axis: Any = None) -> list[Record]:
    """A probe, or one for each of a list of prompts, where a single answer is that of all; none without texts."""
    many = isinstance(prompt, list)
    count = len(prompt) if many else prompt is not None
    columns = [one if many and isinstance(one, list) else [one] * count for one in (prompt, answer, axis)]
    counts = [len(column) for column in columns]
    if len({*counts}) > 1:
        raise UserError("{}: {} prompts, {} answers, {} axes; expected as many of each".format(kind, *counts))
    rows = [[first_text(one) for one in row] for row in zip(*columns, strict=True)]
    return [dict(zip(PARTS, row, strict=True)) for row in rows if row[:2] != [None, None]]


def by_axis(record: Record, kind: str) -> list[Record]:
    """A record's own probes of a kind: a list of them, or as in KnowEdit an object of axes, each a list."""
    axes = record.get(kind) or {}
    axes = {"": axes} if isinstance(axes, list) else axes
    if not isinstance(axes, dict):
        raise UserError(f"field {kind!r}: expected a list or an object of probes, found {type(axes).__name__}")
    if "New Question" in axes:  # one probe about a further relation, as zsRE and CounterFact were extended
        return as_probes(kind, first_text(axes["New Question"]), axes.get("New Answer"), "reasoning")
    for axis, probes in axes.items():
        if not isinstance(probes or [], list) or not all(isinstance(probe, dict) for probe in probes or []):
            raise UserError(f"field '{kind}{axis and f'.{axis}'}': expected a list of probes, each an object")
    return [
        {
            "prompt": first_text(look_for(probe, "prompt|loc")),
            "answer": first_text(look_for(probe, "ground_truth|answer|loc_ans")),
            "axis": axis or probe.get("axis"),
        }
        for axis, probes in axes.items()
        for probe in probes or []
    ]
