"""Which of a record's fields are probably a request's, where no layout is told by them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

OTHERS = {  # what others call a request's fields, the likeliest first, in letters alone
    "prompt": "question query src input instruction statement sentence text cloze",
    "new_answer": "targetnew newtarget alt new newvalue target counterfactual answer output completion reply",
    "subject": "entity concept topic about",
    "old_answer": "groundtruth targettrue oldtarget old oldvalue original true truth gold answer answers",
    "rephrases": "rephrase paraphrase paraphrases rephraseprompt paraphraseprompts",
    "locality.prompt": "loc localityprompt neighborhoodprompts",
    "locality.answer": "locans localityanswer localitygroundtruth",
}
PROBES = ("locality", "portability")  # which have prompts of their own
MOST, LONGEST = 100, 400  # fields that are looked at; characters of their names that are shown
CLOSE = 0.85  # how alike a name is that is ours but for a slip


def paths(record: Any) -> list[str]:
    """Where a record holds something, as `--fields` names it; of a list of objects, what its first one holds."""
    return [*islice(_within(record, ""), MOST)] if isinstance(record, dict) else []


def _within(value: Any, above: str) -> Iterator[str]:
    value = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
    if not isinstance(value, dict):
        yield above
        return
    for name, inner in value.items():
        yield from _within(inner, f"{above}.{name}" if above else str(name))


def named(record: dict[str, Any]) -> str:
    """A record's fields in a line."""
    line = ", ".join(paths(record)) or "an empty record"
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def suggested(record: Any) -> dict[str, str]:
    """Which fields of a record are probably which of a request's; of one within others its own name may tell."""
    free = [path for path in paths(record) if not re.search("[,=]", path)]
    pairs = {}
    for name, others in OTHERS.items():
        own = _letters(name)
        whole = {_letters(path): path for path in reversed(free)}
        inner = {_letters(path, "."): path for path in reversed(free) if not {*PROBES} & {*path.split(".")}}
        wanted = [own, *others.split()]
        near = [*wanted, *get_close_matches(own, whole, 1, CLOSE)]
        tell = [*map(whole.get, near), *(map(inner.get, wanted) if "." not in name else ())]
        if found := next(filter(None, tell), None):
            pairs[name] = found
            free.remove(found)
    return pairs


def as_fields(pairs: Mapping[str, str]) -> str:
    """What `fields` takes to say so; empty without a prompt or a new answer. A probe needs both, too."""
    whole = {"locality.prompt", "locality.answer"} <= {*pairs}
    line = ",".join(f"{name}={path}" for name, path in pairs.items() if whole or "." not in name)
    return f"fields {shlex.quote(line)}" if {"prompt", "new_answer"} <= {*pairs} else ""


def _letters(path: str, after: str = "\0") -> str:
    """A field's name but for its case and signs, for what only says that it holds a text, and for what it is in."""
    name = re.sub(r"\.(text|str|value)$", "", path.casefold())
    return re.sub(r"[\W_]", "", name.rpartition(after)[2])
