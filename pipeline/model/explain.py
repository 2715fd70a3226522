"""What the model is given for a request, token by token: the one joining of prompt and answer, shown."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.model.llm import LLM
from pipeline.requests.schema import EditRequest


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
        UserError: as `Tokens.rows` does.
    """
    (row,) = llm.tokens.answered([request], [request.new_answer])
    at = row.subject[1] if row.subject else None
    ids = row.token_ids
    told = [str(llm.tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]  # alone, some lose their space
    return [
        ShownToken(place, ids[place], told[place + 1][len(told[place]) :], place >= row.target_start, place == at)
        for place in range(len(ids))
    ]
