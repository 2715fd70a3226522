"""A mean's interval is a plain bootstrap's, over any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation import BootstrapMean


def bootstrap(values: np.ndarray, weights: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """95% interval by Efron's bootstrap over units."""
    rng = np.random.default_rng(1)
    numbers = np.unique(units)
    total = np.array([(values * weights)[units == unit].sum() for unit in numbers])
    weight = np.array([weights[units == unit].sum() for unit in numbers])
    draws = rng.integers(len(numbers), size=(4000, len(numbers)))
    low, high = np.percentile(total[draws].sum(1) / weight[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)


def random_values(per_unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """300 units of so many values each, which have something in common within a unit; weights; units."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(300), per_unit)
    values = rng.normal(2, 1, 300)[units] + rng.exponential(0.5, len(units))
    return values, rng.uniform(0.2, 2, len(units)), units


def add(mean: BootstrapMean, *columns: np.ndarray) -> None:
    values, weights, units = (column.tolist() for column in columns)
    mean.update(values, weights, units, [1 / (units.count(unit)) for unit in units])


@pytest.mark.parametrize("per_unit", [1, 4])
def test_the_interval_is_a_plain_bootstraps(per_unit: int) -> None:
    values, weights, units = random_values(per_unit)
    mean = BootstrapMean()
    add(mean, values, weights, units)
    estimate = mean.compute().estimate()
    low, high = bootstrap(values, weights, units)
    assert estimate.mean == pytest.approx(np.average(values, weights=weights))
    assert estimate.count == 300
    assert estimate.low == pytest.approx(low, abs=0.05 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.05 * (high - low))


def test_states_of_two_processes_add_up() -> None:
    """However values are spread and ordered, and where a unit's own values are apart."""
    columns = random_values(2)
    whole, one, two = BootstrapMean(), BootstrapMean(), BootstrapMean()
    add(whole, *columns)
    order = np.random.default_rng(2).permutation(600)
    for part, mean in ((order[:50], one), (order[50:], two)):
        values, weights, units = (column[part].tolist() for column in columns)
        mean.update(values, weights, units, [0.5] * len(part))
    for state in ("total", "weight", "count"):
        setattr(one, state, getattr(one, state) + getattr(two, state))
    merged, expected = one.compute().estimate(), whole.compute().estimate()
    assert merged.count == expected.count == 300
    for name in ("mean", "low", "high"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name), abs=1e-9)


def test_more_values_give_a_narrower_interval() -> None:
    few, many = BootstrapMean(), BootstrapMean()
    columns = random_values(1)
    add(few, *(column[:30] for column in columns))
    add(many, *columns)
    widths = [e.high - e.low for e in (mean.compute().estimate() for mean in (few, many))]
    assert 2 < widths[0] / widths[1] < 5  # the square root of ten
