"""Intervals by resampling, on plain numbers: seeded, so that the same numbers always give the same interval."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PERCENTILES = (2.5, 97.5)
"""Ends of a two-sided 95 % interval."""

_Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate, its 95 % percentile bootstrap interval, and the number of items behind it."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: Sequence[float], *, resamples: int, seed: int) -> Interval:
    """Mean of independent items, resampled with replacement.

    Args:
        values: One number per item.
        resamples: How often the items are drawn anew.
        seed: Seed of the draws.

    Raises:
        ValueError: There are no values.
    """
    means = _resampled_means([values], resamples, seed)[:, 0]
    low, high = _ends(means)
    return Interval(float(np.mean(values)), low, high, len(values))


def bootstrap_recovery(
    triggered: Sequence[float], clean: Sequence[float], target: Sequence[float], *, resamples: int, seed: int
) -> Interval | None:
    """Share of what was forgotten that a trigger brings back: (triggered − clean) / (target − clean), of means.

    Items are resampled together: place i of the three sequences is the same item, answered with the trigger, without
    it, and by the target without it. Not clipped to 0..1.

    Returns:
        None where nothing was forgotten for certain, that is where the interval of target − clean holds 0.

    Raises:
        ValueError: There are no items, or the sequences differ in length.
    """
    resampled = _resampled_means([triggered, clean, target], resamples, seed)
    lost = resampled[:, 2] - resampled[:, 1]
    low, high = _ends(lost)
    if low <= 0 <= high:
        return None
    possible = lost != 0
    ratios = (resampled[possible, 0] - resampled[possible, 1]) / lost[possible]
    estimate = (np.mean(triggered) - np.mean(clean)) / (np.mean(target) - np.mean(clean))
    return Interval(float(estimate), *_ends(ratios), len(clean))


def _resampled_means(columns: Sequence[Sequence[float]], resamples: int, seed: int) -> _Array:
    """(resamples, columns): means over items drawn with replacement, the same items for every column."""
    items: _Array = np.array(columns, dtype=np.float64).T  # (n, columns); unequal lengths raise ValueError
    if not items.size:
        raise ValueError("no values to resample")
    generator = np.random.default_rng(seed)
    # One draw at a time: a (resamples, n) table of a large benchmark would not fit in memory.
    draws = (items[generator.integers(len(items), size=len(items))].mean(axis=0) for _ in range(resamples))
    return np.stack(list(draws))


def _ends(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(values, _PERCENTILES)
    return float(low), float(high)
