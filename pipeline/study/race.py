"""The race: which block edits best by the method that will be used, by trial edits spent where they tell most.

Blocks all over the model, and those that gradients name, are tried on a few requests; the better half goes on, with
the neighbours of the one in front, and is tried on more. A block is compared with the winner on the requests that
both were tried on. That is successive halving (Karnin et al., ICML 2013; arXiv 1502.07943), with pairs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from pipeline.attribution.profile import RESAMPLES, GoldenProfile, Race, Raced
from pipeline.editing.editor import fit_layers
from pipeline.editing.method import METHODS
from pipeline.errors import UserError
from pipeline.model.llm import LLM
from pipeline.options.attribution import AttributionOptions
from pipeline.options.editing import EditOptions
from pipeline.options.shared import NF4
from pipeline.requests.schema import EditRequest
from pipeline.running.trainer import Runtime
from pipeline.study.grid import Figures, Grid
from pipeline.study.sweep import Sweep

RACE = "race"  # as a way to find the golden layer
NAMED, SPREAD = 4, 6  # blocks that start: the first of the profile's, and some from all over the model
ROUNDS = (16, 16, 32)  # requests that join in each; with fewer, chance drops the best blocks
LAST = 2  # blocks, at least, of which the best one wins
TEXT = 8_000  # tokens of key statistics: enough to compare by


def race(
    llm: LLM,
    profile: GoldenProfile,
    requests: Sequence[EditRequest],
    options: EditOptions | None = None,
    runtime: Runtime | None = None,
    folder: Path | None = None,
) -> GoldenProfile:
    """The profile with the blocks that win, by trial edits of the requests, and how the race went.

    Args:
        profile: whose ranking says which blocks start first.
        options: how will be edited; a trial is an edit by the same method with its quick settings.
        folder: keeps what trials came to; a race that finds its own there goes on from it.

    UserError for requests that the method cannot take, or blocks in 4 bits, which trials would all make plain.

    Example:
        >>> options = EditOptions(method="memit", statistics=StatisticsOptions(tokens=512))
        >>> found = race(llm, profile, requests, options)
        >>> found.golden_layers == [found.race.blocks[0].block]
        True
    """
    options, runtime = options or EditOptions(), runtime or Runtime()
    if runtime.precision == NF4:
        raise UserError("race: trial edits make block after block plain; expected another precision than nf4")
    started = time.perf_counter()
    tried_as, text = METHODS[options.method].tried_as, options.statistics
    able = [request for request in requests if request.names_subject] if tried_as else []
    method, requests = (tried_as, able) if tried_as and able else (options.method, requests)
    text = replace(text, tokens=min(text.tokens, TEXT))
    options = replace(options.by(method), quick=True, last_wins=True, statistics=text)
    fit = fit_layers(llm, method)
    requests = random.Random(runtime.seed).sample(requests, len(requests))
    sweep = Sweep(llm, options, runtime, folder)
    named = [block for block in dict.fromkeys([*profile.golden_layers, *profile.ranking]) if block in fit][:NAMED]
    blocks = {*named, *(fit[place] for place in np.linspace(0, len(fit) - 1, SPREAD).round().astype(int))}
    grids: list[Grid] = []
    for number, joined in enumerate(np.cumsum(ROUNDS).tolist()):
        grids.append(sweep.run(method, requests[:joined], blocks, f"Race, round {number + 1}"))
        ahead = in_order(grids[-1])
        if joined >= len(requests):
            break
        blocks = {*ahead[: max(LAST, len(ahead) // 2)]}
        if not number:
            blocks |= {block for block in fit if abs(block - ahead[0]) <= 1}
    found = outcome(method, grids, round(time.perf_counter() - started, 3))
    ranking = [raced.block for raced in found.blocks]
    return profile.model_copy(
        update={
            "golden_layers": ranking[: len(profile.golden_layers)],
            "ranking": [*ranking, *(block for block in profile.ranking if block not in ranking)],
            "excluded": [block for block in profile.excluded if block not in ranking],
            "race": found,
            "seconds": round(profile.seconds + found.seconds, 3),
        }
    )


def seeding(options: AttributionOptions) -> AttributionOptions:
    """How blocks are scored before they race, if they do."""
    own = {field.name: getattr(options, field.name) for field in fields(AttributionOptions)}
    return AttributionOptions(**own | {"method": "lga"}) if options.method == RACE else options


def outcome(method: str, grids: Sequence[Grid], seconds: float) -> Race:
    """How the blocks of a race ended: the winner first, then those that went furthest."""
    last = {block: grid for grid in grids for block in grid.blocks}
    winner = in_order(grids[-1])[0]
    found = []
    for block, grid in last.items():
        place, requests = grid.blocks.index(block), len(grid.scores)
        ahead = grids[-1].scores[:requests, grids[-1].blocks.index(winner)] - grid.scores[:, place]
        found.append(
            Raced(
                block=block,
                requests=requests,
                score=grid.mean(block),
                perplexity=float(grid.values.get("perplexity", np.ones_like(grid.scores))[:, place].mean()),
                behind=float(ahead.mean()) if block != winner else 0.0,
                beaten=share_above(ahead) if block != winner else 0.0,
            )
        )
    found.sort(key=lambda one: (one.block != winner, -one.requests, one.behind))
    trials = sum(one.requests for one in found)
    return Race(method=method, trials=trials, seconds=seconds, blocks=found)


def in_order(grid: Grid) -> list[int]:
    """Its blocks, best first; ties go to the shallower."""
    return [grid.blocks[place] for place in np.argsort(-grid.means, kind="stable")]


def share_above(ahead_R: Figures) -> float:
    """In which share of resamples of so many requests the mean is above 0; where it is 0, in half of them."""
    random = np.random.default_rng(len(ahead_R))
    means = ahead_R[random.integers(len(ahead_R), size=(RESAMPLES, len(ahead_R)))].mean(1)
    return float(((means > 0) + 0.5 * (means == 0)).mean())
