"""The study's questions, answered from grids of trial edits and from what selectors chose.

A block's score is the mean of rewrite, rephrase and locality over requests that were edited there alone. The best
fixed block is the one with the best score on the same requests, chosen with hindsight; regret is what another falls
short of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional import spearman_corrcoef

from pipeline.attribution import GoldenProfile
from pipeline.evaluation import Estimate
from pipeline.evaluation.values import Column
from pipeline.study.sweep import Grid

Row = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Edited:
    """Requests edited at blocks of somebody's choice.

    Attributes:
        figures: the mean of every metric.
        score: the mean score, with its 95% bootstrap interval over requests.
    """

    figures: dict[str, float]
    score: Estimate

    @classmethod
    def at(cls, grid: Grid, places_R: NDArray[np.int64]) -> Edited:
        """Each request at a block of its own, given by the block's place in the grid."""
        each = np.arange(len(places_R))
        figures = {name: _mean(values[each, places_R]) for name, values in grid.values.items()}
        return cls(figures, _estimate(grid.scores[each, places_R]))

    def row(self, **first: float | int | str | None) -> Row:
        """As a table's row, behind the columns given."""
        shown = {name: value for name, value in self.figures.items() if "/" not in name}
        return {**first, **shown, "score": self.score.mean, "low": self.score.low, "high": self.score.high}


def _estimate(values_R: NDArray[np.float64]) -> Estimate:
    return Column(dict(enumerate(values_R.tolist()))).mean().estimate()


def _mean(values: NDArray[np.float64]) -> float:
    """Over the requests that have such a probe; NaN where none has."""
    there = ~np.isnan(values)
    return float(values[there].mean()) if there.any() else float("nan")


def everywhere(grid: Grid, block: int) -> Edited:
    """All requests at one block."""
    return Edited.at(grid, np.full(len(grid.scores), grid.blocks.index(block)))


def best_block(grid: Grid) -> int:
    """The best fixed block; of equals the lowest."""
    return grid.blocks[int(grid.scores.mean(0).argmax())]


def middle_block(grid: Grid, blocks: int) -> int:
    """The tried block nearest the middle of all `blocks`."""
    return min(grid.blocks, key=lambda block: abs(block - blocks // 2))


def golden_against_optimal(grid: Grid, golden: int, blocks: int) -> list[Row]:
    """How near a fixed block comes to each request's own best one.

    Args:
        grid: of the requests.
        golden: the block that a selector chose, one of the grid's.
        blocks: how many the model has.
    """
    own_best = Edited.at(grid, grid.scores.argmax(1))
    fixed = best_block(grid)
    middle = middle_block(grid, blocks)
    anywhere = {name: _mean(values) for name, values in grid.values.items()}
    chosen = {
        "each request's own best block": (None, own_best),
        "best fixed block": (fixed, everywhere(grid, fixed)),
        "golden layer": (golden, everywhere(grid, golden)),
        "middle block": (middle, everywhere(grid, middle)),
        "a block at random": (None, Edited(anywhere, _estimate(grid.scores.mean(1)))),
    }
    return [
        edited.row(choice=name, block=block) | {"of the optimum": edited.score.mean / own_best.score.mean}
        for name, (block, edited) in chosen.items()
    ]


def regret(grid: Grid, block: int) -> float:
    """What a block falls short of the best fixed one."""
    means = grid.scores.mean(0)
    return float(means.max() - means[grid.blocks.index(block)])


def rank_correlation(scores: Sequence[float], grid: Grid, left_out: Sequence[int] = ()) -> float | None:
    """Spearman's, of a selector's scores and the sweep's over the grid's blocks; None where scores do not differ.

    Args:
        scores: one a block of the model.
        grid: what the sweep found.
        left_out: blocks that do not count.
    """
    places = [place for place, block in enumerate(grid.blocks) if block not in left_out]
    own = torch.tensor([scores[grid.blocks[place]] for place in places], dtype=torch.float64)
    swept = torch.tensor(grid.scores.mean(0)[places], dtype=torch.float64)
    if len(places) < 3 or own.unique().numel() == 1 or swept.unique().numel() == 1:
        return None
    return float(spearman_corrcoef(own, swept))


def selectors_compared(grid: Grid, profiles: Mapping[str, GoldenProfile], blocks: int) -> list[Row]:
    """What each selector chose on the proxy set, beside the sweep of the test requests.

    Args:
        grid: of the test requests.
        profiles: by selector.
        blocks: how many the model has.
    """
    a_request = grid.seconds / len(grid.scores) * blocks / len(grid.blocks)
    rows: list[Row] = []
    for name, profile in profiles.items():
        block = profile.golden_layers[0]
        scores = _ranked_by(profile)
        rows.append(
            {
                "selector": name,
                "block": block,
                "score": everywhere(grid, block).score.mean,
                "regret": regret(grid, block),
                "spearman": rank_correlation(scores, grid),
                "spearman inside the fences": rank_correlation(scores, grid, profile.excluded),
                "seconds": profile.seconds,
                "times faster than the sweep": (
                    a_request * profile.requests / profile.seconds if profile.stability else None
                ),
            }
        )
    return [*rows, _half_swept(grid)]


def _half_swept(grid: Grid) -> Row:
    """The sweep itself as a selector: chosen on one half of the requests, measured on the other, both ways."""
    requests = len(grid.scores)
    halves = [list(range(start, requests, 2)) for start in (0, 1)]
    regrets, scores, found = [], [], []
    for own, other in zip(halves, reversed(halves), strict=True):
        block = best_block(grid.taken(own))
        found.append(block)
        regrets.append(regret(grid.taken(other), block))
        scores.append(everywhere(grid.taken(other), block).score.mean)
    return {
        "selector": "sweep of the other half",
        "block": " and ".join(map(str, dict.fromkeys(found))),
        "score": float(np.mean(scores)),
        "regret": float(np.mean(regrets)),
        "spearman": rank_correlation(_spread(grid.taken(halves[0])), grid.taken(halves[1])),
        "spearman inside the fences": None,
        "seconds": grid.seconds / 2,
        "times faster than the sweep": 1.0,
    }


def _spread(grid: Grid) -> list[float]:
    """The grid's scores at the places of the model's blocks."""
    found = dict(zip(grid.blocks, grid.scores.mean(0).tolist(), strict=True))
    return [found.get(block, float("nan")) for block in range(max(grid.blocks) + 1)]


def by_halves(
    grids: Mapping[str, Mapping[str, Grid]], profiles: Mapping[str, Mapping[str, GoldenProfile]]
) -> list[Row]:
    """Every selector on one half of the tried requests and on the other, over all sets and methods: what is chosen
    by the first half's figures can be trusted by the second's.

    Args:
        grids: by set and method.
        profiles: by set and selector.

    Returns:
        rows, the best rank correlation on the first half first.
    """
    rows: list[Row] = []
    for selector in next(iter(profiles.values())):
        row: Row = {"selector": selector}
        for half, start in (("first", 0), ("second", 1)):
            ranks, regrets = [], []
            for name, found in grids.items():
                profile = profiles[name][selector]
                for grid in found.values():
                    part = grid.taken(range(start, len(grid.scores), 2))
                    rank = rank_correlation(_ranked_by(profile), part)
                    ranks += [rank] if rank is not None else []
                    regrets.append(regret(part, profile.golden_layers[0]))
            row |= {
                f"spearman, {half} half": float(np.mean(ranks)) if ranks else None,
                f"regret, {half} half": float(np.mean(regrets)),
                f"worst regret, {half} half": float(np.max(regrets)),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row["spearman, first half"] or -1))


def _ranked_by(profile: GoldenProfile) -> list[float]:
    """Its scores, larger where a block comes first."""
    return [abs(score) for score in profile.scores] if profile.order == "magnitude" else profile.scores


def carried_over(grids: Mapping[str, Grid], golden: Mapping[str, int]) -> list[Row]:
    """A block chosen on one set's proxy requests, measured on every set's test requests.

    Args:
        grids: by request set.
        golden: the block chosen on each set's proxy requests.
    """
    return [
        {"chosen on": source, "measured on": target}
        | everywhere(grid, block).row(block=block)
        | {"regret": regret(grid, block)}
        for source, block in golden.items()
        for target, grid in grids.items()
    ]
