"""What a model knows of requests before any edit: old answers that it gives, new answers that it gives already.

An answer is given when the model's greedy continuation of the bare prompt begins with it, token by token. That is
so exactly when each of its tokens is the model's first choice after the ones before it, so one forward pass tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Trainer

from pipeline.errors import UserError
from pipeline.evaluation.plan import Text
from pipeline.evaluation.reading import Reading, read_groups
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.requests.rows import Row, pack
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime


@dataclass
class Known:
    """Ids of requests by what the model gives.

    Attributes:
        asked: requests with an old answer.
        old: those of them whose old answer the model gives.
        new: requests whose new answer the model gives already.
        unusable: what is wrong with requests that the model cannot take: an answer of no token, a text too long.
    """

    asked: int = 0
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def find_known(
    llm: LLM,
    requests: Sequence[EditRequest],
    batch_size: int = 16,
    trainer: TrainerOptions | Trainer | None = None,
) -> Known:
    """Which old and new answers a model gives, as it is.

    Args:
        llm: the model.
        requests: whose answers are looked for; those that the model cannot take are named, not raised.
        batch_size: answers in a batch.
        trainer: what it runs on.
    """
    known = Known()
    rows: list[Row] = []
    for number, request in enumerate(requests):
        answers = {"new": request.new_answer} | ({"old": request.old_answer} if request.old_answer else {})
        pairs = [(request.prompt, answer) for answer in answers.values()]
        try:
            rows += llm.tokens.rows(pairs, [Text(kind, number) for kind in answers], f"request {request.id}")
        except UserError as error:
            known.unusable.append(str(error))
            continue
        known.asked += bool(request.old_answer)
    reading = Reading(llm, title="What the model knows")
    with llm.frozen():
        found = read_groups(reading, pack(rows), Runtime(trainer or TrainerOptions()), batch_size)
    for row in rows:
        if found[row.tag].choices == row.targets:
            getattr(known, row.tag.kind).append(requests[row.tag.request].id)
    return known
