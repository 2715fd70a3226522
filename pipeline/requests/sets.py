"""Which requests go together: a batch without contradictions, two sets without a subject in common."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.options.base import between
from pipeline.requests.schema import EditRequest

NAMED = 3  # contradictions that a message spells out


def settle(requests: Sequence[EditRequest], last_wins: bool = False) -> list[EditRequest]:
    """A batch in which the last of contradicting requests stays; UserError when it may not win."""
    last = {fact(request): request for request in requests}
    pairs = [(request, last[fact(request)]) for request in requests]
    lost = [(one, other) for one, other in pairs if not alike(one.new_answer, other.new_answer)]
    if lost and not last_wins:
        named = [f"{one.id} ({one.new_answer!r}) and {other.id} ({other.new_answer!r})" for one, other in lost]
        more = f", and {len(named) - NAMED} more pairs" if len(named) > NAMED else ""
        raise UserError(
            f"requests: contradict each other, the same prompt: {'; '.join(named[:NAMED])}{more}; "
            "correct them, or keep the last of each with last_wins (`run`: edit.last_wins)"
        )
    return [one for one, other in pairs if alike(one.new_answer, other.new_answer)]


def fact(request: EditRequest) -> str:
    """What a request is about: its prompt, but for spaces and how accents are written; not its subject."""
    return " ".join(unicodedata.normalize("NFC", request.prompt).split())


def alike(one: str | None, other: str | None) -> bool:
    """Whether two answers are the same but for spaces and how accents are written."""
    texts = [" ".join(unicodedata.normalize("NFC", text or "").split()) for text in (one, other)]
    return texts[0] == texts[1]


def about(request: EditRequest) -> str:
    """A request's subject, however it is written; its prompt where it names none."""
    return unicodedata.normalize("NFC", request.subject or request.prompt).casefold()


def check_subjects(requests: Sequence[EditRequest], what: str, instead: str) -> None:
    """Raise UserError when a prompt does not hold its subject, which `what` needs; `instead` does without."""
    missing = [request.id for request in requests if not request.names_subject]
    if missing:
        raise UserError(
            f"{what} needs each request's subject in its prompt; not so in {len(missing)} of "
            f"{len(requests)}: {', '.join(missing[:5])}; the method {instead} does without"
        )


def split_by_subject(
    requests: Sequence[EditRequest], proxy_fraction: float, seed: int = 0
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Proxy and edit set with no subject in common, each in the requests' own order.

    Subjects are shuffled and dealt to the proxy set until it holds `proxy_fraction` of the requests. A request
    without a subject counts as a subject of its own. UserError when there are too few subjects for two sets, or the
    fraction is not between 0 and 1.

    Example:
        >>> proxy, edits = split_by_subject(load_requests("demo"), proxy_fraction=0.5)
        >>> len(proxy), len(edits)
        (80, 80)
    """
    between(0, 1)("proxy_fraction", proxy_fraction)
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(about(request), []).append(index)
    if len(groups) < 2:
        raise UserError(
            f"requests: {len(requests)} with {len(groups)} different subjects cannot be split into a proxy set "
            "and an edit set; give more requests, or a golden profile"
        )
    subjects = sorted(groups)
    random.Random(seed).shuffle(subjects)
    proxy: set[int] = set()
    for subject in subjects[:-1]:
        if proxy and len(proxy) + len(groups[subject]) > proxy_fraction * len(requests):
            break
        proxy.update(groups[subject])
    return (
        [request for index, request in enumerate(requests) if index in proxy],
        [request for index, request in enumerate(requests) if index not in proxy],
    )
