"""What a model says to all of a plan, and how far its next-token distributions are from the base's.

A distribution over the vocabulary is large, what the head makes it from is small: the hidden state. No edit changes
the head, so the base's hidden states, kept, give its distributions again, exactly, beside those of the model as it
is now. Shapes: N tokens that are predicted, M of them compared, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.evaluation.plan import Asked, Plan, Text
from pipeline.model.activations import RowStage, head_reads, wide_logits
from pipeline.model.generation import Question, Saying
from pipeline.model.llm import LLM
from pipeline.options.shared import TrainerOptions
from pipeline.requests.rows import Batch, Row, means_by, pack
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

BATCH_SIZE = 64  # most rows or questions in a batch
BATCH_TOKENS = 1024  # most tokens in a batch, padding counted; a longer text is a batch of its own
EVERY = 8  # of ordinary text, one position in so many is compared

K = TypeVar("K")


class TextReading(NamedTuple):
    """What a model makes of a text; the last two where distributions are compared."""

    choices: list[int]  # its first choices at the target tokens
    loss: float  # mean −log p of these, in nats
    hidden_MD: Tensor | None = None  # where there is no base to compare with yet: what the head read
    divergence: float | None = None  # where there is one: mean KL(base ‖ now) in nats


TextReadings = Mapping[Text, TextReading]


@dataclass
class Readings:
    """What a model says: of texts, to prompts, and by request at length."""

    texts: dict[Text, TextReading]
    answers: dict[Asked, str]
    long: dict[int, str]


class Reading(RowStage):
    """Reads groups of texts that share a row (see `pack`): an output is what is read of each text of a group.

    Distributions of `compared` texts are compared; `base` is what the base's head read of them before, (M, D).
    """

    def __init__(
        self,
        llm: LLM,
        compared: Collection[Text] = (),
        base: Mapping[Text, Tensor] | None = None,
        title: str = "Measuring",
    ) -> None:
        super().__init__(llm)
        self.compared, self.base, self.title = compared, base or {}, title

    def step(self, batch: Batch) -> list[list[tuple[Any, ...]]]:
        """For each group, the fields of a `TextReading` of each of its texts."""
        places = _compared_places(batch, self.compared)
        before = {text: self.base[text] for text in places if text in self.base}
        also_MD = torch.cat(list(before.values())) if before else None
        with head_reads(self.model, batch.row_N, batch.position_N, also_MD) as hidden:
            logits_NV = wide_logits(self.model(input_ids=batch.input_ids_BT, use_cache=False))
        logits_NV, base_MV = logits_NV.split([len(batch.target_N), len(logits_NV) - len(batch.target_N)])
        moved = _divergences(base_MV, logits_NV, {text: places[text] for text in before})
        kept = {text: hidden[0][places[text]].float().cpu() for text in places if text not in before}
        found: list[list[tuple[Any, ...]]] = [[] for _ in batch.input_ids_BT]
        for row, text, (choices, loss) in zip(batch.row_of, batch.texts, _choices(batch, logits_NV), strict=True):
            found[row].append((choices, loss, kept.get(text.tag), moved.get(text.tag)))
        return found


def _compared_places(batch: Batch, compared: Collection[Text]) -> dict[Text, list[int]]:
    """Which of the batch's targets are compared, by text: of ordinary text one in EVERY, of a probe the first."""
    places, start = {}, 0
    for text in batch.texts:
        if text.tag in compared:
            count = len(text.targets) if text.tag.kind == "text" else 1
            places[text.tag] = list(range(start, start + count, EVERY))
        start += len(text.targets)
    return places


def _divergences(base_MV: Tensor, now_NV: Tensor, places: Mapping[Text, list[int]]) -> dict[Text, float]:
    """Mean KL(base ‖ now) of each text; never below nought, which only rounding could bring."""
    if not places:
        return {}
    taken = [place for each in places.values() for place in each]
    base_MV, now_MV = base_MV.log_softmax(-1), now_NV[taken].log_softmax(-1)
    moved_M = (base_MV.exp() * (base_MV - now_MV)).sum(-1).clamp(min=0).cpu()
    parts = moved_M.split([len(each) for each in places.values()])
    return {text: part.mean().item() for text, part in zip(places, parts, strict=True)}


def _choices(batch: Batch, logits_NV: Tensor) -> list[tuple[list[int], float]]:
    """First choices and mean loss of each text."""
    choices = logits_NV.argmax(-1).cpu().split([len(text.targets) for text in batch.texts])
    losses_N = F.cross_entropy(logits_NV, batch.target_N, reduction="none").cpu().double()
    losses = means_by(losses_N, batch.text_N.cpu(), len(batch.texts))
    if not losses.isfinite().all():
        raise UserError("evaluation: the model's loss is not a number: its weights are broken")
    return [(chosen.tolist(), loss) for chosen, loss in zip(choices, losses.tolist(), strict=True)]


def read(llm: LLM, plan: Plan, base: TextReadings, runtime: Runtime, title: str, kept: Path | None) -> Readings:
    """What the model says to all of a plan; `base` is what was read of these texts before.

    What is found in `kept`, a folder whose name stands for all of this, is not read again.
    """
    hidden = {text: reading.hidden_MD for text, reading in base.items() if reading.hidden_MD is not None}

    def said(questions: Mapping[K, Question], name: str) -> dict[K, str]:
        stage, folder = Saying(llm, f"{title}: {name}"), kept and kept / name
        asked = list(questions.values())
        texts = run(stage, asked, runtime, lambda one: len(one.token_ids), BATCH_SIZE, BATCH_TOKENS, folder)
        return dict(zip(questions, texts, strict=True))

    with llm.frozen():
        reading = Reading(llm, plan.compared, hidden, title)
        texts = read_groups(reading, plan.groups(), runtime, kept=kept and kept / "texts")
        return Readings(texts, said(plan.questions, "answers"), said(plan.long, "long answers"))


def read_groups(
    stage: Reading, groups: Sequence[list[Row]], runtime: Runtime, kept: Path | None = None
) -> dict[Text, TextReading]:
    """What a stage reads of each text, in groups that share a row."""
    outputs = run(stage, groups, runtime, size, BATCH_SIZE, BATCH_TOKENS, kept)
    texts = [text for group in groups for text in group]
    readings = [TextReading(*reading) for output in outputs for reading in output]
    return {text.tag: reading for text, reading in zip(texts, readings, strict=True)}


def size(group: list[Row]) -> int:
    """A group's tokens, for batches; a window of ordinary text, which predicts each token, fills one by itself."""
    length = len(group[0].token_ids) - 1
    return max(length, BATCH_TOKENS) if group[0].tag.kind == "text" else length


@dataclass
class Known:
    """Ids of requests by what the model gives."""

    asked: int = 0  # requests with an old answer
    old: list[str] = field(default_factory=list)  # those of them whose old answer the model gives
    new: list[str] = field(default_factory=list)  # requests whose new answer the model gives already
    unusable: list[str] = field(default_factory=list)  # what is wrong with requests that the model cannot take


def find_known(llm: LLM, requests: Sequence[EditRequest], trainer: TrainerOptions | Trainer | None = None) -> Known:
    """Which old and new answers a model gives, as it is.

    An answer is given when the model's greedy continuation of the bare prompt begins with it, token by token. That
    is so exactly when each of its tokens is the model's first choice after the ones before it, so one pass tells.
    Requests that the model cannot take are named, not raised.
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
        found = read_groups(reading, pack(rows), Runtime(trainer or TrainerOptions()))
    for row in rows:
        if found[row.tag].choices == row.targets:
            getattr(known, row.tag.kind).append(requests[row.tag.request].id)
    return known
