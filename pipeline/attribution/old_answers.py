"""Old answers that requests do not give: the model's own, found by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.model import LLM, first_statement, generate
from pipeline.options import AttributionOptions, TrainerOptions
from pipeline.requests import EditRequest


def with_old_answers(
    llm: LLM,
    requests: Sequence[EditRequest],
    options: AttributionOptions,
    trainer: TrainerOptions,
    work: Path | None = None,
) -> list[EditRequest]:
    """The requests, each with an old answer: the data set's, or the model's own greedy one.

    Raises:
        UserError: when the model says nothing.
    """
    asked = [r for r in requests if options.old_answers == "model" or r.old_answer is None]
    if not asked:
        return list(requests)
    prompts, kept = [request.prompt for request in asked], work / "old-answers" if work else None
    texts = generate(llm, prompts, batch_size=options.batch_size, trainer=trainer, title="Old answers", kept=kept)
    old = {r.id: first_statement(text) for r, text in zip(asked, texts, strict=True)}
    silent = [r.id for r in asked if not old[r.id]]
    if silent:
        raise UserError(
            f"requests: {llm.name} gives no answer of its own to {', '.join(silent[:5])}; give old_answer"
        )
    return [r.model_copy(update={"old_answer": old[r.id]}) if r.id in old else r for r in requests]
