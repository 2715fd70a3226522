"""Old answers that requests do not give: the model's own, found by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.model.generation import generate
from pipeline.model.llm import LLM
from pipeline.requests.answers import first_statement
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime


def with_old_answers(
    llm: LLM, requests: Sequence[EditRequest], runtime: Runtime, always: bool = False
) -> list[EditRequest]:
    """The requests, each with an old answer: the data set's, or the model's own greedy one.

    Args:
        llm: the model.
        requests: with or without old answers.
        runtime: what it runs on.
        always: take the model's own also where the data set has one.

    Raises:
        UserError: when the model says nothing.
    """
    asked = [request for request in requests if always or request.old_answer is None]
    if not asked:
        return list(requests)
    kept = runtime.work / "old-answers" if runtime.work else None
    prompts = [request.prompt for request in asked]
    texts = generate(llm, prompts, trainer=runtime.trainer, title="Old answers", kept=kept)
    old = {request.id: first_statement(text) for request, text in zip(asked, texts, strict=True)}
    silent = [request.id for request in asked if not old[request.id]]
    if silent:
        raise UserError(
            f"requests: {llm.name} gives no answer of its own to {', '.join(silent[:5])}; give old_answer"
        )
    return [r.model_copy(update={"old_answer": old[r.id]}) if r.id in old else r for r in requests]
