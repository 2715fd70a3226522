"""One batch: edited on top of the version in force, held against the gates, and where one fails, tried in parts."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.attribution.profile import GoldenProfile
from pipeline.editing.editor import accept, can_leave_out, edit, leave_out
from pipeline.editing.update import WeightUpdate
from pipeline.errors import DeviceError, UserError
from pipeline.evaluation.evaluator import Evaluator, relative_changes
from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.plan import KINDS
from pipeline.model.llm import LLM
from pipeline.options.updates import GateOptions, ProvingOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import fact
from pipeline.running.processes import world_size
from pipeline.updates.queue import Contradiction, number_of

OF_BATCH = ("rewrite", "rephrase", "locality")
MOSTS = ("perplexity", "drift", "ability")  # gates that ask for a most
OF_MODEL = ("earlier", *MOSTS)  # whatever the batch
FOR_GATES = ("probes", "text", "ability")  # the kinds of measurement that gates need


@dataclass(frozen=True)
class Gate:
    """One gate: what was reached, what is asked for, and whether as a least or as a most."""

    name: str
    value: float
    bound: float
    least: bool

    @property
    def passed(self) -> bool:
        """Whether it is reached; no number is not."""
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        sign = (">=" if self.least else "<=") if self.passed else ("<" if self.least else ">")
        name = "ability lost" if self.name == "ability" else self.name
        return f"{name} {self.value:.3f} {sign} {self.bound:g}"


@dataclass(frozen=True)
class Figures:
    """What was measured of one state of the model."""

    metrics: Mapping[str, Estimate]  # of the batch, and perplexity
    earlier: float | None  # rewrite of earlier facts; None where there are none
    perplexity_ratio: float  # as a multiple of the base model's
    drift: float  # the largest change of an edited weight from the base, as a share of its norm
    missed: list[tuple[int, str, str]] = field(
        default_factory=list
    )  # of requests by number: asked so, it says that
    ability_lost: float | None = None  # against the base model, as a share of the items; None where not measured

    def gates(self, options: GateOptions, names: Sequence[str] = OF_BATCH + OF_MODEL) -> list[Gate]:
        """Those gates of the options that this can be held against."""
        values = {name: self.metrics[name].mean for name in OF_BATCH if name in self.metrics}
        values |= {"perplexity": self.perplexity_ratio, "drift": self.drift}
        measured = {"earlier": self.earlier, "ability": self.ability_lost}
        values |= {name: value for name, value in measured.items() if value is not None}
        return [
            Gate(name, values[name], bound, least=name not in MOSTS)
            for name in names
            if name in values and (bound := getattr(options, name))  # 0 and null: not asked for
        ]


def missed(gates: Sequence[Gate]) -> str:
    """The gates that are not passed, in words; empty when all are."""
    return ", ".join(str(gate) for gate in gates if not gate.passed)


class HeldBack(NamedTuple):
    """A request that is not applied: its number, and why, with the figures that it reached alone."""

    number: int
    reason: str


@dataclass
class BatchResult:
    """What came of a batch, or of a retraction; what there is nothing of is None."""

    parent: int = 0  # the version that was edited on top of
    base: WeightUpdate | None = None  # that version; it and `update` until a version is published
    applied: list[EditRequest] = field(default_factory=list)  # what was accepted
    held: list[HeldBack] = field(default_factory=list)  # what was not
    update: WeightUpdate | None = None  # the version in force with what was accepted, or without what was retracted
    before: Figures | None = None  # on those requests
    after: Figures | None = None
    profile: GoldenProfile | None = None  # where it was edited
    gates: list[Gate] = field(default_factory=list)  # those of `after`
    seconds: dict[str, float] = field(default_factory=dict)  # of editing and of measuring
    version: int | None = None  # what was published
    superseded: list[Contradiction] = field(default_factory=list)  # which requests gave way to newer ones
    notes: list[str] = field(default_factory=list)  # on where it was edited


def split_by_fit(
    llm: LLM, batch: Sequence[EditRequest], options: ProvingOptions
) -> tuple[list[EditRequest], list[HeldBack]]:
    """Those of a batch that the method and the model can take, and those that they cannot."""
    fitting, held = [], []
    for request in batch:
        try:
            Evaluator(llm, accept([request], options.edit), options.evaluation, kinds=("probes", "generation"))
            fitting.append(request)
        except UserError as error:
            held.append(HeldBack(number_of(request), str(error)))
    return fitting, held


class Trial:
    """Edits a batch on top of a version, and measures what comes of it on the batch and a sample of earlier facts.

    Locate-then-edit solves for all of a layer's requests at once: parts of the batch are had from the whole by
    leaving the others out, with no value searched for again.

    The model is the base again after every edit and measurement. `parent` and `base` are the number of the version
    in force, and its update. UserError when texts do not fit the model, or that version itself misses a gate.
    """

    def __init__(
        self, llm: LLM, parent: int, base: WeightUpdate | None, batch: list[EditRequest], options: ProvingOptions
    ) -> None:
        self.llm, self.parent, self.base, self.batch, self.options = llm, parent, base, batch, options
        self.facts = base.requests if base else []  # that are in force
        self.seconds = {"edit": 0.0, "evaluation": 0.0}
        self.update = base  # with what was accepted of the batch in it
        self.whole: WeightUpdate | None = None  # with all of the batch in it
        self.accepted: list[int] = []  # places in the batch
        self.held: list[HeldBack] = []
        self.each: list[dict[int, float]] = []  # by gate, what each request reached when last measured
        how = replace(options.evaluation, ability=options.gates.ability is not None)
        self.evaluator = Evaluator(llm, batch, how, options.trainer)
        self.earlier = self._earlier_facts()
        with self.timed("evaluation"):
            self.of_base = self.evaluator.only((), ("text", "ability")).measure("Measuring base").metrics
        self.before = self.measure(base, range(len(batch)), KINDS)  # which locality is measured against
        if problem := missed(self.before.gates(options.gates, OF_MODEL)):
            raise UserError(
                f"update: version {parent}, which is in force, misses gates itself: {problem}; "
                "roll back, retract what is not needed, or change the gates"
            )

    def _earlier_facts(self) -> Evaluator | None:
        """Measures a sample of the facts that the batch leaves in force, prompts and new answers alone."""
        renewed = {fact(request) for request in self.batch}
        held = [request for request in self.facts if fact(request) not in renewed]
        if not held:
            return None
        most = min(self.options.gates.earlier_sample, len(held))
        chosen = random.Random(self.options.seed + self.parent).sample(held, most)
        bare = [one.model_copy(update={"rephrases": (), "locality": (), "portability": ()}) for one in chosen]
        return Evaluator(self.llm, bare, self.options.evaluation, self.options.trainer, ("probes",))

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds inside the `with`."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def edit_and_prove(self, profile: GoldenProfile) -> BatchResult:
        """Edit the batch at the golden layer and hold it against the gates.

        Where the whole misses one, the requests are ordered by what it did for each; the most of them that pass
        together are looked for by halving, and the others tried one by one on top: about log₂ n + failures
        measurements. What misses a gate alone is held back.
        """
        result = BatchResult(self.parent, self.base, held=self.held, profile=profile, seconds=self.seconds)
        everything = list(range(len(self.batch)))
        after, reason = self._try(everything, profile, KINDS)  # the whole mostly passes: once is enough
        if reason:
            self._try_parts(everything, profile, reason)
        if self.accepted:
            result.applied = [self.batch[place] for place in self.accepted]
            result.update, result.before = self.update, self.before
            if reason:
                result.before = self.measure(self.base, self.accepted, KINDS)
                after = self.measure(self.update, self.accepted, KINDS)
            assert after
            result.after, result.gates = after, after.gates(self.options.gates)
        return result

    def _try_parts(self, places: Sequence[int], profile: GoldenProfile, reason: str) -> None:
        """Accept what passes of a batch that misses a gate, and hold back what does not."""
        order = sorted(places, key=lambda place: -sum(values.get(place, 0.0) for values in self.each))
        passing, failing, alone = 0, len(order), {tuple(order): reason}
        while failing - passing > 1:
            middle = (passing + failing) // 2
            held, (self.accepted, self.update) = (self.accepted, self.update), ([], self.base)
            _, missing = self._try(order[:middle], profile)
            if missing:
                failing, (self.accepted, self.update) = middle, held
                alone[tuple(order[:middle])] = missing
            else:
                passing = middle
        for place in order[passing:]:
            missing = alone.get((place,)) or self._try([place], profile)[1]
            if missing:
                self.held.append(HeldBack(number_of(self.batch[place]), missing))

    def _try(
        self, part: Sequence[int], profile: GoldenProfile, kinds: Sequence[str] = FOR_GATES
    ) -> tuple[Figures | None, str]:
        """Figures of what is accepted with a part of the batch, and what that misses; if nothing, it is taken."""
        try:
            update = self._edited(part, profile)
            figures = self.measure(update, part, kinds, self.accepted)
        except UserError as error:
            if world_size() > 1 and isinstance(error, DeviceError):
                raise
            return None, str(error)
        reason = missed(figures.gates(self.options.gates))
        if not reason:
            self.accepted, self.update = sorted([*self.accepted, *part]), update
        return figures, reason

    def _edited(self, part: Sequence[int], profile: GoldenProfile) -> WeightUpdate:
        """The version in force with the accepted requests and a part of the others."""
        options, device, seed = self.options.edit, self.options.trainer, self.options.seed
        rest = [one for place, one in enumerate(self.batch) if place not in {*self.accepted, *part}]
        earlier = {fact(request) for request in self.facts}
        renewed = any(fact(request) in earlier for request in rest)  # it took the place of earlier facts
        with self.timed("edit"):
            if self.whole and not renewed and can_leave_out(self.whole, rest, options.method):
                return leave_out(self.llm, self.whole, rest, options, device, seed)
            requests = [self.batch[place] for place in part]
            update = edit(self.llm, requests, profile, options, device, seed=seed, after=self.update)
        if not rest and self.whole is None:
            self.whole = update
        return update

    def measure(
        self,
        update: WeightUpdate | None,
        places: Collection[int],
        kinds: Sequence[str],
        accepted: Collection[int] = (),
    ) -> Figures:
        """Figures with an update (None: the base), on requests by place; accepted ones count as earlier facts."""
        earlier = [self.earlier] if self.earlier else []
        if accepted:
            earlier.append(self.evaluator.only(accepted, ("probes",)))
        with self.timed("evaluation"), update.applied(self.llm) if update else nullcontext():
            found = self.evaluator.only(places, kinds).measure("Measuring the batch")
            rewrites = [one.measure("Earlier facts").metrics["rewrite"] for one in earlier]
        metrics = found.metrics
        self.each = [found.values[name].values for name in OF_BATCH if name in found.values]
        count = sum(rewrite.count for rewrite in rewrites)
        changes = relative_changes(self.llm, update) if update else {}
        return Figures(
            metrics=metrics,
            earlier=sum(rewrite.mean * rewrite.count for rewrite in rewrites) / count if count else None,
            perplexity_ratio=metrics["perplexity"].mean / self.of_base["perplexity"].mean,
            drift=max(changes.values(), default=0.0),
            missed=[(number_of(self.batch[place]), asked, says) for place, asked, says in found.missed],
            ability_lost=self.of_base["ability"].mean - metrics["ability"].mean if "ability" in metrics else None,
        )
