"""Intervals of means over seeds, where the runs of all seeds are asked the same items.

Items are crossed with seeds, not nested in them: a passage that is easy for one run is easy for the next, so that ten
seeds know no more about the passages than one does. Seeds and items are therefore drawn apart, and the items drawn
count for all seeds and samples alike. What is compared within a seed is paired by that, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unsink.statistics import Interval, Sample, Statistic, bootstrap, sample


class Items(NamedTuple):
    """A sample whose items are known.

    Attributes:
        values: (items, columns).
        ids: of the item behind each row; equal ids are one item, in all samples and seeds.
    """

    values: Sample
    ids: Sequence[str]


def over_seeds(seeds: Sequence[Sequence[Items]], statistic: Statistic, *, resamples: int, seed: int) -> Interval:
    """The mean of a statistic over several seeds, by a bootstrap of seeds crossed with items.

    A resample draws seeds, and items from all that some seed has; every drawn seed takes those of them that it has.
    The variance of single items in single seeds counts up to three times, so intervals are rather too wide than too
    narrow. Source: Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1, 386-411.

    Args:
        seeds: the samples of each seed; which items they have may differ.
        statistic: takes one argument per sample.
        resamples: how often seeds and items are drawn anew.
        seed: seed of the draws.

    Returns:
        `n` counts the seeds: it is they that limit the claim. A resample in which a sample of a drawn seed is left
        without items gives no number.

    Raises:
        ValueError: there are no seeds, a sample is empty, or its ids are not as many as its rows.
    """
    if not all(len(items.ids) for samples in seeds for items in samples):
        raise ValueError("no values to resample")
    ids = sorted({one for samples in seeds for items in samples for one in items.ids})
    number = {one: place for place, one in enumerate(ids)}
    known = [[(items.values, np.array([number[one] for one in items.ids])) for items in one] for one in seeds]

    def mean(drawn_seeds: Sample, drawn_items: Sample) -> float:
        times = np.bincount(drawn_items[:, 0].astype(int), minlength=len(ids))
        drawn = [[np.repeat(values, times[places], axis=0) for values, places in one] for one in known]
        found = [statistic(*one) if all(map(len, one)) else float("nan") for one in drawn]
        return float(np.mean([found[int(place)] for place in drawn_seeds[:, 0]]))

    both = [sample(range(len(seeds))), sample(range(len(ids)))]
    return bootstrap(both, mean, resamples=resamples, seed=seed)._replace(n=len(seeds))
