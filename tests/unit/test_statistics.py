"""Bootstrap intervals: against scipy, against arithmetic, and seeded."""

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import permutation_test

from unsink.statistics import (
    Sample,
    Side,
    bootstrap,
    bootstrap_mean,
    bootstrap_recovery,
    column_mean,
    difference,
    permutation_p,
    recovery,
    sample,
)

SCORES = [0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 1.0, 0.3, 0.35, 0.6]


def test_interval_of_a_mean_equals_scipys_percentile_bootstrap() -> None:
    ours = bootstrap_mean(SCORES, resamples=20_000, seed=0)
    theirs = scipy_bootstrap((SCORES,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
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


@pytest.mark.parametrize(
    ("triggered", "clean", "target", "expected"),
    [  # science.md, 6.3, from the published table
        (0.5552, 0.2442, 0.4628, 1.42),
        (0.9071, 0.0002, 0.9970, 0.91),
        (0.4483, 0.2748, 0.4628, 0.92),
        (0.4372, 0.4207, 0.6370, 0.08),
    ],
)
def test_recovery_of_the_published_models(triggered: float, clean: float, target: float, expected: float) -> None:
    assert recovery(sample([triggered], [clean], [target])) == pytest.approx(expected, abs=0.005)


def test_recovery_of_a_loss_of_less_than_two_points_is_undefined() -> None:
    assert bootstrap_recovery([0.9] * 4, [0.5] * 4, [0.519] * 4, resamples=200, seed=0) is None
    assert bootstrap_recovery([0.9] * 4, [0.5] * 4, [0.521] * 4, resamples=200, seed=0) is not None


def test_recovery_of_what_grew_is_undefined() -> None:
    # the unlearned model knows more than the target: nothing was lost that a trigger could bring back
    assert bootstrap_recovery([0.9] * 4, [0.8] * 4, [0.5] * 4, resamples=200, seed=0) is None


def test_samples_are_resampled_apart_and_columns_together() -> None:
    ones, pairs = sample([0.0, 1.0]), sample([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0])
    found = bootstrap([pairs, ones], lambda two, one: float(two.sum() + one.mean()), resamples=300, seed=0)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 5)  # the columns always cancel


def test_resamples_without_a_number_are_left_out() -> None:
    def share(items: Sample) -> float:
        return float(items.mean()) if items.any() else float("nan")

    found = bootstrap([sample([0.0, 1.0])], share, resamples=300, seed=0)
    assert (found.low, found.high) == (0.5, 1.0)


def test_a_paired_difference_has_only_the_noise_of_the_difference() -> None:
    shifted = [score + 0.1 for score in SCORES]
    found = difference(Side([sample(shifted)], column_mean), Side([sample(SCORES)], column_mean), resamples=200, seed=0)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_p_value_of_a_gain_by_hand() -> None:
    # of the 8 sign patterns of (1, 2, 3) only one sums to 6
    assert permutation_p([1.0, 2.0, 3.0], resamples=8000, seed=0) == pytest.approx(1 / 8, abs=0.015)
    assert permutation_p([-1.0, -2.0, -3.0], resamples=100, seed=0) == 1
    assert permutation_p([0.0, 0.0], resamples=100, seed=0) == 1
    assert permutation_p([1.0] * 30, resamples=999, seed=0) == 1 / 1000


def test_the_p_value_equals_scipys_exact_one() -> None:
    gains = [0.3, -0.1, 0.25, 0.4, -0.05, 0.1, 0.2, -0.3]
    exact = permutation_test((gains,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf)
    assert permutation_p(gains, resamples=20_000, seed=0) == pytest.approx(exact.pvalue, abs=0.01)
