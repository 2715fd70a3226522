"""Requests of one batch that contradict each other: the same subject and prompt, another new answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.requests.schema import EditRequest

NAMED = 3  # contradictions that a message spells out


def settle(requests: Sequence[EditRequest], last_wins: bool = False) -> list[EditRequest]:
    """A batch without contradictions: the last of such requests stays; UserError when it may not win."""
    last = {fact(request): request for request in requests}
    pairs = [(request, last[fact(request)]) for request in requests]
    lost = [(one, other) for one, other in pairs if one.new_answer != other.new_answer]
    if lost and not last_wins:
        named = [f"{one.id} ({one.new_answer!r}) and {other.id} ({other.new_answer!r})" for one, other in lost]
        more = f", and {len(named) - NAMED} more pairs" if len(named) > NAMED else ""
        raise UserError(
            f"requests: contradict each other, same subject and prompt: {'; '.join(named[:NAMED])}{more}; "
            "correct them, or keep the last of each with --last_wins (`run`: --edit.last_wins)"
        )
    return [one for one, other in pairs if one.new_answer == other.new_answer]


def fact(request: EditRequest) -> tuple[str, str]:
    """What a request is about: its subject and its prompt, whatever the spaces."""
    return " ".join((request.subject or "").split()), " ".join(request.prompt.split())
