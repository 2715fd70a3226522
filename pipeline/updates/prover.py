"""Proving: candidates on top of one version, measured and held against the gates.

What does not depend on a candidate (the base's perplexity, the figures before) is measured once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from pipeline.editing import WeightUpdate
from pipeline.errors import UserError
from pipeline.evaluation import Evaluator
from pipeline.evaluation.plan import KINDS
from pipeline.model import LLM
from pipeline.options import ProvingOptions
from pipeline.requests import EditRequest, fact
from pipeline.updates.gates import WHOLE, Figures, drift, failed

QUICK = ("probes", "text")  # what gates need


class Ground(NamedTuple):
    """What candidates stand on.

    Attributes:
        version: its number.
        update: its change of the base; None for the base itself.
        perplexity: the base's, where it is known.
    """

    version: int
    update: WeightUpdate | None
    perplexity: float | None


class Prover:
    """Measures candidates for a batch of requests.

    Args:
        llm: the base model.
        ground: the version in force.
        requests: the batch.
        options: how to measure, and the gates.

    Attributes:
        before: the figures of the version in force, on the batch.
        perplexity: the base's.
        seconds: how long was measured.

    Raises:
        UserError: when texts do not fit the model, or the version in force itself misses a gate.
    """

    def __init__(self, llm: LLM, ground: Ground, requests: Sequence[EditRequest], options: ProvingOptions) -> None:
        self.llm, self.ground, self.options = llm, ground, options
        self.seconds = 0.0
        self.evaluator = Evaluator(llm, requests, options.evaluation, options.one_device)
        with self._timed():
            self.perplexity = ground.perplexity or self._base_perplexity()
            earlier = self._sample({fact(request) for request in requests})
            self.earlier = (
                Evaluator(llm, earlier, options.evaluation, options.one_device, ("probes",)) if earlier else None
            )
        self.before = self.measure(ground.update, range(len(requests)), KINDS)
        if missed := failed(self.before.gates(options.gates, WHOLE)):
            raise UserError(
                f"update: version {ground.version}, which is in force, misses gates itself: {missed}; "
                "roll back, retract what is not needed, or change --gates"
            )

    def _sample(self, batch: Collection[tuple[str, str]]) -> list[EditRequest]:
        """Facts of earlier versions that the batch leaves in force, prompts and new answers alone."""
        held = [r for r in self.ground.update.requests if fact(r) not in batch] if self.ground.update else []
        most = self.options.gates.earlier_sample
        chosen = random.Random(self.options.seed + self.ground.version).sample(held, min(most, len(held)))
        return [r.model_copy(update={"rephrases": (), "locality": (), "portability": ()}) for r in chosen]

    def _base_perplexity(self) -> float:
        text = self.evaluator.only((), ("text",))
        return text.measure("Measuring base").metrics["perplexity"].mean

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def measure(
        self,
        update: WeightUpdate | None,
        numbers: Collection[int],
        kinds: Sequence[str] = QUICK,
        also: Collection[int] = (),
    ) -> Figures:
        """Figures of the model with an update.

        Args:
            update: what to measure; None is the base.
            numbers: which requests of the batch.
            kinds: what to measure.
            also: requests of the batch that count as earlier ones.
        """
        with self._timed(), update.applied(self.llm) if update else nullcontext():
            metrics = self.evaluator.only(numbers, kinds).measure("Measuring the batch").metrics
            held = [self.earlier] if self.earlier else []
            held += [self.evaluator.only(also, ("probes",))] if also else []
            rewrites = [one.measure("Earlier facts").metrics["rewrite"] for one in held]
        count = sum(rewrite.count for rewrite in rewrites)
        return Figures(
            metrics=metrics,
            earlier=sum(rewrite.mean * rewrite.count for rewrite in rewrites) / count if count else None,
            perplexity=metrics["perplexity"].mean / self.perplexity,
            drift=drift(self.llm, update),
        )
