"""One batch: edited on top of the version in force, proved, and where a gate fails, halved and tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.attribution import GoldenProfile
from pipeline.editing import WeightUpdate, accept, can_leave_out, edit, leave_out
from pipeline.errors import UserError
from pipeline.evaluation import Evaluator
from pipeline.evaluation.evaluate import KINDS
from pipeline.model import LLM
from pipeline.options import ProvingOptions
from pipeline.requests import EditRequest, fact
from pipeline.updates.gates import Figures, Gate, failed
from pipeline.updates.prover import Ground, Prover
from pipeline.updates.queue import Queued


class HeldBack(NamedTuple):
    """A request that is not applied: its number, why, and the figures that it reached alone."""

    number: int
    reason: str
    figures: dict[str, float]


class Outcome(NamedTuple):
    """What came of a batch.

    Attributes:
        applied: what was accepted.
        held: what was not.
        update: the version in force with the accepted requests in it; None when there are none.
        profile: where it was edited; None likewise, and where nothing was searched for.
        before, after: the figures on the accepted requests; None when there are none.
        gates: those of `after`.
        perplexity: the base's.
        seconds: of editing and of measuring.
    """

    applied: list[Queued]
    held: list[HeldBack]
    update: WeightUpdate | None
    profile: GoldenProfile | None
    before: Figures | None
    after: Figures | None
    gates: list[Gate]
    perplexity: float | None
    seconds: dict[str, float]


def work_through(
    llm: LLM,
    ground: Ground,
    batch: Sequence[Queued],
    profile_from: Callable[[Sequence[EditRequest]], GoldenProfile],
    options: ProvingOptions,
) -> Outcome:
    """Edit and prove a batch; the model is the base again afterwards.

    Args:
        llm: the base model.
        ground: the version in force.
        batch: what to apply.
        profile_from: where to edit, given those requests of the batch that can be edited.
        options: how.

    Raises:
        UserError: when the version in force itself misses a gate, or the profile is another model's.
    """
    fitting, held = sort_out(llm, batch, options)
    if not fitting:
        return Outcome([], held, None, None, None, None, [], ground.perplexity, {})
    profile = profile_from([one.request for one in fitting])
    return Halving(llm, ground, fitting, profile, options).outcome(held)


def sort_out(llm: LLM, batch: Sequence[Queued], options: ProvingOptions) -> tuple[list[Queued], list[HeldBack]]:
    """Those of a batch that the method and the model can take, and those that they cannot."""

    def problem(requests: list[EditRequest]) -> str:
        try:
            Evaluator(llm, accept(requests, options.edit), options.evaluation, kinds=("probes", "generation"))
        except UserError as error:
            return str(error)
        return ""

    if not problem([one.request for one in batch]):
        return list(batch), []
    problems = {one.number: problem([one.request]) for one in batch}
    held = [HeldBack(number, reason, {}) for number, reason in problems.items() if reason]
    return [one for one in batch if not problems[one.number]], held


class Halving:
    """Tries a batch whole, and parts of it where that fails, each on top of the parts that passed.

    Locate-then-edit solves for all of a layer's requests at once: its parts are had from the whole by leaving the
    others out, with no value searched for again.
    """

    def __init__(
        self, llm: LLM, ground: Ground, batch: Sequence[Queued], profile: GoldenProfile, options: ProvingOptions
    ) -> None:
        self.llm, self.ground, self.batch = llm, ground, list(batch)
        self.profile, self.options = profile, options
        self.prover = Prover(llm, ground, [one.request for one in batch], options)
        self.editing = 0.0
        self.whole: WeightUpdate | None = None
        self.accepted: list[int] = []  # places in the batch
        self.update = ground.update
        self.figures: Figures | None = None
        self.held: list[HeldBack] = []

    def outcome(self, held: Sequence[HeldBack]) -> Outcome:
        """Work it through; `held` are those that were held back before."""
        self._try(list(range(len(self.batch))))
        held = [*held, *self.held]
        seconds = {"edit": self.editing, "evaluation": self.prover.seconds}
        if not self.accepted:
            return Outcome([], held, None, None, None, None, [], self.prover.perplexity, seconds)
        before, after = self.prover.before, self.figures
        if len(self.accepted) < len(self.batch):
            before = self.prover.measure(self.ground.update, self.accepted, KINDS)
        if after is None or len(after.metrics) < len(before.metrics):
            after = self.prover.measure(self.update, self.accepted, KINDS)
        gates = after.gates(self.options.gates)
        seconds["evaluation"] = self.prover.seconds
        applied = [self.batch[place] for place in self.accepted]
        return Outcome(
            applied, held, self.update, self.profile, before, after, gates, self.prover.perplexity, seconds
        )

    def _try(self, part: list[int]) -> None:
        """Accept a part, or halve it, or hold a single request back."""
        try:
            update = self._edited(part)
            everything = len(part) == len(self.batch)  # mostly passes: measured in full, so that once is enough
            figures = self.prover.measure(update, part, KINDS if everything else ("probes", "text"), self.accepted)
            missed = failed(figures.gates(self.options.gates))
        except UserError as error:
            figures, missed = None, str(error)
        if not missed:
            self.accepted = sorted([*self.accepted, *part])
            self.update, self.figures = update, figures if everything else None
        elif len(part) == 1:
            reached = {gate.name: gate.value for gate in figures.gates(self.options.gates)} if figures else {}
            self.held.append(HeldBack(self.batch[part[0]].number, missed, reached))
        else:
            middle = len(part) // 2
            self._try(part[:middle])
            self._try(part[middle:])

    def _edited(self, part: Sequence[int]) -> WeightUpdate:
        """The version in force with the accepted requests and a part of the others."""
        started = time.perf_counter()
        try:
            rest = [one.request for place, one in enumerate(self.batch) if place not in {*self.accepted, *part}]
            if self.whole and self._can_leave_out(rest):
                return leave_out(
                    self.llm, self.whole, rest, self.options.edit, self.options.one_device, self.options.seed
                )
            update = edit(
                self.llm,
                [self.batch[place].request for place in part],
                self.profile,
                self.options.edit,
                self.options.one_device,
                seed=self.options.seed,
                after=self.update,
            )
            self.whole = self.whole or (update if len(part) == len(self.batch) else None)
            return update
        finally:
            self.editing += time.perf_counter() - started

    def _can_leave_out(self, rest: Sequence[EditRequest]) -> bool:
        """Whether the rest has columns of its own, and did not take the place of earlier facts."""
        assert self.whole
        earlier = {fact(request) for request in self.ground.update.requests} if self.ground.update else set()
        renewed = any(fact(request) in earlier for request in rest)
        return not renewed and can_leave_out(self.whole, rest, self.options.edit.method)
