"""Old answers that requests do not give: the model's own, found by greedy generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.model import LLM, first_statement, generate
from pipeline.model.processes import from_first
from pipeline.options import AttributionOptions, TrainerOptions
from pipeline.requests import EditRequest

TOGETHER = 1024  # requests that are answered between two writes to the work folder


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
    texts: list[str] = []
    for start in range(0, len(asked), TOGETHER):
        prompts = [request.prompt for request in asked[start : start + TOGETHER]]
        file = work / f"old-answers-{start}.json" if work else None
        kept = from_first(json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else None)
        if kept is not None:
            texts += kept
            continue
        told = generate(llm, prompts, batch_size=options.batch_size, trainer=trainer, title="Old answers")
        texts += told
        _keep(file, told)
    old = {r.id: first_statement(text) for r, text in zip(asked, texts, strict=True)}
    silent = [r.id for r in asked if not old[r.id]]
    if silent:
        raise UserError(
            f"requests: {llm.name} gives no answer of its own to {', '.join(silent[:5])}; give old_answer"
        )
    return [r.model_copy(update={"old_answer": old[r.id]}) if r.id in old else r for r in requests]


@rank_zero_only
def _keep(file: Path | None, texts: list[str]) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, texts)
