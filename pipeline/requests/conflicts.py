"""Requests of one batch that contradict each other: the same subject and prompt, another new answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.requests.schema import EditRequest

NAMED = 3  # contradictions that a message spells out


def settle(requests: Sequence[EditRequest], last_wins: bool = False) -> list[EditRequest]:
    """The requests without contradictions, in their order.

    Args:
        requests: one batch.
        last_wins: of requests that contradict each other, keep the last alone.

    Raises:
        UserError: when requests contradict each other and the last may not win.
    """
    last: dict[tuple[str, str], EditRequest] = {}
    losers: dict[str, EditRequest] = {}  # id → who contradicts it
    for request in requests:
        earlier = last.get(fact(request))
        if earlier and earlier.new_answer != request.new_answer:
            losers[earlier.id] = request
        last[fact(request)] = request
    if losers and not last_wins:
        named = [
            f"{request.id} ({request.new_answer!r}) and {losers[request.id].id} ({losers[request.id].new_answer!r})"
            for request in requests
            if request.id in losers
        ]
        more = f", and {len(named) - NAMED} more pairs" if len(named) > NAMED else ""
        raise UserError(
            f"requests: contradict each other, same subject and prompt: {'; '.join(named[:NAMED])}{more}; "
            "correct them, or keep the last of each with --last_wins (`run`: --edit.last_wins)"
        )
    return [request for request in requests if not losers or request.new_answer == last[fact(request)].new_answer]


def fact(request: EditRequest) -> tuple[str, str]:
    """What a request is about: its subject and its prompt, whatever the spaces."""
    return " ".join((request.subject or "").split()), " ".join(request.prompt.split())
