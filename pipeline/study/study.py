"""`run.py study`: on which block do edits do best, and who finds it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from pipeline.attribution.find import SELECTORS, check_selector, choose, score_requests
from pipeline.attribution.inner_products import ESTIMATORS, cosine
from pipeline.attribution.lga import of_gradients
from pipeline.attribution.profile import GoldenProfile
from pipeline.attribution.selector import Selector
from pipeline.editing.editor import accept, choose_layers, fit_layers
from pipeline.errors import UserError, check_choice
from pipeline.files import digest, write_text
from pipeline.model.llm import LLM
from pipeline.options.commands import StudyCommand
from pipeline.requests.schema import EditRequest
from pipeline.requests.sets import about
from pipeline.running.processes import from_first
from pipeline.running.trainer import Runtime
from pipeline.study.grid import Grid, Row, carried_over, golden_against_optimal, selectors_compared
from pipeline.study.race import RACE, race, seeding
from pipeline.study.sweep import RESULTS, Sweep

RESEARCH: dict[str, Selector] = SELECTORS | {  # a cosine has a bound, and needs no fences
    name: of_gradients(estimator, fenced=estimator.combine is not cosine) for name, estimator in ESTIMATORS.items()
}
Tables = dict[str, dict[str, list[Row]]]  # by set and method


@dataclass(frozen=True)
class RequestSet:
    """A set's requests: those that are tried at every block, and those that selectors choose by."""

    name: str
    tried: list[EditRequest]
    proxy: list[EditRequest]


@dataclass(frozen=True)
class Study:
    """What a study found."""

    model: str  # its name
    blocks: int  # how many it has
    sets: list[RequestSet]
    profiles: Mapping[str, Mapping[str, GoldenProfile]]  # by set and selector: a set's golden layer is the first's
    grids: Mapping[str, Mapping[str, Grid]]  # by set and method

    @property
    def golden(self) -> dict[str, int]:
        """The golden layer by set."""
        return {name: found.golden_layers[0] for name, found in self.first.items()}

    @property
    def first(self) -> dict[str, GoldenProfile]:
        """What the first selector found, by set."""
        return {name: next(iter(found.values())) for name, found in self.profiles.items()}

    def each(self, answer: Callable[[str, Grid], Any]) -> dict[str, dict[str, Any]]:
        """An answer for every set and method."""
        return {
            name: {method: answer(name, grid) for method, grid in found.items()}
            for name, found in self.grids.items()
        }

    @cached_property
    def against_optimal(self) -> Tables:
        """Question one, by set and method: how near a fixed block comes to each request's own best one."""
        return self.each(lambda name, grid: golden_against_optimal(grid, self.first[name], self.blocks))

    @cached_property
    def carried(self) -> dict[str, list[Row]]:
        """Question two, by method: from proxy to test requests, within a set and from set to set."""
        methods = next(iter(self.grids.values()))
        return {
            method: carried_over({name: grids[method] for name, grids in self.grids.items()}, self.first)
            for method in methods
        }

    @cached_property
    def selectors(self) -> Tables:
        """Question three, by set and method: who finds the block."""
        return self.each(lambda name, grid: selectors_compared(grid, self.profiles[name], self.blocks))

    def as_json(self) -> dict[str, Any]:
        """All of it, for one's own analysis."""
        return {
            "model": self.model,
            "blocks": self.blocks,
            "sets": {one.name: {"tried": len(one.tried), "proxy": len(one.proxy)} for one in self.sets},
            "golden layers": self.golden,
            "golden against optimal": self.against_optimal,
            "carried over": self.carried,
            "selectors": self.selectors,
            "sweeps": self.each(lambda _, grid: grid.as_json()),
        }


def check_study(sets: Sequence[RequestSet], options: StudyCommand) -> None:
    """Raise UserError for what can be known before the model is loaded: sets, methods and selectors that fail."""
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise UserError(f"requests: {', '.join(names)}: expected files of different names, which tables tell apart")
    ways = [name for name in (*RESEARCH, RACE) if name != "fixed"]
    for selector in options.selectors:
        check_choice("selectors", selector, ways)
    for one in sets:
        for method in options.methods:
            accept(one.tried, options.edit.by(method))
        for selector in options.selectors:
            own = seeding(replace(options.attribution, method=selector))
            check_selector([*one.tried, *one.proxy], own, RESEARCH)


def parted(name: str, requests: Sequence[EditRequest], options: StudyCommand) -> RequestSet:
    """A set's first requests to be tried, and up to `proxy` others about other subjects; UserError for too few."""
    tried = list(requests[: options.limit])
    subjects = {about(request) for request in tried}
    proxy = [request for request in requests[options.limit :] if about(request) not in subjects][: options.proxy]
    if len(tried) < 2 or not proxy:
        raise UserError(
            f"requests: {name}: {len(requests)} requests; with --limit {options.limit} none about another subject "
            "is left to choose a layer by; lower --limit"
        )
    return RequestSet(name, tried, proxy)


def run_study(
    llm: LLM, sets: Sequence[RequestSet], options: StudyCommand, folder: Path, work: Path | None = None
) -> Study:
    """Let selectors choose, try every block, and put both side by side.

    Results are put into `folder` as they come, and what is there is not done again; `work` takes half-done work.
    """
    sweep = Sweep(llm, options.edit, Runtime(options.trainer, seed=options.seed), folder / RESULTS)
    profiles = {one.name: _profiles(llm, one, options, folder / "profiles", work) for one in sets}
    blocks = {method: {*fit_layers(llm, method)[:: options.every]} for method in options.methods}
    for profile in (one for found in profiles.values() for one in found.values()):
        for method, own in blocks.items():
            own |= {*choose_layers(llm, profile, options.edit.by(method))}
    grids = {
        one.name: {
            method: sweep.run(method, one.tried, blocks[method], f"{method}, {one.name}"[:22])
            for method in options.methods
        }
        for one in sets
    }
    return Study(llm.name, len(llm.blocks), list(sets), profiles, grids)


def _profiles(
    llm: LLM, one: RequestSet, options: StudyCommand, folder: Path, work: Path | None
) -> dict[str, GoldenProfile]:
    found: dict[str, GoldenProfile] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.selectors:
        own = seeding(replace(options.attribution, method=name))
        how = options.edit.by(options.methods[0]) if name == RACE else None
        file = folder / f"{digest(llm.fingerprint, llm.chat, one.proxy, asdict(own), how and asdict(how))}.json"
        kept = from_first(GoldenProfile.load(file) if file.is_file() else None)
        if kept is None:
            scores = score_requests(llm, one.proxy, own, options.trainer, options.seed, work, RESEARCH)
            kept = choose(scores, own, one.name, options.seed, RESEARCH)
            if how:
                kept = race(llm, kept, one.proxy, how, Runtime(options.trainer, seed=options.seed), work)
            rank_zero_only(write_text)(file, kept.model_dump_json(indent=1) + "\n")
        found[name] = kept
    return found
