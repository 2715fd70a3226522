"""What fine-tuning trains on: requests bare and under contexts, and prompts that are to be answered as before.

What training does not change is read once, before it: what enters the lowest trained block, for every row, and
what the unedited model's head reads of texts that are to go on as before. Steps are the same on any number of
devices, and a training that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.editing.contexts import (
    chat_forms,
    in_chat,
    neighbours,
    plain_forms,
    questions_about,
    relations,
    statements_about,
)
from pipeline.editing.entering import Entering, HeadReads, going_on
from pipeline.editing.relations import statement
from pipeline.model.generation import Question, Saying, questions
from pipeline.model.llm import LLM
from pipeline.model.suffix import parts_of
from pipeline.requests.rows import Batch, Row, collate, means_by
from pipeline.requests.schema import EditRequest
from pipeline.requests.tokens import PLAIN, Joining
from pipeline.running.interrupts import interrupts
from pipeline.running.kept import is_whole
from pipeline.running.processes import from_first
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

UNRELATED = 2048  # the most texts that are to go on as before
PLACES = 4  # at the end of a prompt that is to go on as before, where it is
PIECE, PIECE_PLACES, PIECES = 32, 16, 4  # of ordinary text: tokens, places at their end, and one to so many others
ANSWER = 12  # tokens of an answer to another question about a subject
APART = "apart"  # the tag of texts about no request's subject: prompts with another name, and ordinary text
SAME = 3  # tokens: relations after which as much is said as after the request's prompt may be the request's own
READ_TOGETHER = 32  # rows or questions
EVERY = 30.0  # seconds between two checkpoints within an epoch
NAMES_EACH = 9  # other names that a request's prompt is tried with, for every two kept texts in a step
RELATIONS_EACH = 3  # of a request's subject


class Lesson(NamedTuple):
    """A row to train on, with what was read of it."""

    row: Row  # the text, by its request's id
    enter_TD: Tensor | None  # what enters the lowest trained block; None at block 0, below which nothing runs
    base_PD: Tensor | None  # of one that is to go on as before, what the base's head reads at its last P places


@dataclass
class Lessons:
    """What is taught together: each request's lessons (bare, then in other forms), and texts to go on as before."""

    taught: list[list[Lesson]]
    others: list[Lesson]

    def of_epoch(self, request: int, epoch: int) -> Lesson:
        """The bare prompt in every fourth epoch, other forms in turn in the others."""
        own, (round, place) = self.taught[request], divmod(epoch, 4)
        others = len(own) - 1
        return own[0] if place == 0 or not others else own[1 + (3 * round + place - 1 + request) % others]

    def kept(self, step: int, number: int) -> list[Lesson]:
        """At most so many texts that are to go on as before; every step brings others, until all have come."""
        number = min(number, len(self.others))
        return [self.others[(step * number + each) % len(self.others)] for each in range(number)]


def collate_lessons(
    taught: Sequence[Lesson], others: Sequence[Lesson], weights: tuple[float, float], pad_token_id: int
) -> Batch:
    """Requests' rows, then unrelated prompts, as a batch; `weights` of a row of each kind in the loss."""
    own = [*taught, *others]
    enter = [one.enter_TD for one in own if one.enter_TD is not None]
    base = [one.base_PD for one in others if one.base_PD is not None]
    return replace(
        collate([one.row for one in own], pad_token_id),
        weight_B=torch.tensor([weights[0]] * len(taught) + [weights[1]] * len(others)),
        enter_BTD=nn.utils.rnn.pad_sequence(enter, batch_first=True) if enter else None,
        base_MD=torch.cat(base) if base else None,
    )


def teaching_loss(
    batch: Batch, logits_NV: Tensor, base_MV: Tensor, learnt: float, kl: float
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and ℓ, in nats, of each taught row.

    It is Σ weight · ℓ(x, y_new) over rows that are not learnt yet, plus `kl` · Σ weight · KL(base ‖ now) over texts
    that are to go on as before, each the mean over its places: M in all, the last of the batch.
    """
    losses_B = batch.losses(logits_NV)
    weight_B = torch.full_like(losses_B, 1 / len(losses_B)) if batch.weight_B is None else batch.weight_B
    weight_B, kept = weight_B.to(losses_B), len(base_MV)
    taught = int(batch.text_N[-kept]) if kept else len(losses_B)
    unlearnt_B = losses_B[:taught].detach() > learnt
    loss = (weight_B[:taught] * losses_B[:taught] * unlearnt_B).sum()
    if kept:
        now_MV, base_MV = logits_NV[-kept:].log_softmax(-1), base_MV.detach().log_softmax(-1)
        kl_M = F.kl_div(now_MV, base_MV, log_target=True, reduction="none").sum(-1)
        loss = loss + kl * weight_B[taught:] @ means_by(kl_M, batch.text_N[-kept:] - taught, len(losses_B) - taught)
    return loss, losses_B[:taught]


class Text(NamedTuple):
    """A text to read a lesson from: of which course, and of which request in it, by number (None: to go on)."""

    row: Row
    course: int
    request: int | None = None


def read_lessons(
    llm: LLM,
    layer: int,
    groups: Sequence[Sequence[EditRequest]],
    contexts: int,
    names: int,
    runtime: Runtime,
    ordinary: Sequence[list[int]] = (),
) -> list[list[Lessons]]:
    """What is to be taught to each group of requests, which know nothing of each other: as plain text, and as chat.

    `layer` is the lowest block that will be trained, `contexts` how many a prompt is put under, and `names` how
    many other names each prompt is to go on with as before, beside what else is said of requests' subjects and
    pieces of windows of `ordinary` text; 0: nothing is kept.
    """
    spoken = llm.tokens.bare_template
    joinings = [PLAIN, *([spoken] if spoken else [])]
    courses = [(group, joining) for group in groups for joining in joinings]
    taught = [text for number, course in enumerate(courses) for text in _taught(llm, number, *course, contexts)]
    others = _others(llm, courses, names, ordinary, runtime) if names else []
    rows = [text.row for text in (*taught, *others)]
    alone = layer > 0 and parts_of(llm).blocks
    enter = run(Entering(llm, layer), rows, runtime, Row.length) if alone else [None] * len(rows)
    base = [None] * len(taught) + run(HeadReads(llm), [text.row for text in others], runtime, Row.length)
    read = [Lessons([[] for _ in group], []) for group, _ in courses]
    for (row, course, request), enter_TD, base_PD in zip([*taught, *others], enter, base, strict=True):
        # the last token predicts nothing
        lesson = Lesson(row, enter_TD[: row.length() - 1] if enter_TD is not None else None, base_PD)
        (read[course].others if request is None else read[course].taught[request]).append(lesson)
    return [read[start : start + len(joinings)] for start in range(0, len(read), len(joinings))]


def _taught(llm: LLM, course: int, group: Sequence[EditRequest], joining: Joining, contexts: int) -> Iterator[Text]:
    """Each request's prompt and new answer in every form of a kind; the first is the bare prompt, or a question."""
    asked = [plain_forms(one, contexts) if joining is PLAIN else chat_forms(one, llm.chat) for one in group]
    pairs = [pair for of_request in asked for pair in of_request]
    numbers = [number for number, texts in enumerate(asked) for _ in texts]
    tags = [group[number].id for number in numbers]
    rows = llm.tokens.rows(pairs, tags=tags, ended=True, joining=joining)
    return (Text(row, course, number) for row, number in zip(rows, numbers, strict=True))


def _others(
    llm: LLM,
    courses: Sequence[tuple[Sequence[EditRequest], Joining]],
    names: int,
    ordinary: Sequence[list[int]],
    runtime: Runtime,
) -> list[Text]:
    """Of each course, at most `UNRELATED` texts that are to go on as before.

    They are requests' prompts with other names, and what else is said of requests' subjects: in a chat, questions
    about these, with the unedited model's own answers. Ordinary text stands beside plain ones.
    """
    pieces = [ids[at : at + PIECE] for ids in ordinary for at in range(0, len(ids) - PIECE + 1, PIECE)]
    spoken = courses[-1][1]
    related = _related(llm, {request.id: request for group, _ in courses for request in group}, runtime)
    rows: list[list[Row]] = []
    asked: list[tuple[int, str]] = []  # in which course, and what
    for course, (group, joining) in enumerate(courses):
        texts = [text for text, _ in neighbours(group, names, UNRELATED)]
        tags = [APART] * len(texts)
        if joining is PLAIN:
            texts += [text for one in group for text in statements_about(one, related[one.id])]
            ids = llm.tokens.prompts(texts, PLAIN)
        else:
            asked += [(course, text) for one in group for text in questions_about(one, related[one.id])]
            ids = llm.tokens.opened([*map(in_chat, texts)], joining)
        read = zip_longest(ids, tags)
        rows.append([going_on(one, PLACES)._replace(tag=tag) for one, tag in read])
        if joining is PLAIN:
            some = random.Random(runtime.seed).sample(pieces, min(len(pieces), len(rows[-1]) // PIECES))
            rows[-1] += [going_on(one, PIECE_PLACES)._replace(tag=APART) for one in some]
    openings = questions(llm, [text for _, text in asked], ANSWER, spoken)
    answers = _said(llm, openings, runtime)
    whole = llm.tokens.opened([(text, answer) for (_, text), answer in zip(asked, answers, strict=True)], spoken)
    for (course, _), opening, told in zip(asked, openings, whole, strict=True):
        rows[course].append(going_on(told, 1 + len(told) - len(opening.token_ids)))
    for own in rows:
        random.Random(runtime.seed).shuffle(own)
    return [Text(row, course) for course, own in enumerate(rows) for row in own[:UNRELATED]]


def _related(llm: LLM, requests: Mapping[str, EditRequest], runtime: Runtime) -> dict[str, list[str]]:
    """Other relations of each request's subject, by the request's id.

    One after which the model says the same as after the request's prompt may ask the same: it is left out.
    """
    found = {name: relations(request, RELATIONS_EACH, runtime.seed) for name, request in requests.items()}
    texts = [
        text
        for name, some in found.items()
        for text in (requests[name].prompt, *(statement(one, requests[name].subject or "") for one in some))
    ]
    said = iter(_said(llm, questions(llm, texts, SAME, PLAIN), runtime))
    for name, some in found.items():
        own = next(said)
        found[name] = [relation for relation in some if next(said) != own]
    return found


def _said(llm: LLM, openings: Sequence[Question], runtime: Runtime) -> list[str]:
    """What the model says to each."""
    stage = Saying(llm, "Asking what is to stay")
    return run(stage, openings, runtime, lambda one: len(one.token_ids), READ_TOGETHER)


class LessonData(LightningDataModule):
    """Lessons in batches for `fit`, a course in one epoch and the other in the next: rows of a batch are alike.

    It goes on within an epoch from where a checkpoint was written. A batch holds the same requests on any number of
    devices and in any number of micro-batches. Weights are such that the mean over devices and micro-batches is the
    mean over all rows. All devices take part in each step: one for which no row is left takes one along that counts
    nothing.
    """

    def __init__(
        self, courses: Sequence[Lessons], batch_size: int, kept: int, pad_token_id: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.courses, self.batch_size, self.kept = courses, batch_size, kept
        self.pad_token_id, self.seed = pad_token_id, seed
        self.begun = (0, 0)  # an epoch, and how many of its micro-batches were run before

    def train_dataloader(self) -> LessonData:
        """This device's micro-batches."""
        return self

    def __len__(self) -> int:
        assert self.trainer
        return -(-len(self.courses[0].taught) // self.batch_size) * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        assert self.trainer
        epoch, parts = self.trainer.current_epoch, self.trainer.accumulate_grad_batches
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.courses[0].taught), generator=generator).tolist()
        for number in range(self.begun[1] if epoch == self.begun[0] else 0, len(self)):
            step, part = divmod(number, parts)
            yield self._batch(order[step * self.batch_size :][: self.batch_size], part, parts, epoch, step)

    def _batch(self, picked: list[int], part: int, parts: int, epoch: int, step: int) -> Batch:
        """Of the requests of a step, and more texts that are to go on as before, this device's in a micro-batch."""
        assert self.trainer
        turn, course = divmod(epoch, len(self.courses))
        lessons = self.courses[course]
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        kept = lessons.kept(turn * (len(self) // parts) + step, self.kept * self.batch_size)
        own, own_kept = picked[rank::devices][part::parts], kept[rank::devices][part::parts]
        weights = devices * parts / len(picked) if own else 0.0, devices * parts / max(1, len(kept))
        taught = [lessons.of_epoch(number, turn) for number in own or picked[:1]]
        return collate_lessons(taught, own_kept, weights, self.pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its micro-batches were run."""
        assert self.trainer
        run = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"begun": (self.trainer.current_epoch, run)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.begun = state_dict["begun"]


class KeepTraining(Checkpoint):
    """Keeps a training in one file of a folder: after each epoch, and now and then within it, between two steps."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "training.ckpt"
        self.due = time.monotonic() + EVERY

    def found(self) -> Path | None:
        """The file that an interrupted training has left; one that is damaged counts as not there."""
        return from_first(self.file if is_whole(self.file) else None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        between_steps = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not between_steps or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if from_first(interrupts.noted is not None or time.monotonic() > self.due):
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.file)  # whole or not at all; all processes take part
        self.due = time.monotonic() + EVERY
