"""From scores to golden layers: Tukey's fences, the ranking (arXiv 2602.20207, appendix A), how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.attribution.selector import Values

RESAMPLES = 1000


class Selection(NamedTuple):
    """What the fences and the ranking make of the scores."""

    fences: tuple[float, float] | None  # the lower and the upper one; None: off
    excluded: list[int]  # blocks whose score lies outside, in order of depth
    ranking: list[int]  # the other blocks, best first; ties go to the shallower
    raw_ranking: list[int]  # all blocks, best first


def select(
    scores: Sequence[float] | NDArray[np.float64], fences: float = 1.0, order: str = "magnitude"
) -> Selection:
    """Rank blocks, setting aside those outside [Q1 − f·IQR, Q3 + f·IQR].

    The sign is the same for nearly all blocks, and says how well the model knows the old answers: well enough, and
    it turns negative, so that the paper's signed order would put the block of least reach first. Ranking by
    magnitude keeps the meaning, and agrees where scores are positive.

    Args:
        fences: Tukey's factor f; 0 turns the fences off. Quartiles are interpolated linearly.
        order: `signed` (the paper's) or `magnitude`.
    """
    score_L = np.asarray(scores, dtype=np.float64)
    first, third = np.percentile(score_L, [25, 75])
    reach = fences * (third - first) if fences else math.inf
    low, high = first - reach, third + reach
    size_L = np.abs(score_L) if order == "magnitude" else score_L
    raw_ranking = np.argsort(-size_L, kind="stable").tolist()
    excluded = np.flatnonzero((score_L < low) | (score_L > high)).tolist()
    ranking = [block for block in raw_ranking if block not in excluded]
    return Selection((float(low), float(high)) if fences else None, excluded, ranking, raw_ranking)


class Stability(BaseModel):
    """What becomes of the choice when the proxy set is another draw from the same facts."""

    model_config = ConfigDict(frozen=True)

    resamples: int  # how many proxy sets were drawn, with replacement, from the one that was scored
    low: list[float]  # of each block's mean score: a 95% interval
    high: list[float]
    chosen: list[float]  # the share of resamples in which each block comes first, fences and order taken anew


def judge(values_NL: Values, fences: float = 1.0, order: str = "magnitude", seed: int = 0) -> Stability:
    """Bootstrap a choice by fences and order, from each request's score of every block."""
    requests, blocks = values_NL.shape
    random = np.random.default_rng([seed, requests])
    means_RL = np.stack([values_NL[random.integers(requests, size=requests)].mean(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(means_RL, [2.5, 97.5], axis=0)
    first_R = [select(mean_L, fences, order).ranking[0] for mean_L in means_RL]
    chosen = np.bincount(first_R, minlength=blocks) / RESAMPLES
    return Stability(resamples=RESAMPLES, low=low.tolist(), high=high.tolist(), chosen=chosen.tolist())
