"""From a score a block to golden layers: Tukey's fences and the ranking (arXiv 2602.20207, appendix A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Selection:
    """What the fences and the ranking make of the scores.

    Attributes:
        low, high: the fences; infinite when they are off.
        excluded: blocks whose score lies outside, in order of depth.
        ranking: the other blocks, best first; ties go to the shallower.
        raw_ranking: all blocks, best first.
    """

    low: float
    high: float
    excluded: list[int]
    ranking: list[int]
    raw_ranking: list[int]


def select(scores: Sequence[float], fences: float = 1.0, order: str = "signed") -> Selection:
    """Rank blocks, setting aside those outside [Q1 − f·IQR, Q3 + f·IQR].

    A score is about r_old · K · r_new, where r are what the two losses want changed at the logits and K says
    how far this block's weights reach them. Its sign is the same for nearly all blocks and says how well the
    model knows the old answers: well enough, and it turns negative, so that the paper's signed order would put
    the block of least reach first. Ranking by magnitude keeps the meaning, and agrees where scores are positive.

    Args:
        scores: one a block.
        fences: Tukey's factor f; 0 turns the fences off. Quartiles are interpolated linearly.
        order: `signed` (the paper's) or `magnitude`.
    """
    size = [abs(score) if order == "magnitude" else score for score in scores]
    raw_ranking = sorted(range(len(scores)), key=lambda block: (-size[block], block))
    low, high = -math.inf, math.inf
    if fences > 0:
        first, third = np.percentile(scores, [25, 75])
        low, high = float(first - fences * (third - first)), float(third + fences * (third - first))
    excluded = [block for block, score in enumerate(scores) if not low <= score <= high]
    return Selection(low, high, excluded, [b for b in raw_ranking if b not in excluded], raw_ranking)


def first_choices(scores_RL: NDArray[np.float64], fences: float = 1.0, order: str = "signed") -> NDArray[np.intp]:
    """The first of the ranking for each of R rows of scores, as `select` finds it, shape (R,)."""
    size_RL = np.abs(scores_RL) if order == "magnitude" else scores_RL
    if fences > 0:
        first_R, third_R = np.percentile(scores_RL, [25, 75], axis=1)
        reach_R = fences * (third_R - first_R)
        low_R1, high_R1 = (first_R - reach_R)[:, None], (third_R + reach_R)[:, None]
        size_RL = np.where((low_R1 <= scores_RL) & (scores_RL <= high_R1), size_RL, -np.inf)
    return size_RL.argmax(axis=1)
