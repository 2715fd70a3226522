"""One batch: edited on top of the version in force, measured, and where a gate fails, halved and tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate, accept, can_leave_out, edit, leave_out
from pipeline.errors import UserError
from pipeline.evaluation import Evaluator
from pipeline.evaluation.plan import KINDS
from pipeline.model import LLM
from pipeline.options import ProvingOptions
from pipeline.requests import EditRequest, fact
from pipeline.updates.gates import OF_MODEL, Figures, Gate, drift, missed
from pipeline.updates.queue import Contradiction, number_of

FOR_GATES = ("probes", "text")  # the kinds of measurement that gates need


class BaseVersion(NamedTuple):
    """The version in force, which a batch is edited on top of; its update is None for the base model itself."""

    number: int
    update: WeightUpdate | None

    @property
    def requests(self) -> list[EditRequest]:
        """The facts that it holds."""
        return self.update.requests if self.update else []


class HeldBack(NamedTuple):
    """A request that is not applied: its number, why, and the figures that it reached alone."""

    number: int
    reason: str
    figures: dict[str, float]


@dataclass
class BatchResult:
    """What came of a batch.

    Attributes:
        applied: what was accepted.
        held: what was not.
        update: the version in force with what was accepted in it, or without what was retracted; None: as it was.
        before, after: the figures on those requests; None where there are none.
        gates: those of `after`.
        seconds: of editing and of measuring.
        version: what was published; None when nothing was.
        superseded: which requests gave way to newer ones.
        overtaken: whether another version became current meanwhile, so that nothing was published.
    """

    applied: list[EditRequest] = field(default_factory=list)
    held: list[HeldBack] = field(default_factory=list)
    update: WeightUpdate | None = None
    before: Figures | None = None
    after: Figures | None = None
    gates: list[Gate] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    version: int | None = None
    superseded: list[Contradiction] = field(default_factory=list)
    overtaken: bool = False


def split_by_fit(
    llm: LLM, batch: Sequence[EditRequest], options: ProvingOptions
) -> tuple[list[EditRequest], list[HeldBack]]:
    """Those of a batch that the method and the model can take, and those that they cannot."""

    def problem(requests: Sequence[EditRequest]) -> str:
        try:
            Evaluator(llm, accept(requests, options.edit), options.evaluation, kinds=("probes", "generation"))
        except UserError as error:
            return str(error)
        return ""

    if not problem(batch):
        return list(batch), []
    problems = [problem([request]) for request in batch]
    fitting = [request for request, reason in zip(batch, problems, strict=True) if not reason]
    return fitting, [
        HeldBack(number_of(request), reason, {}) for request, reason in zip(batch, problems, strict=True) if reason
    ]


class BatchEvaluator:
    """Measures versions of the model on the requests of a batch, and on a sample of earlier facts.

    Args:
        llm: the base model.
        base: the version in force.
        batch: the requests.
        options: how to measure, and the gates.

    Attributes:
        before: the figures of the version in force, which locality is measured against.
        seconds: how long was measured and, by whoever adds to it, edited.

    Raises:
        UserError: when texts do not fit the model, or the version in force itself misses a gate.
    """

    def __init__(self, llm: LLM, base: BaseVersion, batch: Sequence[EditRequest], options: ProvingOptions) -> None:
        self.llm, self.base, self.options = llm, base, options
        self.seconds = {"edit": 0.0, "evaluation": 0.0}
        self.evaluator = Evaluator(llm, batch, options.evaluation, options.one_device)
        earlier = self._earlier_facts({fact(request) for request in batch})
        self.earlier = (
            Evaluator(llm, earlier, options.evaluation, options.one_device, ("probes",)) if earlier else None
        )
        with self.timed("evaluation"):
            text = self.evaluator.only((), ("text",)).measure("Measuring base")
        self.perplexity = text.metrics["perplexity"].mean
        self.before = self._measure(base.update, self.evaluator)
        if problem := missed(self.before.gates(options.gates, OF_MODEL)):
            raise UserError(
                f"update: version {base.number}, which is in force, misses gates itself: {problem}; "
                "roll back, retract what is not needed, or change --gates"
            )

    def _earlier_facts(self, renewed: Collection[tuple[str, str]]) -> list[EditRequest]:
        """A sample of the facts that the batch leaves in force, prompts and new answers alone."""
        held = [request for request in self.base.requests if fact(request) not in renewed]
        most = min(self.options.gates.earlier_sample, len(held))
        chosen = random.Random(self.options.seed + self.base.number).sample(held, most)
        return [one.model_copy(update={"rephrases": (), "locality": (), "portability": ()}) for one in chosen]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds inside the `with`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def measure(
        self,
        update: WeightUpdate | None,
        places: Collection[int],
        kinds: Sequence[str] = FOR_GATES,
        accepted: Collection[int] = (),
    ) -> Figures:
        """Figures of the model with an update.

        Args:
            update: what to measure; None is the base.
            places: of requests in the batch: which to measure on.
            kinds: what to measure.
            accepted: of requests in the batch that count as earlier facts.
        """
        also = [self.evaluator.only(accepted, ("probes",))] if accepted else []
        return self._measure(update, self.evaluator.only(places, kinds), also)

    def _measure(
        self, update: WeightUpdate | None, evaluator: Evaluator, also: Sequence[Evaluator] = ()
    ) -> Figures:
        earlier = [*([self.earlier] if self.earlier else []), *also]
        with self.timed("evaluation"), update.applied(self.llm) if update else nullcontext():
            metrics = evaluator.measure("Measuring the batch").metrics
            rewrites = [one.measure("Earlier facts").metrics["rewrite"] for one in earlier]
        count = sum(rewrite.count for rewrite in rewrites)
        return Figures(
            metrics=metrics,
            earlier=sum(rewrite.mean * rewrite.count for rewrite in rewrites) / count if count else None,
            perplexity_ratio=metrics["perplexity"].mean / self.perplexity,
            drift=drift(self.llm, update),
        )


def try_batch(
    llm: LLM, base: BaseVersion, batch: Sequence[EditRequest], profile: GoldenProfile, options: ProvingOptions
) -> BatchResult:
    """Edit and measure a batch; the model is the base again afterwards.

    It is tried whole, and in halves where that misses a gate, each on top of the parts that passed; what misses one
    alone is held back.

    Args:
        llm: the base model.
        base: the version in force.
        batch: what to apply; all of it can be edited.
        profile: where to edit.
        options: how.

    Raises:
        UserError: when the version in force itself misses a gate, or the profile is another model's.
    """
    trial = _Trial(llm, base, batch, profile, options)
    trial.try_part(range(len(batch)))
    return trial.result()


class _Trial:
    """A batch as far as it was tried: what was accepted, by its places in the batch, and what was held back.

    Locate-then-edit solves for all of a layer's requests at once: its parts are had from the whole by leaving the
    others out, with no value searched for again.
    """

    def __init__(
        self, llm: LLM, base: BaseVersion, batch: Sequence[EditRequest], profile: GoldenProfile,
        options: ProvingOptions,
    ) -> None:  # fmt: skip
        self.llm, self.base, self.batch, self.profile, self.options = llm, base, batch, profile, options
        self.evaluator = BatchEvaluator(llm, base, batch, options)
        self.whole: WeightUpdate | None = None
        self.update = base.update
        self.accepted: list[int] = []
        self.held: list[HeldBack] = []
        self.after: Figures | None = None  # of the whole batch, where it is accepted

    def try_part(self, part: Sequence[int]) -> None:
        """Accept a part, or halve it, or hold a single request back."""
        everything = len(part) == len(self.batch)  # mostly passes: measured in full, so that once is enough
        gates: list[Gate] = []
        try:
            update = self._edited(part)
            figures = self.evaluator.measure(update, part, KINDS if everything else FOR_GATES, self.accepted)
            gates = figures.gates(self.options.gates)
            reason = missed(gates)
        except UserError as error:
            reason = str(error)
        if not reason:
            self.accepted = sorted([*self.accepted, *part])
            self.update, self.after = update, figures if everything else None
        elif len(part) == 1:
            reached = {gate.name: gate.value for gate in gates}
            self.held.append(HeldBack(number_of(self.batch[part[0]]), reason, reached))
        else:
            middle = len(part) // 2
            self.try_part(part[:middle])
            self.try_part(part[middle:])

    def _edited(self, part: Sequence[int]) -> WeightUpdate:
        """The version in force with the accepted requests and a part of the others."""
        options, device, seed = self.options.edit, self.options.one_device, self.options.seed
        rest = [one for place, one in enumerate(self.batch) if place not in {*self.accepted, *part}]
        with self.evaluator.timed("edit"):
            if self.whole and self._can_leave_out(rest):
                return leave_out(self.llm, self.whole, rest, options, device, seed)
            requests = [self.batch[place] for place in part]
            update = edit(self.llm, requests, self.profile, options, device, seed=seed, after=self.update)
        if not rest and self.whole is None:
            self.whole = update
        return update

    def _can_leave_out(self, rest: Sequence[EditRequest]) -> bool:
        """Whether the rest has columns of its own, and did not take the place of earlier facts."""
        assert self.whole
        earlier = {fact(request) for request in self.base.requests}
        renewed = any(fact(request) in earlier for request in rest)
        return not renewed and can_leave_out(self.llm, self.whole, rest, self.options.edit.method)

    def result(self) -> BatchResult:
        """What came of it, measured in full on what was accepted."""
        result = BatchResult(held=self.held, seconds=self.evaluator.seconds)
        if not self.accepted:
            return result
        result.applied = [self.batch[place] for place in self.accepted]
        result.update, result.before, result.after = self.update, self.evaluator.before, self.after
        if result.after is None:
            result.before = self.evaluator.measure(self.base.update, self.accepted, KINDS)
            result.after = self.evaluator.measure(self.update, self.accepted, KINDS)
        result.gates = result.after.gates(self.options.gates)
        return result
