"""The sweep: every request edited alone at every block, and measured: the truth that selectors are judged by.

It is cheap by design: many requests are edited and measured side by side, each under its own low-rank change, and
blocks below the edited one run once (`pipeline.editing.alone`, `pipeline.evaluation.alone`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.editing import METHODS
from pipeline.editing.alone import ALONE, Alone
from pipeline.editing.edit import check_subjects
from pipeline.editing.method import Runtime
from pipeline.editing.statistics import key_moments
from pipeline.errors import UserError, check_choice
from pipeline.evaluation.alone import AloneEvaluator
from pipeline.model import LLM
from pipeline.running.progress import one_bar
from pipeline.options import EditOptions, EvaluationOptions
from pipeline.requests import EditRequest
from pipeline.study.results import Result, Results, digest

JUDGED_BY = ("rewrite", "rephrase", "locality")  # whose mean is an edit's score


@dataclass(frozen=True)
class Grid:
    """Figures of R requests, each edited alone at each of L blocks.

    Attributes:
        blocks: the blocks, ascending.
        values: by metric, (R, L); NaN where a request has no such probe.
        seconds: what all of it took.
    """

    blocks: list[int]
    values: Mapping[str, np.ndarray]
    seconds: float

    @property
    def scores(self) -> np.ndarray:
        """Mean of rewrite, rephrase and locality, of those that a request has."""
        return np.asarray(np.nanmean(np.stack([self.values[n] for n in JUDGED_BY if n in self.values]), axis=0))

    def taken(self, requests: Sequence[int]) -> Grid:
        """The same for some of the requests, by number."""
        part = {name: values[list(requests)] for name, values in self.values.items()}
        return Grid(self.blocks, part, self.seconds * len(requests) / len(self.scores))


class Sweep:
    """Tries blocks with single edits; what `results` holds is not tried again.

    Args:
        llm: the model; its weights stay as they are.
        options: how to edit; `method` and `layers` are given to `run`.
        evaluation: how to measure.
        runtime: what it runs with.
        results: where figures are kept.
        together: requests edited side by side.
    """

    def __init__(
        self,
        llm: LLM,
        options: EditOptions,
        evaluation: EvaluationOptions,
        runtime: Runtime,
        results: Results,
        together: int = 32,
    ) -> None:
        self.llm = llm
        self.options = options
        self.evaluation = evaluation
        self.runtime = runtime
        self.results = results
        self.together = together

    def run(
        self, method: str, requests: Sequence[EditRequest], blocks: Sequence[int], title: str = "Trying blocks"
    ) -> Grid:
        """Edit every request alone at each of the blocks.

        Raises:
            UserError: for a method that cannot be tried so, or requests that it cannot take.
        """
        check_trial(method, self.options, requests)
        blocks, options = sorted(blocks), self.options.by(method)
        trial = self._trial(options)
        found = self.results.of(trial, requests)
        missing = [n for n in range(len(requests)) if any((n, block) not in found for block in blocks)]
        if not missing:
            return _grid(found, len(requests), blocks)
        self._find_statistics(options, blocks)
        with one_bar(title, len(missing) * len(blocks)) as advance, self.llm.frozen():
            for at in range(0, len(missing), self.together):
                numbers = missing[at : at + self.together]
                together = [requests[n] for n in numbers]
                editing = ALONE[method](self.llm, together, options, self.runtime)
                evaluator = AloneEvaluator(self.llm, together, self.evaluation, self.runtime.trainer)
                for block in blocks:
                    if any((n, block) not in found for n in numbers):
                        results = _try(editing, evaluator, block)
                        self.results.keep(trial, block, together, results)
                        found |= {(n, block): result for n, result in zip(numbers, results, strict=True)}
                    advance(len(numbers), f"block {block}")
        return _grid(found, len(requests), blocks)

    def _trial(self, options: EditOptions) -> str:
        """Names all that a result depends on, beside block and request."""
        own, statistics = getattr(options, METHODS[options.method].options), options.statistics
        return digest(
            *(self.llm.fingerprint, self.llm.chat, self.runtime.trainer.precision, self.runtime.seed),
            *(options.method, asdict(own), statistics.text, statistics.tokens),
        )

    def _find_statistics(self, options: EditOptions, blocks: Sequence[int]) -> None:
        """Of all blocks in one pass, and kept: an edit at a block finds its own."""
        own = getattr(options, METHODS[options.method].options)
        if getattr(own, "whiten", True):
            scope = getattr(own, "scope", "down")
            names = [name for block in blocks for name in self.llm.blocks[block].projections(scope)]
            key_moments(self.llm, names, options.statistics, self.runtime.trainer)


def check_trial(method: str, options: EditOptions, requests: Sequence[EditRequest], flag: str = "methods") -> None:
    """Raise UserError for a method that cannot be tried with single edits, or requests that it cannot take."""
    check_choice(flag, method, ALONE)
    check_subjects(requests, method, instead="lora")
    if options.locate.rounds > 1 and METHODS[method].options == "locate":
        raise UserError(f"locate.rounds: {options.locate.rounds}; trial edits visit a block once; expected 1")


def _try(editing: Alone, evaluator: AloneEvaluator, block: int) -> list[Result]:
    started = time.perf_counter()
    figures = evaluator.measure(block, editing.at(block))
    seconds = (time.perf_counter() - started) / len(figures)
    return [Result(values, seconds) for values in figures]


def _grid(found: Mapping[tuple[int, int], Result], requests: int, blocks: Sequence[int]) -> Grid:
    metrics = dict.fromkeys(name for result in found.values() for name in result.figures)
    values = {
        name: np.array([[found[n, block].figures.get(name, np.nan) for block in blocks] for n in range(requests)])
        for name in metrics
    }
    return Grid(list(blocks), values, sum(found[n, block].seconds for n in range(requests) for block in blocks))
