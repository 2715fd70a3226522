"""A mean with its 95% interval: Wilson's for a rate, Newcombe's for two rates' difference, else the bootstrap's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
NORMAL_95 = 1.959964  # standard deviations either side of a normal mean that hold 95%


@dataclass(frozen=True)
class Estimate:
    """A figure, how many units it stands on, and its 95% interval."""

    mean: float
    count: int
    low: float
    high: float


class Resampled:
    """A figure of the data itself (in place 0) and of every resample, and how many units it stands on.

    Two of the same units are drawn alike, so that what is made of them place by place (a difference, a harmonic
    mean) has its own interval, as a paired bootstrap gives it. A rate is a mean of ones and noughts alone, its
    `units`: 10 of 10 say more than [1, 1], which is all that resamples of them show.
    """

    def __init__(self, values: np.ndarray, count: int, units: Sequence[float] = ()) -> None:
        self.values, self.count, self.units = values, count, units
        self.less: Resampled | None = None  # of a difference of two rates, them

    def minus(self, other: Resampled) -> Resampled:
        """The difference to the same units' other figure."""
        found = Resampled(self.values - other.values, min(self.count, other.count))
        if len(self.units) == len(other.units) > 0:
            found.units, found.less = self.units, other
        return found

    def estimate(self) -> Estimate:
        """The figure with the middle 95% of its resamples; of rates with Wilson's or Newcombe's interval."""
        mean = float(self.values[0])
        if self.less:
            return Estimate(mean, self.count, *newcombe(self.units, self.less.units))
        if len(self.units):
            return Estimate(mean, self.count, *wilson(mean, self.count))
        return Estimate(mean, self.count, *np.nanpercentile(self.values[1:], [2.5, 97.5]).tolist())


@lru_cache(maxsize=100_000)
def _draws(unit: int) -> np.ndarray:
    """How often a unit is drawn: once for the data itself, and in each resample; the same for every figure."""
    return np.concatenate([[1.0], np.random.default_rng(unit).poisson(1.0, RESAMPLES)]).astype(np.float32)


def bootstrap_mean(values: Sequence[float], weights: Sequence[float], units: Sequence[int]) -> Resampled:
    """The weighted mean of units' values, with the Poisson bootstrap's resamples.

    A resample draws each unit (a request, a window of text) Poisson(1) times: for many units that is Efron's
    bootstrap, and the draws of a unit do not depend on which others there are. The count is the weights' sum.
    """
    shares = np.stack([_draws(unit) for unit in units]) * np.asarray(weights, dtype=np.float64)[:, None]
    with np.errstate(invalid="ignore"):  # of few units, a resample may have drawn none: no number
        means = (shares * np.asarray(values, dtype=np.float64)[:, None]).sum(0) / shares.sum(0)
    return Resampled(means, round(sum(weights)), values if all(value in (0, 1) for value in values) else ())


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a rate over so many units (Wilson, JASA 22, 1927)."""
    shrunk = NORMAL_95**2 / count
    middle = (rate + shrunk / 2) / (1 + shrunk)
    half = NORMAL_95 / (1 + shrunk) * (rate * (1 - rate) / count + shrunk / (4 * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the difference of two rates of the same units (Newcombe, Stat. Med. 17, 1998, method 10,
    its correlation not corrected for continuity).
    """
    one, other, count = float(np.mean(after)), float(np.mean(before)), len(after)
    spread = float(np.std(after) * np.std(before))
    together = float(np.mean(np.multiply(after, before)) - one * other) / spread if spread else 0.0

    def off(far: float, near: float) -> float:
        return math.sqrt(max(0.0, far**2 - 2 * together * far * near + near**2))

    (low, high), (other_low, other_high) = wilson(one, count), wilson(other, count)
    return one - other - off(one - low, other_high - other), one - other + off(high - one, other - other_low)
