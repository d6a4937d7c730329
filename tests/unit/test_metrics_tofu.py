"""TOFU's scores: by hand, and published relations."""

import math

import pytest

from unsink.metrics.tofu import (
    choice_probability,
    forget_quality,
    log_truth_ratio,
    model_utility,
    truth_ratio_forget,
    truth_ratio_kept,
)

RIGHT = math.log(0.5)
WRONG = [math.log(0.25), math.log(0.0625)]


def test_truth_ratio_averages_wrong_answers_in_one_of_two_ways() -> None:
    # geometric: 0.125 / 0.5; arithmetic: 0.15625 / 0.5
    assert math.exp(log_truth_ratio(RIGHT, WRONG, "geometric")) == pytest.approx(0.25)
    assert math.exp(log_truth_ratio(RIGHT, WRONG, "arithmetic")) == pytest.approx(0.3125)


@pytest.mark.parametrize(("ratio", "forget", "kept"), [(0.25, 0.25, 0.75), (1.0, 1.0, 0.0), (4.0, 0.25, 0.0)])
def test_the_two_readings_of_a_truth_ratio(ratio: float, forget: float, kept: float) -> None:
    assert truth_ratio_forget(math.log(ratio)) == pytest.approx(forget)
    assert truth_ratio_kept(math.log(ratio)) == pytest.approx(kept)


def test_hopeless_answers_stay_in_range() -> None:
    for extreme in (log_truth_ratio(-5000.0, [-1.0]), log_truth_ratio(-1.0, [-5000.0])):
        assert 0 <= truth_ratio_forget(extreme) <= 1
        assert 0 <= truth_ratio_kept(extreme) <= 1
    assert choice_probability(-5000.0, [-1.0]) == 0


def test_the_probability_among_given_answers() -> None:
    assert choice_probability(RIGHT, WRONG) == pytest.approx(0.5 / 0.8125)


def test_open_unlearning_adds_an_epsilon_to_what_it_divides_by() -> None:
    # 1e-10 / (1e-12 + 1e-10) instead of 100: a model that finds every answer hopeless looks undecided
    hopeless = log_truth_ratio(math.log(1e-12), [math.log(1e-10)], "geometric", epsilon=1e-10)
    assert math.exp(hopeless) == pytest.approx(1 / 1.01)
    assert math.exp(log_truth_ratio(RIGHT, WRONG, "geometric", epsilon=1e-10)) == pytest.approx(0.25)
    assert choice_probability(RIGHT, WRONG, epsilon=0.1) == pytest.approx(0.5 / 0.9125)


def test_a_truth_ratio_needs_wrong_answers() -> None:
    with pytest.raises(ValueError, match="wrong answers"):
        log_truth_ratio(RIGHT, [])


def test_forget_quality_is_the_exact_kolmogorov_smirnov_p_value() -> None:
    # three against three without overlap: 2 of the 20 orders are as extreme
    assert forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(0.1)
    assert forget_quality([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="two models"):
        forget_quality([], [1.0])


def test_model_utility_is_a_harmonic_mean_of_nine() -> None:
    assert model_utility([1.0] * 8 + [0.5]) == pytest.approx(9 / (8 + 2))
    assert model_utility([1.0] * 8 + [0.0]) == 0
    with pytest.raises(ValueError, match="nine"):
        model_utility([1.0] * 8)
