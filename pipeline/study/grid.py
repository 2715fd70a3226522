"""What trial edits came to, and the study's questions answered from that and from what selectors chose.

A block's score is the mean of rewrite, rephrase and locality over requests that were edited there, less what edits
take from ordinary text: some blocks hold requests well and ruin the rest. The best fixed block is the one with the
best score on the same requests, chosen with hindsight; regret is what another falls short of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional import spearman_corrcoef

from pipeline.attribution.profile import GoldenProfile
from pipeline.evaluation.metrics import bootstrap_mean

Figures = NDArray[np.float64]  # (2, R, L): halves of the probes, R requests, L blocks; or (R, L), (R,), (L,)
Row = dict[str, float | int | str | None]
JUDGED_BY = ("rewrite", "rephrase", "locality")  # whose mean is an edit's score
DAMAGE = 5.0  # weight of what text loses, in nats a token: it grows with requests, and trials are of few


@dataclass(frozen=True)
class Grid:
    """Figures of R requests, edited at each of L blocks in small batches."""

    blocks: list[int]  # ascending
    halves: Mapping[str, Figures]  # by metric, for each half of the probes, (2, R, L); NaN where there is none
    seconds: float  # what all of it took

    @cached_property
    def values(self) -> dict[str, Figures]:
        """By metric, (R, L)."""
        return {name: mean_of(figures) for name, figures in self.halves.items()}

    @cached_property
    def half_scores(self) -> Figures:
        """Mean of rewrite, rephrase and locality, of those that a request has, less damage to text, (2, R, L)."""
        score_2RL = mean_of(np.stack([self.halves[name] for name in JUDGED_BY if name in self.halves]))
        return score_2RL - DAMAGE * np.log(self.halves.get("perplexity", np.ones_like(score_2RL)))

    @cached_property
    def scores(self) -> Figures:
        """The same, of all of its probes, (R, L)."""
        return np.asarray(self.half_scores.mean(0))

    @cached_property
    def own_best(self) -> Figures:
        """How much of each request's own best block a block is, (2, R, L), to be judged by that half of the probes.

        It was chosen by the other half: chosen and judged by the same, it would be partly luck. Ties are shared.
        """
        is_best = self.half_scores == self.half_scores.max(2, keepdims=True)
        return np.asarray(is_best / is_best.sum(2, keepdims=True))[::-1]

    @cached_property
    def means(self) -> Figures:
        """Each block's mean score, (L,)."""
        return np.asarray(self.scores.mean(0))

    @property
    def best(self) -> int:
        """The best fixed block, chosen with hindsight; of equals the lowest."""
        return self.blocks[int(self.means.argmax())]

    def mean(self, block: int) -> float:
        """A block's mean score."""
        return float(self.means[self.blocks.index(block)])

    def taken(self, profile: GoldenProfile) -> int:
        """The golden layer, or the next best one where that cannot be edited by the method."""
        return next(block for block in [*profile.golden_layers, *profile.ranking] if block in self.blocks)

    def regret(self, block: int) -> float:
        """What a block falls short of the best fixed one."""
        return float(self.means.max()) - self.mean(block)

    def as_json(self) -> dict[str, Any]:
        """Means over the requests, block by block, and what they say."""
        means = {
            name: mean_of(values).tolist() for name, values in self.values.items() if not np.isnan(values).all()
        }
        return {
            "blocks": self.blocks,
            **means,
            "score": self.means.tolist(),
            "best fixed block": self.best,
            "own best blocks": [self.blocks[place] for place in self.scores.argmax(1)],
            "seconds": round(self.seconds, 1),
        }


def mean_of(values: Figures) -> Figures:
    """The mean over the first axis of those that there are; NaN where there is none."""
    return np.asarray(np.ma.filled(np.ma.masked_invalid(values).mean(0), np.nan))


def outcome(grid: Grid, weights: Figures) -> Row:
    """What requests come to at blocks of somebody's choice, as columns of a table.

    `weights`, (2, R, L) or what broadcasts to it, say how much each block counts; they add up to 1 over blocks. The
    columns are the mean of every metric, and of the score with its 95% bootstrap interval over requests.
    """

    def picked(figures: Figures) -> Figures:
        return mean_of(np.ma.filled((np.ma.masked_invalid(figures) * weights).sum(2), np.nan))

    means = {name: float(mean_of(picked(halves))) for name, halves in grid.halves.items() if "/" not in name}
    scores = picked(grid.half_scores).tolist()
    score = bootstrap_mean(scores, [1.0] * len(scores), range(len(scores))).estimate()
    return {**means, "score": score.mean, "low": score.low, "high": score.high}


def everywhere(grid: Grid, block: int) -> Row:
    """What all requests come to at one block."""
    return outcome(grid, np.equal(grid.blocks, block).astype(float))


def golden_against_optimal(grid: Grid, profile: GoldenProfile, blocks: int) -> list[Row]:
    """How near a fixed block comes to each request's own best one; the profile's is the golden layer."""
    middle = min(grid.blocks, key=lambda block: abs(block - blocks // 2))
    fixed = {"best fixed block": grid.best, "golden layer": grid.taken(profile), "middle block": middle}
    own = outcome(grid, grid.own_best)
    rows: list[Row] = [
        {"choice": "each request's own best block", "block": None, **own},
        *({"choice": name, "block": block, **everywhere(grid, block)} for name, block in fixed.items()),
        {"choice": "a block at random", "block": None, **outcome(grid, np.ones(1) / len(grid.blocks))},
    ]
    return [row | {"of the optimum": float(row["score"] or 0) / float(own["score"] or 1)} for row in rows]


def rank_correlation(scores: Sequence[float] | Figures, grid: Grid) -> float | None:
    """Spearman's, of a selector's scores of all blocks and the sweep's; None where scores do not differ."""
    own = torch.tensor([scores[block] for block in grid.blocks], dtype=torch.float64)
    swept = torch.tensor(grid.means, dtype=torch.float64)
    if len(own) < 3 or own.unique().numel() == 1 or swept.unique().numel() == 1:
        return None
    return float(spearman_corrcoef(own, swept))


def selectors_compared(grid: Grid, profiles: Mapping[str, GoldenProfile], blocks: int) -> list[Row]:
    """What each selector chose on the proxy set, beside the sweep of the test requests."""
    a_request = grid.seconds / len(grid.scores) * blocks / len(grid.blocks)
    rows: list[Row] = []
    for name, profile in profiles.items():
        block, sign = grid.taken(profile), np.abs if profile.order == "magnitude" else np.asarray
        faster = a_request * profile.requests / profile.seconds if profile.stability and profile.seconds else None
        rows.append(
            {
                "selector": name,
                "block": block,
                "score": grid.mean(block),
                "regret": grid.regret(block),
                "spearman": rank_correlation(sign(profile.scores), grid),
                "seconds": profile.seconds,
                "times faster than the sweep": faster,
            }
        )
    return rows


def carried_over(grids: Mapping[str, Grid], profiles: Mapping[str, GoldenProfile]) -> list[Row]:
    """The golden block of each set's proxy requests, measured on every set's test requests.

    Of several sets, also the block of the least regret where that is largest, with hindsight: what it costs to have
    one block for all.
    """
    first, *others = grids.values()
    shared = [block for block in first.blocks if all(block in grid.blocks for grid in others)]
    chosen = {source: first.taken(profile) for source, profile in profiles.items()}
    if others and shared:
        chosen["all, with hindsight"] = min(
            shared, key=lambda one: max(grid.regret(one) for grid in grids.values())
        )
    return [
        {"chosen on": source, "measured on": target, "block": block, **everywhere(grid, block)}
        | {"regret": grid.regret(block)}
        for source, block in chosen.items()
        for target, grid in grids.items()
    ]
