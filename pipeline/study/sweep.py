"""Trial edits: requests are edited at one block after the other, and measured there: the truth on which block edits
best, and what selectors are judged by.

A trial is an edit as users make it, of a small batch; each request is then measured by two halves of its probes, so
that a block chosen by the one half can be judged by the other (`pipeline.study.grid`). What a batch does to
ordinary text counts for all of it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from pipeline.editing.editor import accept, edit
from pipeline.editing.method import METHODS, settings_of
from pipeline.editing.statistics import give_moments
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.made import asked_otherwise, with_other_names
from pipeline.files import digest
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.options.shared import EvaluationOptions
from pipeline.requests.schema import EditRequest, Probe
from pipeline.running.kept import Kept
from pipeline.running.processes import from_first
from pipeline.running.progress import one_bar
from pipeline.running.trainer import Runtime
from pipeline.study.grid import Grid

RESULTS = "results"  # the folder, in a study's output, of what trial edits came to
VERSION = 3  # of what is kept
TOGETHER = 8  # requests of a trial
WINDOWS = 4  # of ordinary text that a trial reads
RUINED = 1000.0  # the most that perplexity counts, over the base's
NEXT = "the"  # stands for whatever word comes next, where that is all that is to stay as it was

Result = tuple[list[dict[str, float]], float]  # of a request at a block: figures by half, and its share of the time


class Sweep:
    """Tries blocks; in a folder, results are kept by all that they depend on."""

    def __init__(
        self, llm: LLM, options: EditOptions, runtime: Runtime, folder: Path | None = None, together: int = TOGETHER
    ) -> None:
        self.llm, self.options, self.runtime = llm, options, runtime
        self.folder, self.together = folder, together
        self.found: dict[str, dict[int, list[Result]]] = {}  # by options and block, and batch

    def run(
        self, method: str, requests: Sequence[EditRequest], blocks: Collection[int], title: str = "Trying blocks"
    ) -> Grid:
        """Edit all requests at each of the blocks, so many `together`; UserError for what `accept` refuses."""
        options = self.options.by(method)
        accept(requests, options)
        found = {block: self._known(options, block) for block in sorted(blocks)}
        parts = [requests[at : at + self.together] for at in range(0, len(requests), self.together)]
        batches = {key(part): part for part in parts}
        missing = [own for own in batches if any(own not in results for results in found.values())]
        if missing:
            every_block = METHODS[method].make(self.llm, list(found), options)  # whose statistics one pass finds
            give_moments(every_block, self.llm, options.statistics, self.runtime)
        with one_bar(title, len(missing) * len(found)) as advance:
            for own in missing:
                evaluator, base = self._evaluator(batches[own])
                for block, results in found.items():
                    if own not in results:
                        results[own] = self._try(evaluator, base, batches[own], replace(options, layers=[block]))
                        if self.folder:
                            file = Kept(self.folder / self._about(options, block))
                            rank_zero_only(file.write)({own: results[own]})
                    advance(1, f"block {block}")
        results_LR = [[one for own in batches for one in results[own]] for results in found.values()]
        names = dict.fromkeys(name for row in results_LR for halves, _ in row for half in halves for name in half)
        values = {
            name: np.array(
                [[[halves[side].get(name, np.nan) for halves, _ in row] for row in results_LR] for side in (0, 1)]
            ).swapaxes(1, 2)
            for name in names
        }
        return Grid(list(found), values, sum(seconds for row in results_LR for _, seconds in row))

    def _known(self, options: EditOptions, block: int) -> dict[int, list[Result]]:
        about = self._about(options, block)
        if about not in self.found:
            self.found[about] = from_first(Kept(self.folder / about).read() if self.folder else {})
        return self.found[about]

    def _evaluator(self, batch: Sequence[EditRequest]) -> tuple[Evaluator, float]:
        """Of each request's halves, side by side; it has read the base model, whose perplexity comes with it."""
        halves = [half for request in batch for half in halved(request)]
        how = EvaluationOptions(generation="none", fluency=0)
        evaluator = Evaluator(self.llm, halves, how, self.runtime.trainer, ("probes", "text"))
        texts = evaluator.plan.texts
        evaluator.plan.texts = [row for row in texts if row.tag.kind != "text" or row.tag.request < WINDOWS]
        return evaluator, evaluator.measure("Trial: base").metrics["perplexity"].mean

    def _try(
        self, evaluator: Evaluator, base: float, batch: Sequence[EditRequest], options: EditOptions
    ) -> list[Result]:
        """What each request of a batch comes to when all of it is edited."""
        started = time.perf_counter()
        update = edit(self.llm, batch, None, options, self.runtime.trainer, seed=self.runtime.seed)
        with update.applied(self.llm):
            found = evaluator.measure("Trial")
        seconds = (time.perf_counter() - started) / len(batch)
        by_request = {name: column.values for name, column in found.values.items() if name != "perplexity"}
        damage = {"perplexity": min(RUINED, found.metrics["perplexity"].mean / base)}  # RUINED for no number, too
        each = [
            {name: values[number] for name, values in by_request.items() if number in values} | damage
            for number in range(2 * len(batch))
        ]
        return [(each[2 * number : 2 * number + 2], seconds) for number in range(len(batch))]

    def _about(self, options: EditOptions, block: int) -> str:
        """Names all that a result depends on, beside the requests."""
        own = asdict(settings_of(options)), options.statistics.text, options.statistics.tokens
        return digest(
            *(VERSION, self.llm.fingerprint, self.llm.chat, self.runtime.precision, self.runtime.seed),
            *(options.method, *own, block),
        )


def halved(request: EditRequest) -> list[EditRequest]:
    """The request twice, each with one half of its rephrases and locality probes; of a single one, or none, made
    ones are the other half.
    """
    rephrases = [*request.rephrases, *asked_otherwise(request)]
    near = [*request.locality, *(Probe(prompt=prompt, answer=NEXT) for prompt in with_other_names(request))]
    rephrases = rephrases[: max(2, len(request.rephrases))]
    near = near[: max(2, len(request.locality))]
    return [
        request.model_copy(update={"rephrases": tuple(rephrases[side::2]), "locality": tuple(near[side::2])})
        for side in (0, 1)
    ]


def key(batch: Sequence[EditRequest]) -> int:
    """What a batch's results are known by."""
    return int(digest(*batch)[:15], 16)
