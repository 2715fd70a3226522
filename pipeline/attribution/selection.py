"""From a score a block to golden layers: Tukey's fences and the ranking (arXiv 2602.20207, appendix A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def select(scores: Sequence[float], fences: float = 1.0) -> Selection:
    """Rank blocks by signed score, setting aside those outside [Q1 − f·IQR, Q3 + f·IQR].

    Args:
        scores: one a block.
        fences: Tukey's factor f; 0 turns the fences off. Quartiles are interpolated linearly.
    """
    raw_ranking = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    low, high = -math.inf, math.inf
    if fences > 0:
        first, third = np.percentile(scores, [25, 75])
        low, high = float(first - fences * (third - first)), float(third + fences * (third - first))
    excluded = [block for block, score in enumerate(scores) if not low <= score <= high]
    return Selection(low, high, excluded, [b for b in raw_ranking if b not in excluded], raw_ranking)
