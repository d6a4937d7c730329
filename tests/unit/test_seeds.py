"""Means over seeds: items that all seeds share are drawn once for all of them."""

import sys
from pathlib import Path

import numpy as np
import pytest

from unsink import artifacts
from unsink.seeds import Items, over_seeds
from unsink.statistics import Interval, Sample, bootstrap_mean, column_mean, sample

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "results"))
import seeds as seeds_page  # noqa: E402

SCORES = np.random.default_rng(0).random(50).tolist()
IDS = [f"p{place}" for place in range(50)]


def items(scores: list[float], first: int = 0) -> Items:
    return Items(sample(scores), [f"p{first + place}" for place in range(len(scores))])


def mean(seeds: list[list[Items]]) -> Interval:
    return over_seeds(seeds, column_mean, resamples=2000, seed=0)


def width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize("number", [1, 2, 3, 10])
def test_the_same_answers_under_several_seeds_say_no_more_than_under_one(number: int) -> None:
    one, several = bootstrap_mean(SCORES, resamples=2000, seed=0), mean([[items(SCORES)]] * number)
    assert several.mean == pytest.approx(one.mean)
    assert width(several) == pytest.approx(width(one), rel=0.08)
    assert several.n == number


def test_where_items_agree_all_of_the_interval_is_between_seeds() -> None:
    assert mean([[items([0.0] * 50)], [items([1.0] * 50)]]) == (0.5, 0.0, 1.0, 2)


def test_answers_that_have_nothing_in_common_are_averaged_over_seeds() -> None:
    # the width of the mean of 500 numbers, whose variance counts up to three times
    numbers = np.random.default_rng(1).random((10, 50))
    one = width(bootstrap_mean(numbers.ravel().tolist(), resamples=2000, seed=0))
    assert one < width(mean([[items(scores)] for scores in numbers.tolist()])) < 1.1 * 3**0.5 * one


def test_what_is_compared_within_a_seed_is_paired() -> None:
    def gap(ours: Sample, theirs: Sample) -> float:
        return column_mean(ours) - column_mean(theirs)

    shifted = [score + 0.1 for score in SCORES]
    paired = [[items(shifted), items(SCORES)]] * 3
    unpaired = [[items(shifted), items(SCORES, first=100)]] * 3
    assert over_seeds(paired, gap, resamples=500, seed=0)[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert width(over_seeds(unpaired, gap, resamples=500, seed=0)) > 0.15


def test_seeds_may_have_other_items_and_those_in_common_count_for_both() -> None:
    # p0 and p1 of one seed, p1 and p2 of the other; by hand: (0 + 1) / 2 and (1 + 0) / 2
    seeds = [[items([0.0, 1.0])], [items([1.0, 0.0], first=1)]]
    found = mean(seeds)
    assert found == (0.5, 0.0, 1.0, 2)
    # p0 and p2 alone: a seed whose only item is not drawn gives no number, and no resample mixes them with others
    assert mean([[items([0.25])], [items([0.75], first=2)]]) == (0.5, 0.25, 0.75, 2)


def test_the_same_draws_whatever_the_order_of_rows() -> None:
    turned = Items(sample(SCORES[::-1]), IDS[::-1])
    ordered, mixed = mean([[items(SCORES)], [items(SCORES)]]), mean([[items(SCORES)], [turned]])
    assert mixed == pytest.approx(ordered)


@pytest.mark.parametrize("seeds", [[], [[]], [[items([])]], [[items(SCORES)], [items([])]]])
def test_nothing_to_resample_is_an_error(seeds: list[list[Items]]) -> None:
    with pytest.raises(ValueError, match="no values"):
        mean(seeds)


def test_the_page_of_seeds_draws_prompts_by_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"task": "utility", "set": "utility", "condition": "clean", "inside": None}
    rows = [{**row, "id": name, "accuracy": score} for name, score in zip(IDS, SCORES)]
    folders = {seed: tmp_path / str(seed) for seed in (0, 1, 2)}
    for folder in folders.values():
        artifacts.write_jsonl(folder / "predictions" / "base.jsonl", rows)
    monkeypatch.setattr(seeds_page, "TABLE", [("base: utility", "base", seeds_page.UTILITY, "accuracy")])
    monkeypatch.setattr(seeds_page, "RESAMPLES", 2000)
    *_, line = seeds_page.table(folders).splitlines()
    name, centre, ends, count, *each = (cell.strip() for cell in line.strip("|").split("|"))
    one = bootstrap_mean(SCORES, resamples=2000, seed=0)
    assert (name, count, each) == ("base: utility", "50", [f"{one.mean:.3f}"] * 3)
    low, high = map(float, ends.split(" to "))
    assert float(centre) == pytest.approx(one.mean, abs=0.001)
    assert high - low == pytest.approx(width(one), rel=0.08)
