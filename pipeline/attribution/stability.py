"""How sure a choice is: what resampling the proxy set does to the blocks' means and to the block that is chosen."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.attribution.selection import first_choices
from pipeline.attribution.selector import Values

RESAMPLES = 1000


class Stability(BaseModel):
    """What becomes of the choice when the proxy set is another draw from the same facts.

    Attributes:
        resamples: how many proxy sets were drawn, with replacement, from the one that was scored.
        low, high: each block's mean score: a 95% interval.
        chosen: the share of resamples in which each block comes first, fences and order taken anew.
    """

    model_config = ConfigDict(frozen=True)

    resamples: int
    low: list[float]
    high: list[float]
    chosen: list[float]


def judge(values_NL: Values, fences: float = 1.0, order: str = "signed", seed: int = 0) -> Stability:
    """Bootstrap a choice.

    Args:
        values_NL: each request's score of every block.
        fences, order: how it was chosen.
        seed: of the draws.
    """
    requests, blocks = values_NL.shape
    random = np.random.default_rng([seed, requests])
    means_RL = np.stack([values_NL[random.integers(requests, size=requests)].mean(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(means_RL, [2.5, 97.5], axis=0)
    chosen = np.bincount(first_choices(means_RL, fences, order), minlength=blocks) / RESAMPLES
    return Stability(resamples=RESAMPLES, low=low.tolist(), high=high.tolist(), chosen=chosen.tolist())
