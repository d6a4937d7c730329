"""What few samples can tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsink.certainty import FEW, alike, lacking, needed, unseen, widened
from unsink.statistics import Interval, exact_share

counts = st.integers(FEW, 500)


def point(mean: float, n: int) -> Interval:
    return Interval(mean, mean, mean, n)


@pytest.mark.parametrize("n", [8, 12, 100])
def test_all_or_none_have_the_exact_interval(n: int) -> None:
    assert widened(point(1.0, n)) == pytest.approx(exact_share(n, n))
    assert widened(point(0.0, n)) == pytest.approx(exact_share(0, n))


def test_twelve_of_twelve_by_hand() -> None:
    assert unseen(12) == pytest.approx(0.2646, abs=1e-4)  # .025 ^ (1/12) is .7354
    assert widened(point(0.5, 12)) == pytest.approx((0.5, 0.3677, 0.6323, 12), abs=1e-4)


def test_what_has_width_or_is_few_stays_as_it_is() -> None:
    for value in (Interval(0.5, 0.4, 0.6, 12), point(0.5, 7), point(0.0, 0)):
        assert widened(value) == value
        assert not alike(value)


def test_a_number_outside_of_a_score_keeps_its_place() -> None:
    assert widened(point(-0.1, 12)).low == -0.1
    assert widened(point(3.0, 12)).high == 3.0


@given(mean=st.floats(0, 1), n=counts)
def test_more_samples_leave_less_open(mean: float, n: int) -> None:
    one, more = widened(point(mean, n)), widened(point(mean, n + 1))
    assert 0 <= one.low <= more.low <= mean <= more.high <= one.high <= 1


@given(mean=st.floats(0, 1), limit=st.floats(0.01, 0.99))
def test_the_number_that_is_needed_is_enough_and_one_less_is_not(mean: float, limit: float) -> None:
    n = needed(mean, limit)
    if n is None or n > 10**6:  # as close as rounding
        return

    def decides(count: int) -> bool:
        value = widened(point(mean, count))
        return value.high <= limit + 1e-9 or value.low >= limit - 1e-9

    assert decides(n)
    assert n == FEW or not decides(n - 1) or abs(mean - limit) < 1e-6


def test_what_is_lacking_is_said() -> None:
    assert lacking(point(1.0, 3), 0.9) == "too few samples: 3, where at least 8 are needed"
    assert lacking(point(1.0, 12), 0.99) == "all 12 samples are alike, others need not be; 368 alike would decide it"
    assert lacking(point(1.0, 12), 1.0).endswith("no number of them decides it")
    assert lacking(Interval(0.5, 0.4, 0.6, 12), 0.45) == ""
