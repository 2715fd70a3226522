"""What the model is given for a request, token by token: the one joining of prompt and answer, shown."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.model.llm import LLM
from pipeline.model.targets import encode, last_token
from pipeline.requests import EditRequest


class ShownToken(NamedTuple):
    """A token's place, number and text, and what it is to the stages that read it."""

    place: int
    token_id: int
    text: str
    scored: bool
    ends_subject: bool


def explain(llm: LLM, request: EditRequest) -> list[ShownToken]:
    """The tokens of a request's prompt and new answer, as every stage reads them.

    Raises:
        UserError: as `encode` does.
    """
    (row,) = encode(llm, [(request.prompt, request.new_answer)], what=f"request {request.id}")
    before, found, _ = request.prompt.rpartition(request.subject or "")
    named = bool(request.subject) and bool(found)
    at = last_token(llm, request.prompt, len(before) + len(found), request.new_answer) if named else None
    ids = row.token_ids
    told = [str(llm.tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]  # alone, some lose their space
    return [
        ShownToken(place, ids[place], told[place + 1][len(told[place]) :], place >= row.target_start, place == at)
        for place in range(len(ids))
    ]
