"""A mean with its bootstrap interval, as sums that any number of processes can add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure, how many units it stands on, and its 95% bootstrap interval."""

    mean: float
    count: int
    low: float
    high: float


class Resampled:
    """A figure of the data itself (in place 0) and of every resample, and how many units it stands on.

    Two of the same units are drawn alike, so that what is made of them place by place (a difference, a harmonic
    mean) has its own interval, as a paired bootstrap gives it.
    """

    def __init__(self, values: np.ndarray, count: int) -> None:
        self.values = values
        self.count = count

    def then(self, function: Callable[[np.ndarray], np.ndarray]) -> Resampled:
        """A function of the figure."""
        return Resampled(function(self.values), self.count)

    def minus(self, other: Resampled) -> Resampled:
        """The difference to the same units' other figure."""
        return Resampled(self.values - other.values, min(self.count, other.count))

    def estimate(self) -> Estimate:
        """The figure with the middle 95% of its resamples."""
        low, high = np.nanpercentile(self.values[1:], [2.5, 97.5])
        return Estimate(float(self.values[0]), self.count, float(low), float(high))


@lru_cache(maxsize=100_000)
def poisson_weights(unit: int) -> np.ndarray:
    """How often a unit is drawn in each resample, shape (RESAMPLES,); the same in every process."""
    return np.random.default_rng(unit).poisson(1.0, RESAMPLES).astype(np.float32)


class BootstrapMean(Metric):
    """Weighted mean of values, with a 95% interval from the Poisson bootstrap.

    A resample draws each unit (a request, a window of text) Poisson(1) times: for many units that is
    Efron's bootstrap, but needs sums only, so it is right however units are spread over processes. Values
    of one unit are drawn together.
    """

    full_state_update = False

    def __init__(self, **settings: bool) -> None:
        super().__init__(**settings)
        self.total: Tensor
        self.weight: Tensor
        self.count: Tensor
        # place 0 is the data itself, the others are the resamples
        self.add_state("total", torch.zeros(1 + RESAMPLES, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(1 + RESAMPLES, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, values: Sequence[float], weights: Sequence[float], units: Sequence[int], counts: Sequence[float]
    ) -> None:
        """Add values.

        Args:
            values: what is averaged.
            weights: each value's weight in the mean.
            units: the unit that each value belongs to.
            counts: each value's share in the count that is reported.
        """
        draws = np.stack([np.concatenate([[1.0], poisson_weights(unit)]) for unit in units])
        shares = torch.from_numpy(draws * np.asarray(weights)[:, None]).to(self.total)
        self.weight += shares.sum(0)
        self.total += (shares * torch.tensor(values, dtype=torch.float64).to(self.total)[:, None]).sum(0)
        self.count += float(sum(counts))

    def compute(self) -> Resampled:
        """The mean over all processes' values, and that of every resample."""
        return Resampled((self.total / self.weight).cpu().numpy(), round(float(self.count)))
