"""`run.py study`: on which block do single edits do best, and who finds it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.attribution import METHODS as SELECTORS
from pipeline.attribution import GoldenProfile, check_method, choose, score_requests
from pipeline.editing.method import Runtime
from pipeline.errors import UserError, check_choice
from pipeline.files import write_text
from pipeline.model import LLM
from pipeline.options import StudyCommand
from pipeline.requests import EditRequest
from pipeline.study.questions import (
    Row,
    best_block,
    by_halves,
    carried_over,
    golden_against_optimal,
    selectors_compared,
)
from pipeline.study.results import RESULTS_FILE, Results, digest
from pipeline.study.sweep import Grid, Sweep, check_trial

UNFENCED = "{} without fences"


@dataclass(frozen=True)
class RequestSet:
    """A set's requests: those that are tried at every block, and those that selectors choose by."""

    name: str
    tried: list[EditRequest]
    proxy: list[EditRequest]


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        model: its name.
        blocks: how many it has.
        sets: the request sets.
        profiles: by set and selector; of each set, the first one's choice is its golden layer.
        grids: by set and method.
    """

    model: str
    blocks: int
    sets: list[RequestSet]
    profiles: Mapping[str, Mapping[str, GoldenProfile]]
    grids: Mapping[str, Mapping[str, Grid]]

    @property
    def golden(self) -> dict[str, int]:
        """The golden layer by set."""
        return {name: next(iter(found.values())).golden_layers[0] for name, found in self.profiles.items()}

    def against_optimal(self, name: str, method: str) -> list[Row]:
        """Question one, for a set and a method."""
        return golden_against_optimal(self.grids[name][method], self.golden[name], self.blocks)

    def carried(self, method: str) -> list[Row]:
        """Question two: from proxy to test requests, within a set and from set to set."""
        return carried_over({name: grids[method] for name, grids in self.grids.items()}, self.golden)

    def selectors(self, name: str, method: str) -> list[Row]:
        """Question three, for a set and a method."""
        return selectors_compared(self.grids[name][method], self.profiles[name], self.blocks)

    def halves(self) -> list[Row]:
        """Selectors on one half of the tried requests and on the other, over all sets and methods."""
        return by_halves(self.grids, self.profiles)

    def as_json(self) -> dict[str, Any]:
        """All of it, for one's own analysis."""
        methods, names = list(next(iter(self.grids.values()))), [one.name for one in self.sets]
        return {
            "model": self.model,
            "blocks": self.blocks,
            "sets": {s.name: {"tried": len(s.tried), "proxy": len(s.proxy)} for s in self.sets},
            "golden layers": self.golden,
            "golden against optimal": {
                name: {method: self.against_optimal(name, method) for method in methods} for name in names
            },
            "carried over": {method: self.carried(method) for method in methods},
            "selectors": {
                s.name: {method: self.selectors(s.name, method) for method in methods} for s in self.sets
            },
            "selectors by halves": self.halves(),
            "sweeps": {
                name: {method: _grid_json(grid) for method, grid in grids.items()}
                for name, grids in self.grids.items()
            },
        }


def _grid_json(grid: Grid) -> dict[str, Any]:
    asked = {name: values for name, values in grid.values.items() if not np.isnan(values).all()}
    means = {name: np.nanmean(values, axis=0).tolist() for name, values in asked.items()}
    return {
        "blocks": grid.blocks,
        **means,
        "score": grid.scores.mean(0).tolist(),
        "best fixed block": best_block(grid),
        "own best blocks": [grid.blocks[place] for place in grid.scores.argmax(1)],
        "seconds": round(grid.seconds, 1),
    }


def check_study(sets: Sequence[RequestSet], options: StudyCommand) -> None:
    """Raise UserError for what can be known before the model is loaded: sets, methods and selectors that fail."""
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise UserError(f"requests: {', '.join(names)}: expected files of different names, which tables tell apart")
    for one in sets:
        for method in options.methods:
            check_trial(method, options.edit, one.tried)
        for selector in options.selectors:
            check_choice("selectors", selector, [name for name in SELECTORS if name != "fixed"])
            check_method([*one.tried, *one.proxy], replace(options.attribution, method=selector))


def parted(name: str, requests: Sequence[EditRequest], options: StudyCommand) -> RequestSet:
    """A set's first requests to be tried, and up to `proxy` others about other subjects.

    Raises:
        UserError: when too few are left for either.
    """

    def about(request: EditRequest) -> str:
        return (request.subject or request.prompt).casefold()

    tried = list(requests[: options.limit])
    subjects = {about(request) for request in tried}
    proxy = [request for request in requests[options.limit :] if about(request) not in subjects][: options.proxy]
    if len(tried) < 2 or not proxy:
        raise UserError(
            f"requests: {name}: {len(requests)} requests; with --limit {options.limit} none about another subject "
            "is left to choose a layer by; lower --limit"
        )
    return RequestSet(name, tried, proxy)


def run_study(llm: LLM, sets: Sequence[RequestSet], options: StudyCommand, folder: Path) -> Study:
    """Let selectors choose, try every block, and put both side by side; what is in `folder` is not done again.

    Args:
        llm: the model; its weights stay as they are.
        sets: the request sets.
        options: what to compare.
        folder: takes results as they come.
    """
    profiles = {one.name: _profiles(llm, one, options, folder / "profiles") for one in sets}
    chosen = {profile.golden_layers[0] for found in profiles.values() for profile in found.values()}
    blocks = sorted({*range(0, len(llm.blocks), options.every), *chosen})
    runtime = Runtime(options.trainer, seed=options.seed)
    results = Results(folder / RESULTS_FILE)
    sweep = Sweep(llm, options.edit, options.evaluation, runtime, results, options.together)
    grids = {
        one.name: {
            method: sweep.run(method, one.tried, blocks, f"{method}, {one.name}"[:22]) for method in options.methods
        }
        for one in sets
    }
    return Study(llm.name, len(llm.blocks), list(sets), profiles, grids)


def _profiles(llm: LLM, one: RequestSet, options: StudyCommand, folder: Path) -> dict[str, GoldenProfile]:
    """What each selector makes of a set's proxy requests, where it has fences also without them."""
    found: dict[str, GoldenProfile] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for selector in options.selectors:
        own = replace(options.attribution, method=selector)
        ways = {selector: own}
        if SELECTORS[selector].fenced and own.fences:
            ways[UNFENCED.format(selector)] = replace(own, fences=0.0, expert={})
        files = {
            name: folder / f"{digest(llm.fingerprint, llm.chat, asdict(way), one.proxy)}.json"
            for name, way in ways.items()
        }
        if not all(file.is_file() for file in files.values()):
            scores = score_requests(llm, one.proxy, own, options.trainer, options.seed)
            for name, file in files.items():
                profile = choose(llm, scores, ways[name], one.name, options.seed)
                write_text(file, profile.model_dump_json(indent=1) + "\n")
        found |= {name: GoldenProfile.load(file) for name, file in files.items()}
    return found
