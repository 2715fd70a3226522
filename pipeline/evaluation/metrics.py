"""A mean with its bootstrap interval, as sums that any number of processes can add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

RESAMPLES = 1000


@dataclass  # torchmetrics squeezes what `compute` returns, so it cannot be frozen
class Estimate:
    """A mean, how many units it stands on, and its 95% bootstrap interval."""

    mean: float
    count: int
    low: float
    high: float


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

    def __init__(self) -> None:
        super().__init__()
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

    def compute(self) -> Estimate:
        """The mean over all processes' values."""
        means = (self.total / self.weight).cpu().numpy()
        low, high = np.nanpercentile(means[1:], [2.5, 97.5])
        return Estimate(float(means[0]), round(float(self.count)), float(low), float(high))
