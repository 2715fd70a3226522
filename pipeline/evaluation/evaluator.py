"""Stage three: measure a model on edit requests, before and after an update."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer

from pipeline.editing.update import WeightUpdate
from pipeline.evaluation.harness import load_tasks, run_tasks
from pipeline.evaluation.made import HOLDS
from pipeline.evaluation.metrics import Estimate, Resampled
from pipeline.evaluation.plan import KINDS, Plan, Text
from pipeline.evaluation.reading import Readings, TextReading, read
from pipeline.evaluation.values import Column, Values, figures, values_of
from pipeline.files import cached, unusable
from pipeline.model.fingerprints import sample
from pipeline.model.llm import LLM
from pipeline.options.shared import EvaluationOptions, TrainerOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.sharding import whole
from pipeline.running.trainer import Runtime

VERSION = 3  # of what is kept: what another version read is read anew
MOST_KEPT = 64  # measurements of base models; the ones not used for longest go

Metrics = dict[str, Estimate]


class Missed(NamedTuple):
    """A request to which the model does not give the new answer in some kind of asking."""

    request: int  # its number
    asked: str  # all prompts of that kind
    says: str


@dataclass
class Measurement:
    """A model's figures, the values that they are means of, and what it said."""

    metrics: Metrics  # every figure with its count and interval
    answers: list[str]  # in the requests' order, what the model says to their prompts
    said: dict[str, list[list[str]]] = field(default_factory=dict)  # by kind of prompt, and request, all of it
    # by metric, each request's value (perplexity and text_kl: each text window's; ability and the harness: each
    # item's); and resamples, for differences
    values: Values = field(default_factory=dict, compare=False, repr=False)
    resampled: dict[str, Resampled] = field(default_factory=dict, compare=False, repr=False)
    asked: dict[str, list[list[str]]] = field(default_factory=dict, compare=False)  # the prompts of what is `said`

    @property
    def missed(self) -> list[Missed]:
        """What does not hold: answers in which the new one does not stand, by the kinds that ask for it."""
        return [
            Missed(number, " | ".join(self.asked[kind][number]), " | ".join(self.said[kind][number]))
            for kind in HOLDS
            if (held := self.values.get(f"{kind}_containment"))
            for number, share in held.values.items()
            if share < 1
        ]


@dataclass
class Evaluation:
    """What the base model and, where there was an update, the edited one does."""

    before: Measurement
    after: Measurement | None = None
    difference: Metrics = field(default_factory=dict)  # after less before, with a paired bootstrap interval
    weights: dict[str, float] = field(default_factory=dict)  # of each tensor: ‖change‖ / ‖before‖, Frobenius norms


def evaluate(
    llm: LLM,
    requests: Sequence[EditRequest],
    update: WeightUpdate | None = None,
    options: EvaluationOptions | None = None,
    trainer: TrainerOptions | Trainer | None = None,
    work: Path | None = None,
) -> Evaluation:
    """Measure the base model and, with an update, the edited one; the model is the base again afterwards.

    What `work`, a folder for work in progress, holds of the same measurement is not read again. UserError for no
    requests, an update of another model, texts that do not fit the context, a text file too short, a task of the
    harness that cannot be run.

    Example:
        >>> learnt = EditOptions(method="finetune", expert={"learning_rate": 0.1, "whiten": 0})
        >>> update = edit(llm, requests, profile, learnt)
        >>> measured = evaluate(llm, requests, update, EvaluationOptions(generation="prompts"))
        >>> measured.difference["rewrite"].mean > 0
        True
    """
    if update:
        update.check_fits(llm)
    options = options or EvaluationOptions()
    evaluator = Evaluator(llm, requests, options, trainer, work=work)
    tasks = load_tasks(options.harness)  # before the work: what cannot be read or fetched is known now

    def measured(title: str) -> Measurement:
        found = evaluator.measure(title)
        for name, values, estimate in run_tasks(llm, tasks, options.harness_limit) if tasks else ():
            column = Column(values)
            found.values[name], found.resampled[name], found.metrics[name] = column, column.mean(), estimate
        return found

    before = measured("Measuring base")
    if update is None:
        return Evaluation(before)
    weights = relative_changes(llm, update)
    with update.applied(llm):
        after = measured("Measuring edited")
    difference = {
        name: found.minus(before.resampled[name]).estimate()
        for name, found in after.resampled.items()
        if name in before.resampled
    }
    return Evaluation(before, after, difference, weights)


@torch.no_grad()
def relative_changes(llm: LLM, update: WeightUpdate) -> dict[str, float]:
    """‖change‖ / ‖before‖ of every tensor of an update, the model being the base."""
    changes = {}
    for name, tensor in update.tensors.items():
        before = whole(llm.model.get_parameter(name)).cpu().float()
        changes[name] = ((tensor.cpu().float() - before).norm() / before.norm().clamp(min=1e-30)).item()
    return changes


class Evaluator:
    """Measures a model on the same texts again and again; the first measurement is what others compare to.

    What the base model says is kept on disk, and not read again for the same texts. What metrics mean:
    `pipeline.evaluation.values`.

    `kinds` are what to measure, of KINDS; the folder `work` takes readings batch by batch, for an interrupted
    measurement to go on from. UserError for no requests, or texts that cannot be measured.
    """

    def __init__(
        self,
        llm: LLM,
        requests: Sequence[EditRequest],
        options: EvaluationOptions | None = None,
        trainer: TrainerOptions | Trainer | None = None,
        kinds: Sequence[str] = KINDS,
        work: Path | None = None,
    ) -> None:
        self.llm = llm
        self.runtime = Runtime(trainer or TrainerOptions(), work=work)
        self.plan = Plan(llm, requests, options or EvaluationOptions(), kinds)
        self.first: dict[Text, TextReading] = {}  # shared with the parts that `only` makes

    def only(self, numbers: Collection[int], kinds: Sequence[str] = KINDS) -> Evaluator:
        """An evaluator of some of the requests, by their numbers; what either reads first counts for both."""
        part = copy(self)
        part.plan = self.plan.only(numbers, kinds)
        return part

    def measure(self, title: str) -> Measurement:
        """Figures of the model as it is now."""
        readings = self._readings(title)
        for text, reading in readings.texts.items():
            self.first.setdefault(text, reading)
        values = values_of(self.plan, readings, self.first)
        found = figures(values)
        said: dict[str, list[list[str]]] = {}
        asked: dict[str, list[list[str]]] = {}
        for one in self.plan.prompts:
            for by_kind, new in ((asked, one.prompt), (said, readings.answers[one.asked])):
                by_kind.setdefault(one.kind, [[] for _ in self.plan.requests])[one.request].append(new)
        answers = [own[0] if own else "" for own in said.get("generation", [[]] * len(self.plan.requests))]
        metrics = {name: figure.estimate() for name, figure in found.items()}
        return Measurement(metrics, answers, said, values, found, asked)

    def _readings(self, title: str) -> Readings:
        """What the model says, read now or, for the base model, kept from before."""
        is_first = not any(row.tag in self.first for row in self.plan.texts)
        now = sample(self.llm.model)
        about = (VERSION, self.llm.fingerprint, now, self.llm.model.dtype, self.runtime.precision, is_first)
        digest = self.plan.digest(*about, self.llm.ends)
        if is_first and now == self.llm.sample:
            kept = kept_folder(cached(f"base-{digest}"))
        else:
            kept = self.runtime.work / f"readings-{digest}" if self.runtime.work else None
        return read(self.llm, self.plan, self.first, self.runtime, title, kept)


def kept_folder(folder: Path | None) -> Path | None:
    """A folder for what the base says, marked as used now; None where that fails. Of many the oldest go."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
    except OSError as error:
        unusable(folder, error)
        return None
    with suppress(OSError):  # another command may be removing them, too
        for old in sorted(folder.parent.glob("base-*"), key=lambda one: one.stat().st_mtime)[:-MOST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return folder
