"""Which tokens something acts on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsink.positions import RULE, drawn, first, named


def test_first_includes_bos_and_ends_with_the_sequence() -> None:
    assert first(10, 3) == [0, 1, 2]
    assert first(2, 3) == [0, 1]


@given(length=st.integers(1, 60), k=st.integers(1, 12), seed=st.text(max_size=3), avoid=st.sets(st.integers(0, 60)))
def test_drawn_positions_are_as_many_as_there_can_be_and_never_the_first(
    length: int, k: int, seed: str, avoid: set[int]
) -> None:
    found = drawn(length, k, seed, avoid)
    left = set(range(k, length)) - avoid
    assert len(set(found)) == len(found) == min(k, len(left))
    assert set(found) <= left
    assert found == sorted(found) == drawn(length, k, seed, avoid)


def test_another_seed_draws_other_positions() -> None:
    assert len({tuple(drawn(50, 8, str(seed))) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("bos", [0]),
        ("trigger", [2, 3, 4]),
        ("first 3", [0, 1, 2]),
        ("after-trigger 2", [5, 6]),
        ("after-trigger 90", [5, 6, 7, 8, 9]),
        ("sinks", [0, 6]),
        ("index 0", [0]),
        ("index 9", [9]),
        ("index 10", []),
    ],
)
def test_each_rule(rule: str, expected: list[int]) -> None:
    assert named(rule, 10, (2, 5), [6, 0, 30], "seed") == expected


def test_a_prompt_without_a_trigger_has_none_of_its_tokens() -> None:
    assert named("trigger", 10, None, [], "seed") == named("after-trigger 3", 10, None, [], "seed") == []


def test_random_tokens_are_no_sinks_and_no_trigger() -> None:
    assert named("random 9", 10, (4, 6), [8], "seed") == [9]
    assert named("random 2", 10, (4, 6), [8], "seed") == named("random 2", 10, (4, 6), [8], "seed")
    assert set(named("random 9", 40, (4, 6), [20], "seed")) <= set(range(9, 40)) - {20}


@pytest.mark.parametrize(
    "rule", ["first", "first 0", "first -1", "last 3", "trigger 3", "bos bos", "", "index", "index -1", "index 07"]
)
def test_no_rule(rule: str) -> None:
    assert not RULE.fullmatch(rule)
