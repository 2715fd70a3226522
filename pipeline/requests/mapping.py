"""Records of any layout, read through a mapping from a request's fields to theirs.

As `--fields prompt=src,new_answer=alt`. On the left stands a field of a request, or of its probes
(`locality.prompt`). On the right stands where the record holds it, from the outside in, parted by dots: `alt.text`,
`answers.0`, `probes.prompt` (of each in a list).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.errors import UserError, did_you_mean
from pipeline.requests.guessing import named, paths
from pipeline.requests.layouts import PROBES, Layout, Record, as_probes, by_axis, first_text, listed
from pipeline.requests.schema import EditRequest, Probe

LISTS = ("rephrases", "forms")
TEXTS = ("id", "prompt", "subject", "new_answer", "old_answer", "source")
NAMES = (*TEXTS, *LISTS, *(f"{kind}.{part}" for kind in PROBES for part in Probe.model_fields))


def mapped(fields: Mapping[str, str]) -> Layout:
    """The layout that a mapping says; a field that it does not name keeps its name.

    UserError for a left side that is no field of a request, or a probe without prompt or answer.
    """
    for name in fields:
        if name not in NAMES:
            hint = did_you_mean(str(name), NAMES)
            raise UserError(f"fields: {name!r} is no field of a request{hint}; there is {', '.join(NAMES)}")
        kind, _, part = name.partition(".")
        for other in ("prompt", "answer"):
            if part and f"{kind}.{other}" not in fields:
                raise UserError(f"fields: {name} is given without {kind}.{other}; a probe needs both")
    return Layout("--fields", frozenset(), partial(_request_fields, fields))


def _request_fields(fields: Mapping[str, str], record: Record) -> Record:
    found = {name: record[name] for name in EditRequest.model_fields if name in record}
    found |= {name: _look_up(record, path, name) for name, path in fields.items()}
    for kind in PROBES:
        parts = [found.pop(f"{kind}.{part}", None) for part in Probe.model_fields]
        if f"{kind}.prompt" in fields:
            found[kind] = as_probes(*parts)
        elif isinstance(found.get(kind), dict):
            found[kind] = by_axis(record, kind)
    lists = {name: [first_text(one) for one in listed(found, name)] for name in LISTS}
    return found | {name: first_text(found.get(name)) for name in TEXTS} | lists


def _look_up(record: Record, path: str, name: str) -> Any:
    """What stands at a path of a record; UserError, with what the record has, where nothing does."""
    try:
        return _at(record, path)
    except (LookupError, TypeError, ValueError):
        hint = did_you_mean(path, paths(record))
        raise UserError(f"no field {path!r}{hint}, which is to be its {name}; there is {named(record)}") from None


def _at(value: Any, path: str) -> Any:
    if value is None or (isinstance(value, dict) and path in value):  # a name may hold dots
        return value and value[path]
    name, inner, rest = path.partition(".")
    if isinstance(value, list) and not name.isdecimal():
        return [_at(one, path) for one in value]
    found = value[int(name)] if isinstance(value, list) else value[name]
    return _at(found, rest) if inner else found
