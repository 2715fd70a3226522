"""Stage three: measure a model on edit requests, before and after an update."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.editing import WeightUpdate
from pipeline.evaluation.metrics import Estimate, Resampled
from pipeline.evaluation.plan import KINDS, Plan
from pipeline.evaluation.reading import Reader
from pipeline.evaluation.readings import Readings
from pipeline.evaluation.values import Values, figures, values_of
from pipeline.model import LLM, build_trainer
from pipeline.model.llm import fingerprint
from pipeline.running.processes import from_first
from pipeline.running.sharding import whole
from pipeline.model.trainer import check_shares, predict
from pipeline.options import EvaluationOptions, TrainerOptions
from pipeline.requests import EditRequest

Metrics = dict[str, Estimate]


@dataclass
class Measurement:
    """A model's figures, the values that they are means of, and what it said.

    Attributes:
        metrics: every figure with its count and interval.
        answers: in the requests' order, what the model says to their prompts.
        said: by kind of prompt, and request, all that it said.
        values: by metric, each request's value (perplexity and text_kl: each text window's).
        resampled: the figures of every resample, for differences.
    """

    metrics: Metrics
    answers: list[str]
    said: dict[str, list[list[str]]] = field(default_factory=dict)
    values: Values = field(default_factory=dict, compare=False, repr=False)
    resampled: dict[str, Resampled] = field(default_factory=dict, compare=False, repr=False)


@dataclass
class Evaluation:
    """What the base model and, where there was an update, the edited one does.

    Attributes:
        before, after: their figures and answers.
        difference: after less before, of the same units, with a paired bootstrap interval.
        weights: how much the update changed each tensor: ‖change‖ / ‖before‖, Frobenius norms.
    """

    before: Measurement
    after: Measurement | None = None
    difference: Metrics = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def evaluate(
    llm: LLM,
    requests: Sequence[EditRequest],
    update: WeightUpdate | None = None,
    options: EvaluationOptions | None = None,
    trainer: TrainerOptions | None = None,
    work: Path | None = None,
) -> Evaluation:
    """Measure the base model and, with an update, the edited one; the model is the base again afterwards.

    Args:
        llm: the base model.
        requests: what to measure on.
        update: what to measure the effect of.
        options: how to measure.
        trainer: what it runs on.
        work: a folder for work in progress; what is found there of the same measurement is not read again.

    Raises:
        UserError: for no requests, an update of another model, texts that do not fit the context, a text file
            too short.

    Example:
        >>> learnt = EditOptions(method="finetune", finetune=FinetuneOptions(epochs=30, whiten=0.0))
        >>> update = edit(llm, requests, profile, learnt)
        >>> measured = evaluate(llm, requests, update, EvaluationOptions(generation="prompts"))
        >>> measured.difference["rewrite"].mean > 0
        True
    """
    if update:
        llm.check_made_for("update", update.model, update.fingerprint)
    evaluator = Evaluator(llm, requests, options, trainer, work=work)
    before = evaluator.measure("Measuring base")
    if update is None:
        return Evaluation(before)
    weights = relative_changes(llm, update)
    with update.applied(llm):
        after = evaluator.measure("Measuring edited")
    return Evaluation(before, after, differences(before, after), weights)


def differences(before: Measurement, after: Measurement) -> Metrics:
    """After less before, for every figure that both have."""
    return {
        name: found.minus(before.resampled[name]).estimate()
        for name, found in after.resampled.items()
        if name in before.resampled
    }


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

    What the base model says is kept on disk, and not read again for the same texts.

    Metrics, each a mean over requests with its count and 95% interval:
        generation_, rephrase_, portability_, distractor_exact_match and _containment: `generation_values`.
        rewrite, rephrase, locality, portability, the latter two also by axis: `teacher_forced_values`.
        efficacy_, paraphrase_, neighbourhood_success and _magnitude, rome_score: `probability_values`.
        perplexity (its count in tokens), locality_kl, text_kl, fluency: `damage_values`.

    Args:
        llm: the model.
        requests: what to measure on.
        options: how to measure.
        trainer: what it runs on.
        kinds: what to measure, of KINDS.
        work: a folder that takes readings batch by batch, and those of an interrupted measurement.

    Raises:
        UserError: for no requests, or texts that cannot be measured.
    """

    def __init__(
        self,
        llm: LLM,
        requests: Sequence[EditRequest],
        options: EvaluationOptions | None = None,
        trainer: TrainerOptions | None = None,
        kinds: Sequence[str] = KINDS,
        work: Path | None = None,
    ) -> None:
        self.llm = llm
        self.work = work
        self.trainer = trainer or TrainerOptions()
        self.plan = Plan(llm, requests, options or EvaluationOptions(), kinds)
        self.first: Readings | None = None

    def only(self, numbers: Collection[int], kinds: Sequence[str] = KINDS) -> Evaluator:
        """An evaluator of some of the requests, by their numbers; what was measured first of them still counts."""
        part = copy(self)
        part.plan = self.plan.only(numbers, kinds)
        return part

    def measure(self, title: str) -> Measurement:
        """Figures of the model as it is now."""
        readings = self._readings(title)
        self.first = self.first or readings
        values = values_of(self.plan, readings, self.first)
        found = figures(values)
        said: dict[str, list[list[str]]] = {}
        for one, question in zip(self.plan.asked, self.plan.question_of, strict=True):
            told = said.setdefault(one.kind, [[] for _ in self.plan.requests])
            told[one.request].append(readings.said[question])
        answers = (
            [texts[0] if texts else "" for texts in said["generation"]] if said else [""] * len(self.plan.requests)
        )
        metrics = {name: figure.estimate() for name, figure in found.items()}
        return Measurement(metrics, answers, said, values, found)

    def _readings(self, title: str) -> Readings:
        """What the model says, read now or, for the base model, kept from before."""
        trainer = build_trainer(self.trainer, title)
        check_shares(trainer, len(self.plan.requests))
        file = self._file()
        kept = from_first(Readings.kept(file) if file else None)
        if kept:
            return kept
        reader = Reader(self.llm, self.plan.offsets, self.first)
        with self.llm.frozen():
            readings = Readings.of(predict(trainer, reader, self.plan.data(), self._log()))
        if file and self.first is None:
            with suppress(OSError):  # a full disk costs the next command time, and this one nothing
                readings.keep(file)
        return readings

    def _file(self) -> Path | None:
        """Where the readings are kept: those of the base model, which no edit is applied to, unless told not to."""
        is_base = fingerprint(self.llm.model) == self.llm.fingerprint
        return self.plan.file(self.trainer) if is_base and self.plan.options.keep_base else None

    def _log(self) -> Path | None:
        """Where readings of the model as it is now are kept batch by batch; the name stands for all of it."""
        if self.work is None:
            return None
        return self.work / f"readings-{fingerprint(self.llm.model)}-{self.plan.file(self.trainer).stem}"
