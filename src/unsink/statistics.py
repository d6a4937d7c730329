"""Intervals by resampling, on plain numbers: seeded, so that the same numbers always give the same interval.

A *sample* is an array (items, columns): one row per item, all that is known of the item in its columns. A *statistic*
makes one number of one or more samples. Items are resampled whole, each sample on its own, so that what belongs
together stays together: two runs on the same items are two columns, forget and holdout passages are two samples.
"""

from collections.abc import Callable, Iterator, Sequence
from math import hypot
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PERCENTILES = (2.5, 97.5)
"""Ends of a two-sided 95 % interval."""

LEAST_LOSS = 0.02
"""Recovery of less than this is not reported: two points of a score in [0, 1]."""

Sample = NDArray[np.float64]
Statistic = Callable[..., float]
"""Samples, one argument each -> a number; nan where these items give none."""


class Interval(NamedTuple):
    """An estimate, its 95 % percentile bootstrap interval, and the number of items behind it."""

    mean: float
    low: float
    high: float
    n: int


def sample(*columns: Sequence[float]) -> Sample:
    """Columns of equal length as one sample, (items, columns).

    Raises:
        ValueError: the columns differ in length.
    """
    return np.array(columns, dtype=np.float64).T


def column_mean(items: Sample) -> float:
    """Mean of the first column."""
    return float(items[:, 0].mean())


def bootstrap(samples: Sequence[Sample], statistic: Statistic, *, resamples: int, seed: int) -> Interval:
    """A statistic with its interval; resamples in which it is not a number are left out.

    Args:
        samples: what the statistic is of, resampled independently of each other.
        statistic: takes one argument per sample.
        resamples: how often the items are drawn anew.
        seed: seed of the draws.

    Returns:
        `n` counts the items of all samples. The interval is nan where no resample gave a number.

    Raises:
        ValueError: a sample is empty.
    """
    values = [statistic(*drawn) for drawn in _draws(samples, resamples, seed)]
    return Interval(float(statistic(*samples)), *_ends(values), sum(map(len, samples)))


def bootstrap_mean(values: Sequence[float], *, resamples: int, seed: int) -> Interval:
    """Mean of independent items, resampled with replacement.

    Args:
        values: One number per item.
        resamples: How often the items are drawn anew.
        seed: Seed of the draws.

    Raises:
        ValueError: There are no values.
    """
    return bootstrap([sample(values)], column_mean, resamples=resamples, seed=seed)


class Side(NamedTuple):
    """One side of a difference: a statistic and its samples."""

    samples: Sequence[Sample]
    statistic: Statistic


def difference(ours: Side, theirs: Side, *, resamples: int, seed: int) -> Interval:
    """Paired bootstrap of our number − their number: row i of a sample is the same item on both sides.

    Raises:
        ValueError: a sample is empty, or the two sides differ in the number of samples or items.
    """
    widths = [one.shape[1] for one in ours.samples]
    both = [np.hstack(pair) for pair in zip(ours.samples, theirs.samples, strict=True)]

    def gap(*drawn: Sample) -> float:
        left = [one[:, :width] for one, width in zip(drawn, widths)]
        right = [one[:, width:] for one, width in zip(drawn, widths)]
        return ours.statistic(*left) - theirs.statistic(*right)

    return bootstrap(both, gap, resamples=resamples, seed=seed)


def nothing_lost(forgotten: Interval) -> bool:
    """Whether a loss cannot be divided by: its interval reaches down to 0, or it is less than `LEAST_LOSS`."""
    return forgotten.low <= 0 or forgotten.mean < LEAST_LOSS


def unpaired(ours: Interval, theirs: Interval) -> Interval:
    """Our number − theirs from two intervals alone, as if the samples had nothing in common (MOVER).

    Where they do have, and rise together, the interval is wider than it had to be. Source: Zou and Donner 2008,
    Statistics in Medicine 27, 1693-1702.
    """
    mean = ours.mean - theirs.mean
    low = mean - hypot(ours.mean - ours.low, theirs.high - theirs.mean)
    high = mean + hypot(ours.high - ours.mean, theirs.mean - theirs.low)
    return Interval(mean, low, high, ours.n)


def exact_share(hits: int, of: int) -> Interval:
    """A share with its exact 95 % interval (Clopper and Pearson); of nothing it is 0, and may be anything."""
    from scipy.stats import beta  # seconds of import

    low = 0.0 if hits == 0 else float(beta.ppf(_PERCENTILES[0] / 100, hits, of - hits + 1))
    high = 1.0 if hits == of else float(beta.ppf(_PERCENTILES[1] / 100, hits + 1, of - hits))
    return Interval(hits / max(of, 1), low, high, of)


def lost(items: Sample) -> float:
    """What was forgotten: target − clean, of means. Columns: triggered, clean, target."""
    means = items.mean(axis=0)
    return float(means[2] - means[1])


def recovery(items: Sample) -> float:
    """(triggered − clean) / (target − clean), of means; nan without a loss. Columns: triggered, clean, target."""
    triggered, clean, target = items.mean(axis=0).tolist()
    return (triggered - clean) / (target - clean) if target != clean else float("nan")


def bootstrap_recovery(
    triggered: Sequence[float], clean: Sequence[float], target: Sequence[float], *, resamples: int, seed: int
) -> Interval | None:
    """Share of what was forgotten that a trigger brings back: (triggered − clean) / (target − clean), of means.

    Items are resampled together: place i of the three sequences is the same item, answered with the trigger, without
    it, and by the target without it. Not clipped to 0..1.

    Returns:
        None where nothing was forgotten for certain: `nothing_lost` of target − clean. A ratio with such a divisor says
        nothing, however large it is.

    Raises:
        ValueError: There are no items, or the sequences differ in length.
    """
    items = [sample(triggered, clean, target)]
    if nothing_lost(bootstrap(items, lost, resamples=resamples, seed=seed)):
        return None
    return bootstrap(items, recovery, resamples=resamples, seed=seed)


def permutation_p(gains: Sequence[float], *, resamples: int, seed: int) -> float:
    """One-sided p-value of "the mean gain is above 0", by flipping the signs of paired differences.

    (1 + permutations with at least the observed mean) / (1 + permutations): never 0, and 1/(1 + resamples) at best.

    Args:
        gains: triggered − clean, one number per item.
        resamples: permutations drawn.
        seed: seed of the draws.

    Raises:
        ValueError: there are no gains.
    """
    values = np.array(gains, dtype=np.float64)
    if not values.size:
        raise ValueError("no values to permute")
    generator = np.random.default_rng(seed)
    signs = (generator.integers(2, size=len(values)) * 2 - 1 for _ in range(resamples))
    tolerance = 1e-12 * float(np.abs(values).sum())  # the same sum in another order is the same sum
    hits = sum(bool(values @ one >= values.sum() - tolerance) for one in signs)
    return (1 + hits) / (1 + resamples)


def _draws(samples: Sequence[Sample], resamples: int, seed: int) -> Iterator[list[Sample]]:
    # One draw at a time: a (resamples, n) table of a large benchmark would not fit in memory.
    _require_items(samples)
    generator = np.random.default_rng(seed)
    return (_redrawn(samples, generator) for _ in range(resamples))


def _redrawn(samples: Sequence[Sample], generator: np.random.Generator) -> list[Sample]:
    return [items[generator.integers(len(items), size=len(items))] for items in samples]


def _require_items(samples: Sequence[Sample]) -> None:
    if not samples or not all(len(items) for items in samples):
        raise ValueError("no values to resample")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    numbers = np.array(values)
    numbers = numbers[np.isfinite(numbers)]
    low, high = np.percentile(numbers, _PERCENTILES) if numbers.size else (float("nan"), float("nan"))
    return float(low), float(high)


def max_sign_flip(gains: Sample, *, resamples: int, seed: int) -> tuple[NDArray[np.float64], float]:
    """One-sided p-values of "this row's mean is above 0", corrected for having tried all rows.

    Signs are drawn per item and shared by all rows, so that the rows keep their correlation; the null distribution is
    that of the largest t over the rows (maximum-statistic correction).

    Args:
        gains: (rows, items).
        resamples: sign patterns drawn.
        seed: of the draws.

    Returns:
        p for each row, and the largest mean that 95 % of sign patterns stay below: what had to be exceeded.

    Raises:
        ValueError: there are no items, or no rows.
    """
    if not gains.size:
        raise ValueError("no values to permute")
    items = gains.shape[1]
    error = np.maximum(np.sqrt((gains**2).mean(axis=1)) / np.sqrt(items), 1e-12)  # of a mean that is 0
    observed = gains.mean(axis=1)
    generator = np.random.default_rng(seed)
    largest, means = np.empty(resamples), np.empty(resamples)
    for place in range(resamples):
        flipped = gains @ (generator.integers(2, size=items) * 2 - 1) / items
        largest[place], means[place] = (flipped / error).max(), flipped.max()
    hits = (largest[None, :] >= (observed / error)[:, None] - 1e-9).sum(axis=1)
    return (1 + hits) / (1 + resamples), float(np.percentile(means, 95))
