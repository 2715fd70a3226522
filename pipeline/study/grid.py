"""What trial edits came to: figures of requests by blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]  # (R, L): R requests, L blocks; or (R,), (L,)
JUDGED_BY = ("rewrite", "rephrase", "locality")  # whose mean is an edit's score


@dataclass(frozen=True)
class Grid:
    """Figures of R requests, each edited alone at each of L blocks.

    Attributes:
        blocks: the blocks, ascending.
        values: by metric, (R, L); NaN where a request has no such probe.
        seconds: what all of it took.
    """

    blocks: list[int]
    values: Mapping[str, Figures]
    seconds: float

    @cached_property
    def scores(self) -> Figures:
        """Mean of rewrite, rephrase and locality, of those that a request has, (R, L)."""
        return mean_of(np.stack([self.values[name] for name in JUDGED_BY if name in self.values]))

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
    there = ~np.isnan(values)
    sums, counts = np.where(there, values, 0.0).sum(0), there.sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
