"""What fine-tuning trains on: requests bare and under contexts, and prompts that are to be answered as before.

What training does not change is read once, before it: what enters the lowest trained block, for every row, and
what the unedited model says after the unrelated prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.editing.contexts import CONTEXTS, in_context, neighbours
from pipeline.editing.entering import Entering, SaidNext, going_on
from pipeline.model.llm import LLM
from pipeline.requests.rows import Batch, Row, collate
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

UNRELATED = 1024  # the most unrelated prompts: what comes after each is kept, a vocabulary wide
NAMES_EACH = 3  # other names that a request's prompt is tried with, a new one every epoch


class Lesson(NamedTuple):
    """A row to train on, with what was read of it.

    Attributes:
        row: the text, by its request's id.
        enter_TD: what enters the lowest trained block; None at block 0, below which nothing runs.
        base_V: of an unrelated prompt, the unedited model's log-probabilities after it.
    """

    row: Row
    enter_TD: Tensor | None
    base_V: Tensor | None


@dataclass
class Lessons:
    """What is taught together: each request's lessons (bare, then under each context), and unrelated prompts."""

    taught: list[list[Lesson]]
    others: list[Lesson]

    def of_epoch(self, request: int, epoch: int) -> Lesson:
        """The bare prompt in even epochs, contexts in turn in odd ones: rows of a batch are of like length."""
        own = self.taught[request]
        return own[0] if epoch % 2 == 0 or len(own) == 1 else own[1 + (epoch // 2 + request) % (len(own) - 1)]

    def other(self, request: int, epoch: int) -> Lesson:
        """An unrelated prompt; every epoch brings other names."""
        return self.others[(request + epoch * len(self.taught)) % len(self.others)]


def collate_lessons(
    taught: Sequence[Lesson], others: Sequence[Lesson], weights: tuple[float, float], pad_token_id: int
) -> Batch:
    """Requests' rows, then unrelated prompts, as a batch; `weights` of a row of each kind in the loss."""
    own = [*taught, *others]
    enter = [one.enter_TD for one in own if one.enter_TD is not None]
    base = [one.base_V for one in others if one.base_V is not None]
    return replace(
        collate([one.row for one in own], pad_token_id),
        weight_B=torch.tensor([weights[0]] * len(taught) + [weights[1]] * len(others)),
        enter_BTD=nn.utils.rnn.pad_sequence(enter, batch_first=True) if enter else None,
        base_KV=torch.stack(base) if base else None,
    )


def teaching_loss(batch: Batch, logits_NV: Tensor, learnt: float, kl: float) -> tuple[Tensor, Tensor]:
    """Σ weight · ℓ(x, y_new) over rows that are not learnt yet, plus `kl` · Σ weight · KL(base ‖ now) over prompts
    about something else; and ℓ, in nats, of each taught row."""
    losses_B = batch.losses(logits_NV)
    weight_B = torch.full_like(losses_B, 1 / len(losses_B)) if batch.weight_B is None else batch.weight_B
    weight_B = weight_B.to(losses_B)
    taught = len(losses_B) - (0 if batch.base_KV is None else len(batch.base_KV))
    unlearnt_B = losses_B[:taught].detach() > learnt
    loss = (weight_B[:taught] * losses_B[:taught] * unlearnt_B).sum()
    if batch.base_KV is not None:
        now_KV = logits_NV[-len(batch.base_KV) :].log_softmax(-1)
        kl_K = F.kl_div(now_KV, batch.base_KV, log_target=True, reduction="none").sum(-1)
        loss = loss + kl * weight_B[taught:] @ kl_K
    return loss, losses_B[:taught]


def read_lessons(
    llm: LLM, layer: int, groups: Sequence[Sequence[EditRequest]], contexts: int, unrelated: bool, runtime: Runtime
) -> list[Lessons]:
    """What is to be taught to each group of requests, which know nothing of each other.

    Args:
        llm: the model as it is before training.
        layer: the lowest block that will be trained.
        groups: requests that are taught together.
        contexts: how many contexts a prompt is put under.
        unrelated: whether prompts about something else are wanted.
        runtime: what it runs with.
    """
    templates = CONTEXTS[: 1 + contexts]
    requests = [request for group in groups for request in group]
    texts = [(in_context(template, r)[0], r.new_answer) for r in requests for template in templates]
    taught = llm.tokens.rows(texts, tags=[r.id for r in requests for _ in templates])
    names = [neighbours(group, NAMES_EACH, UNRELATED) if unrelated else [] for group in groups]
    others = [going_on(ids) for ids in llm.tokens.prompts([text for some in names for text, _ in some])]
    rows = [*taught, *others]
    enter = run(Entering(llm, layer), rows, runtime, Row.length) if layer else [None] * len(rows)
    said = run(SaidNext(llm), others, runtime, Row.length)
    base = [*([None] * len(taught)), *said]
    lessons = (
        Lesson(row, enter_TD[: row.length() - 1] if layer else None, base_V)  # the last token predicts nothing
        for row, enter_TD, base_V in zip(rows, enter, base, strict=True)
    )
    own = [[list(islice(lessons, len(templates))) for _ in group] for group in groups]
    return [Lessons(of_group, list(islice(lessons, len(some)))) for of_group, some in zip(own, names, strict=True)]
