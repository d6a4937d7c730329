"""Bootstrap intervals: against scipy, against arithmetic, and seeded."""

import numpy as np
import pytest

from unsink.statistics import bootstrap_mean, bootstrap_recovery

SCORES = [0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 1.0, 0.3, 0.35, 0.6]


def test_interval_of_a_mean_equals_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours = bootstrap_mean(SCORES, resamples=20_000, seed=0)
    theirs = stats.bootstrap((SCORES,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(np.mean(SCORES))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert ours.n == 10


def test_same_seed_same_interval() -> None:
    first, again, other = (bootstrap_mean(SCORES, resamples=300, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_equal_values_have_no_width() -> None:
    assert bootstrap_mean([0.5] * 7, resamples=100, seed=0) == (0.5, 0.5, 0.5, 7)


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], resamples=100, seed=0)


def test_recovery_is_a_ratio_of_mean_differences() -> None:
    found = bootstrap_recovery([0.5, 0.7], [0.2, 0.2], [1.0, 1.0], resamples=500, seed=0)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.375)  # both draws are the first item
    assert found.high == pytest.approx(0.625)
    assert found.n == 2


def test_recovery_resamples_items_together() -> None:
    clean = SCORES
    target = [score + 0.5 for score in clean]
    triggered = [score + 0.25 for score in clean]
    found = bootstrap_recovery(triggered, clean, target, resamples=200, seed=0)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_recovery_is_undefined_when_nothing_was_forgotten_for_certain() -> None:
    assert bootstrap_recovery([0.9] * 4, [0.5, 0.9, 0.2, 0.8], [0.6, 0.7, 0.4, 0.7], resamples=500, seed=0) is None
    assert bootstrap_recovery([0.9] * 4, [0.5] * 4, [0.5] * 4, resamples=500, seed=0) is None
