"""The sweep: every request edited alone at every block, and measured: the truth that selectors are judged by.

One request's change of a weight has a low rank: a value times a direction of inputs for locate-then-edit, an
adapter for LoRA. So many requests are edited and measured side by side, each row under its own change, ΔW = left
right, and blocks below the edited one run once (`pipeline.evaluation.side_by_side`).

Shapes: B requests, I inputs and O outputs of a projection, k the change's rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from pipeline.editing.editor import restored
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.lora import LoRA
from pipeline.editing.method import METHODS, settings_of
from pipeline.editing.statistics import give_moments
from pipeline.editing.update import ADAPTER_PREFIX
from pipeline.errors import UserError, check_choice
from pipeline.evaluation.side_by_side import Changes, SideBySideEvaluator
from pipeline.files import digest
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import check_subjects
from pipeline.running.kept import Kept
from pipeline.running.processes import from_first
from pipeline.running.progress import one_bar
from pipeline.running.trainer import Runtime
from pipeline.study.grid import Grid

RESULTS = "results"  # the folder, in a study's output, of what trial edits came to

Result = tuple[dict[str, float], float]  # of one request at one block: figures by metric, and its share of the time


class Sweep:
    """Tries blocks with single edits, so many together; results are kept by all that they depend on."""

    def __init__(self, llm: LLM, options: EditOptions, runtime: Runtime, folder: Path, together: int = 32) -> None:
        self.llm, self.options, self.runtime = llm, options, runtime
        self.folder, self.together = folder, together

    def run(
        self, method: str, requests: Sequence[EditRequest], blocks: Sequence[int], title: str = "Trying blocks"
    ) -> Grid:
        """Edit every request alone at each of the blocks; UserError where `check_trial` raises it."""
        check_trial(method, self.options, requests)
        options = self.options.by(method)
        kept = {block: Kept(self.folder / self._about(options, block)) for block in sorted(blocks)}
        found: dict[int, dict[int, Result]] = from_first({block: one.read() for block, one in kept.items()})
        keyed = {key(request): request for request in requests}
        missing = [own for own in keyed if any(own not in results for results in found.values())]
        if missing:
            every_block = METHODS[method].make(self.llm, list(kept), options)  # whose statistics one pass finds
            give_moments(every_block, self.llm, options.statistics, self.runtime)
            with one_bar(title, len(missing) * len(kept)) as advance, self.llm.frozen():
                for at in range(0, len(missing), self.together):
                    part = {own: keyed[own] for own in missing[at : at + self.together]}
                    for block, results in self._try(part, options, found):
                        if results:
                            rank_zero_only(kept[block].write)(results)
                            found[block] |= results
                        advance(len(part), f"block {block}")
        results_RL = [[found[block][key(request)] for block in kept] for request in requests]
        metrics = dict.fromkeys(name for row in results_RL for figures, _ in row for name in figures)
        values = {
            name: np.array([[figures.get(name, np.nan) for figures, _ in row] for row in results_RL])
            for name in metrics
        }
        return Grid(list(kept), values, sum(seconds for row in results_RL for _, seconds in row))

    def _try(
        self, part: Mapping[int, EditRequest], options: EditOptions, found: Mapping[int, Mapping[int, Result]]
    ) -> Iterator[tuple[int, dict[int, Result]]]:
        """Requests side by side, at one block after the other where one of them is not `found` yet."""
        requests = list(part.values())
        evaluator = SideBySideEvaluator(self.llm, requests, self.runtime)
        for block, known in found.items():
            if part.keys() <= known.keys():
                yield block, {}
                continue
            started = time.perf_counter()
            figures = evaluator.measure(block, each_alone(self.llm, requests, block, options, self.runtime))
            seconds = (time.perf_counter() - started) / len(figures)
            yield block, {own: (values, seconds) for own, values in zip(part, figures, strict=True)}

    def _about(self, options: EditOptions, block: int) -> str:
        """Names all that a result depends on, beside the request."""
        own = asdict(settings_of(options)), options.statistics.text, options.statistics.tokens
        return digest(
            *(self.llm.fingerprint, self.llm.chat, self.runtime.precision, self.runtime.seed),
            *(options.method, *own, block),
        )


def each_alone(
    llm: LLM, requests: Sequence[EditRequest], layer: int, options: EditOptions, runtime: Runtime
) -> Changes:
    """Every request's change of a block, each as `edit` would make it alone, of a model that is frozen."""
    method = METHODS[options.method].make(llm, [layer], options)
    give_moments(method, llm, options.statistics, runtime)
    if isinstance(method, LoRA):
        if llm.has_experts:
            raise UserError("study: lora: adapters of experts cannot be tried side by side; try memit")
        return _adapters(method, requests, runtime)
    assert isinstance(method, LocateThenEdit)
    return _values(method, layer, requests, runtime)


def _values(method: LocateThenEdit, layer: int, requests: Sequence[EditRequest], runtime: Runtime) -> Changes:
    """Each request's value times its direction of inputs: all of its change, for its columns ask for one value."""
    ((name, down),) = method.llm.blocks[layer].down.items()
    values = method.find(method.search(layer, 1), method.located([[one] for one in requests]), runtime)
    keys_GCI = method.keys(layer, requests, runtime)
    kept = method.kept(layer, [[request] for request in requests], method.moments[name], runtime)
    directions = []
    for key_CI, kept_II in zip(keys_GCI, kept, strict=True):
        key_In, kept_II = key_CI.T.to(down.weight.device), kept_II.to(down.weight.device)
        directions.append(method.solve(key_In, torch.ones(1, key_In.shape[1]).to(key_In), kept_II).float())
    right_BkI = torch.stack(directions)
    return {name: (torch.stack(values).to(right_BkI)[..., None], right_BkI)}


def _adapters(method: LoRA, requests: Sequence[EditRequest], runtime: Runtime) -> Changes:
    found = []
    for courses in method.lessons([[request] for request in requests], runtime):
        with restored(method.llm, method.weight_names):
            method.fit(courses, runtime)
        found.append(method.state)
    device = method.llm.embedding.device
    names = {name: f"{ADAPTER_PREFIX}base_model.model.{name}.lora_" for name in method.projections}
    return {
        name: (
            torch.stack([state[f"{own}B.weight"] for state in found]).to(device) * method.scaling,
            torch.stack([state[f"{own}A.weight"] for state in found]).to(device),
        )
        for name, own in names.items()
    }


def check_trial(method: str, options: EditOptions, requests: Sequence[EditRequest]) -> None:
    """Raise UserError for a method that cannot be tried with single edits, or requests that it cannot take."""
    check_choice("methods", method, [name for name, kind in METHODS.items() if kind.trial])
    if METHODS[method].needs_subject:
        check_subjects(requests, f"edit: {method}", instead="lora")
    if getattr(settings_of(options.by(method)), "spread", 1) > 1:
        raise UserError("study: edit.expert.spread: each block is tried by itself; expected 1")


def key(request: EditRequest) -> int:
    """What a request's results are known by, in any set."""
    return int(digest(request)[:15], 16)
