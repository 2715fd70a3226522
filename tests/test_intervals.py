"""A mean's interval is a plain bootstrap's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.evaluation.metrics import Resampled, bootstrap_mean


def bootstrap(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95% interval by Efron's bootstrap over units."""
    draws = np.random.default_rng(1).integers(len(values), size=(4000, len(values)))
    low, high = np.percentile((values * weights)[draws].sum(1) / weights[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)


def random_values() -> tuple[np.ndarray, np.ndarray]:
    """300 units' values, and weights that are whole in all."""
    rng = np.random.default_rng(0)
    return rng.normal(2, 1, 300) + rng.exponential(0.5, 300), rng.integers(1, 9, 300)


def test_the_interval_is_a_plain_bootstraps() -> None:
    values, weights = random_values()
    estimate = bootstrap_mean(values.tolist(), weights.tolist(), range(300)).estimate()
    low, high = bootstrap(values, weights)
    assert estimate.mean == pytest.approx(np.average(values, weights=weights))
    assert estimate.count == weights.sum()
    assert estimate.low == pytest.approx(low, abs=0.05 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.05 * (high - low))


def test_a_unit_is_drawn_alike_wherever_it_stands() -> None:
    values, weights = random_values()
    order = np.random.default_rng(2).permutation(300)
    expected = bootstrap_mean(values.tolist(), weights.tolist(), range(300))
    found = bootstrap_mean(values[order].tolist(), weights[order].tolist(), order.tolist())
    np.testing.assert_allclose(found.values, expected.values)


def test_more_values_give_a_narrower_interval() -> None:
    values, _ = random_values()
    few, many = (bootstrap_mean(values[:n].tolist(), [1] * n, range(n)).estimate() for n in (30, 300))
    assert 2 < (few.high - few.low) / (many.high - many.low) < 5  # the square root of ten


@pytest.mark.parametrize(
    ("held", "of", "low", "high"),  # as any table of score intervals has them
    [(10, 10, 0.7225, 1), (0, 10, 0, 0.2775), (1, 1, 0.2065, 1), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361)],
)
def test_a_rates_interval_is_wilsons(held: int, of: int, low: float, high: float) -> None:
    estimate = bootstrap_mean([1.0] * held + [0.0] * (of - held), [1] * of, range(of)).estimate()
    assert (estimate.mean, estimate.count) == (held / of, of)
    assert [estimate.low, estimate.high] == pytest.approx([low, high], abs=1e-4)


def rate(values: Sequence[float]) -> Resampled:
    return bootstrap_mean(values, [1] * len(values), range(len(values)))


@pytest.mark.parametrize(
    ("after", "before", "low", "high"),
    [
        ([1] * 10, [0] * 10, 0.6076, 1),  # ten gained say no more than that
        ([1] * 7, [1] * 7, -0.3543, 0.3543),  # nor do seven that stay
        ([1] * 30 + [0] * 10, [1] * 5 + [0] * 35, 0.4445, 0.7404),
        ([1] * 20 + [0] * 20, [1] * 20 + [0] * 20, 0, 0),  # pair by pair the same
    ],
)
def test_a_difference_of_rates_is_newcombes(
    after: list[float], before: list[float], low: float, high: float
) -> None:
    difference = rate(after).minus(rate(before)).estimate()
    assert difference.mean == pytest.approx(np.mean(after) - np.mean(before))
    assert [difference.low, difference.high] == pytest.approx([low, high], abs=1e-3)


def test_a_difference_of_other_means_keeps_its_paired_bootstrap() -> None:
    before = rate([0.5] * 20 + [0.0] * 20)
    difference = rate([1.0] * 20 + [0.5] * 20).minus(before).estimate()
    assert [difference.mean, difference.low, difference.high] == pytest.approx([0.5] * 3)
