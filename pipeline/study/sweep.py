"""The sweep: every request edited alone at every block, and measured: the truth that selectors are judged by.

It is cheap by design: many requests are edited and measured side by side, each under its own low-rank change, and
blocks below the edited one run once (`pipeline.study.trials`, `pipeline.evaluation.side_by_side`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from pipeline.editing.editor import check_subjects
from pipeline.editing.method import METHODS, settings_of
from pipeline.editing.statistics import key_moments
from pipeline.errors import check_choice
from pipeline.evaluation.side_by_side import SideBySideEvaluator
from pipeline.files import digest
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.running.kept import Kept
from pipeline.running.processes import from_first
from pipeline.running.progress import one_bar
from pipeline.running.trainer import Runtime
from pipeline.study.grid import Grid
from pipeline.study.trials import side_by_side

RESULTS = "results"  # the folder, in a study's output, of what trial edits came to

Result = tuple[dict[str, float], float]  # of one request at one block: figures by metric, and its share of the time


class Sweep:
    """Tries blocks with single edits; what was tried once is kept and not tried again.

    Args:
        llm: the model; its weights stay as they are.
        options: how to edit; `method` is given to `run`.
        runtime: what it runs with.
        folder: where results are kept: in it a folder for each block, method and all else that they depend on.
        together: requests edited side by side.
    """

    def __init__(self, llm: LLM, options: EditOptions, runtime: Runtime, folder: Path, together: int = 32) -> None:
        self.llm, self.options, self.runtime = llm, options, runtime
        self.folder, self.together = folder, together

    def run(
        self, method: str, requests: Sequence[EditRequest], blocks: Sequence[int], title: str = "Trying blocks"
    ) -> Grid:
        """Edit every request alone at each of the blocks.

        Raises:
            UserError: for a method that cannot be tried so, or requests that it cannot take.
        """
        check_trial(method, self.options, requests)
        options = self.options.by(method)
        kept = {block: Kept(self.folder / self._about(options, block)) for block in sorted(blocks)}
        found: dict[int, dict[int, Result]] = from_first({block: one.read() for block, one in kept.items()})
        keyed = {key(request): request for request in requests}
        missing = [own for own in keyed if any(own not in results for results in found.values())]
        if missing:
            self._find_statistics(options, list(kept))
            with one_bar(title, len(missing) * len(kept)) as advance, self.llm.frozen():
                for at in range(0, len(missing), self.together):
                    part = {own: keyed[own] for own in missing[at : at + self.together]}
                    for block, results in self._try(part, options, found):
                        if results:
                            rank_zero_only(kept[block].write)(results)
                            found[block] |= results
                        advance(len(part), f"block {block}")
        return grid_of([[found[block][key(request)] for block in kept] for request in requests], list(kept))

    def _try(
        self, part: Mapping[int, EditRequest], options: EditOptions, found: Mapping[int, Mapping[int, Result]]
    ) -> Iterator[tuple[int, dict[int, Result]]]:
        """Requests side by side, at one block after the other where one of them is not `found` yet."""
        requests = list(part.values())
        trials = side_by_side(self.llm, requests, options, self.runtime)
        evaluator = SideBySideEvaluator(self.llm, requests, self.runtime)
        for block, known in found.items():
            if part.keys() <= known.keys():
                yield block, {}
                continue
            started = time.perf_counter()
            figures = evaluator.measure(block, trials.at(block))
            seconds = (time.perf_counter() - started) / len(figures)
            yield block, {own: (values, seconds) for own, values in zip(part, figures, strict=True)}

    def _about(self, options: EditOptions, block: int) -> str:
        """Names all that a result depends on, beside the request."""
        own = asdict(settings_of(options)), options.statistics.text, options.statistics.tokens
        return digest(
            *(self.llm.fingerprint, self.llm.chat, self.runtime.precision, self.runtime.seed),
            *(options.method, *own, block),
        )

    def _find_statistics(self, options: EditOptions, blocks: Sequence[int]) -> None:
        """Of all blocks in one pass, and kept: an edit at a block finds its own."""
        own = settings_of(options)
        if getattr(own, "whiten", True):
            scope = getattr(own, "scope", "down")
            names = [name for block in blocks for name in self.llm.blocks[block].projections(scope)]
            key_moments(self.llm, names, options.statistics, self.runtime)


def check_trial(method: str, options: EditOptions, requests: Sequence[EditRequest], flag: str = "methods") -> None:
    """Raise UserError for a method that cannot be tried with single edits, or requests that it cannot take."""
    check_choice(flag, method, [name for name, kind in METHODS.items() if kind.trial])
    check_subjects(requests, method, instead="lora")


def key(request: EditRequest) -> int:
    """What a request's results are known by, in any set."""
    return int(digest(request)[:15], 16)


def grid_of(results_RL: Sequence[Sequence[Result]], blocks: Sequence[int]) -> Grid:
    """The figures of every request at every block."""
    metrics = dict.fromkeys(name for row in results_RL for figures, _ in row for name in figures)
    values = {
        name: np.array([[figures.get(name, np.nan) for figures, _ in row] for row in results_RL])
        for name in metrics
    }
    return Grid(list(blocks), values, sum(seconds for row in results_RL for _, seconds in row))
