"""How sure a choice is: what resampling the proxy set does to the blocks' means and to the block that is chosen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.attribution.selection import first_choices
from pipeline.attribution.selector import Values

RESAMPLES = 1000
LEAST = 8  # requests in the smallest proxy set that is tried
TOGETHER = 1 << 18  # draws that are in memory at once


class Stability(BaseModel):
    """What becomes of the choice when the proxy set is another draw from the same facts.

    Attributes:
        resamples: how many proxy sets were drawn, with replacement, from the one that was scored.
        low, high: each block's mean score: a 95% interval.
        chosen: the share of resamples in which each block comes first, fences and order taken anew.
        sizes: of smaller proxy sets, in requests; the last is the whole one.
        agreeing: the share of resamples of each size that choose the block that was chosen in the end.
        leading: the block that resamples of each size choose most often.
    """

    model_config = ConfigDict(frozen=True)

    resamples: int
    low: list[float]
    high: list[float]
    chosen: list[float]
    sizes: list[int]
    agreeing: list[float]
    leading: list[int]


def judge(
    values_NL: Values,
    golden: int,
    fences: float = 1.0,
    order: str = "signed",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Stability:
    """Bootstrap a choice.

    Args:
        values_NL: each request's score of every block.
        golden: the block that their means choose.
        fences, order: how it was chosen.
        seed: of the draws.
        resamples: how many there are of each size.
    """
    requests, blocks = values_NL.shape
    sizes = [LEAST << step for step in range(32) if LEAST << step < requests] + [requests]
    shares = []
    for size in sizes:
        means_RL = resampled_means(values_NL, size, resamples, np.random.default_rng([seed, size]))
        shares.append(np.bincount(first_choices(means_RL, fences, order), minlength=blocks) / resamples)
    low, high = np.percentile(means_RL, [2.5, 97.5], axis=0)
    return Stability(
        resamples=resamples,
        low=low.tolist(),
        high=high.tolist(),
        chosen=shares[-1].tolist(),
        sizes=sizes,
        agreeing=[float(share_L[golden]) for share_L in shares],
        leading=[int(share_L.argmax()) for share_L in shares],
    )


def resampled_means(values_NL: Values, size: int, resamples: int, random: np.random.Generator) -> Values:
    """Mean scores of proxy sets of `size` requests, drawn with replacement, (R, L)."""
    parts = [counts_RN @ values_NL / size for counts_RN in _draws(len(values_NL), size, resamples, random)]
    return np.concatenate(parts)


def _draws(requests: int, size: int, resamples: int, random: np.random.Generator) -> Iterator[Values]:
    """How often each request is in each resample, (R, N), a few resamples at a time."""
    together = max(1, TOGETHER // max(requests, size))
    for start in range(0, resamples, together):
        count = min(together, resamples - start)
        drawn_RS = random.integers(requests, size=(count, size)) + requests * np.arange(count)[:, None]
        yield np.bincount(drawn_RS.ravel(), minlength=count * requests).reshape(count, requests).astype(float)
