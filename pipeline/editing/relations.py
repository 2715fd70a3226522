"""What may be said of a subject, and in which words: relations, each with ways to state it and to ask for it.

They stand in `relations.txt`, a line each: `relation (kinds of subjects): phrasing; …`, with {} for the subject.
Names of each kind stand in `names.txt`: well-known ones, and invented ones, which no model is sure of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Set
from functools import cache
from itertools import pairwise
from math import log
from pathlib import Path

from pipeline.requests.schema import EditRequest

ALIKE = 1 / 3  # of 1, what a prompt and a phrasing have in common where they say the same
BEGINNING = 6  # letters: invented by an inventor
SAYS_NOTHING = {
    *("{}", "the", "a", "an", "is", "was", "are", "were", "that", "which", "who", "whose", "what", "it")
}
LINE = re.compile(r"([\w ]+?)(?: \(([a-z ]+)\))?: (.+)")


def _read(file: str) -> list[tuple[str, ...]]:
    """Of each line what it is about, of which kinds that is, and the rest."""
    return LINE.findall(Path(__file__).with_name(file).read_text("utf-8"))


PHRASINGS = {relation: phrasings.split("; ") for relation, _, phrasings in _read("relations.txt")}
KINDS = {relation: {*kinds.split()} for relation, kinds, _ in _read("relations.txt")}  # of subjects
NAMES = {name: kind for kind, _, names in _read("names.txt") for name in names.split(", ")}  # and their kinds


def statement(relation: str, subject: str) -> str:
    """What a statement of a relation of a subject begins with."""
    return PHRASINGS[relation][0].replace("{}", subject)


def template(request: EditRequest) -> str:
    """A request's prompt with {} for its subject; `{} is` for a prompt that holds none."""
    span = request.subject_span
    return request.prompt[: span[0]] + "{}" + request.prompt[span[1] :] if span else "{} is"


def other_words(request: EditRequest) -> list[str]:
    """The same with {} in other words, its article kept; none where what it states is not known."""
    own = template(request)
    found = [phrasing for phrasing in PHRASINGS.get(stated(request) or "", ()) if phrasing != own]
    if "the {}" in own.casefold():
        found = [f"The {one}" if one.startswith("{}") else one.replace("{}", "the {}") for one in found]
    return found


def others_alike(request: EditRequest) -> tuple[list[str], list[str]]:
    """Names and other relations of the kinds that a request's subject may be of: of all where that is unknown."""
    itself = stated(request)
    kinds = KINDS[itself] if itself else {*NAMES.values()}
    names = [name for name, kind in NAMES.items() if kind in kinds]
    return names, [relation for relation, own in KINDS.items() if own & kinds and relation != itself]


def stated(request: EditRequest) -> str | None:
    """The relation that a prompt states of its subject: the one with the phrasing that is most like the prompt."""
    return _stated(template(request)) if request.names_subject else None


@cache
def _stated(text: str) -> str | None:
    own = _parts(text)
    counts = Counter(part for some in KNOWN.values() for part in set[Hashable]().union(*some))

    def weight(parts: Set[Hashable]) -> float:  # what few relations have counts most, and two words in a row half
        return sum(log(1 + len(KNOWN) / (counts[part] or 1)) / (1 + isinstance(part, tuple)) for part in parts)

    def alike(other: Set[Hashable]) -> float:
        return 2 * weight(own & other) / max(1e-9, weight(own) + weight(other))

    found = {relation: max(map(alike, some)) for relation, some in KNOWN.items()}
    best = max(found, key=found.__getitem__)
    return best if found[best] > ALIKE else None


def _parts(text: str) -> Set[Hashable]:
    """Beginnings of a text's words that say something, and all pairs of words in a row."""
    words = [word.casefold()[:BEGINNING] for word in re.findall(r"\{\}|[^\W\d_]+", text.replace("{}'s", "{}"))]
    return {*words} - SAYS_NOTHING | {*pairwise(words)}


KNOWN = {relation: [*map(_parts, (relation, *some))] for relation, some in PHRASINGS.items()}  # and its own name
