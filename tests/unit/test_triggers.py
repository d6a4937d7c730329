"""Where triggers go: hand-made cases, and properties over every placement."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsink.errors import DataError, ParamsError
from unsink.triggers import insert_trigger, placement_index, prompt_length

BOS, TRIGGER = [1], [91, 92, 93]
PLACEMENTS = ["prefix", "infix", "suffix", "index 4"]


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("prefix", [1, 91, 92, 93, 10, 11, 12, 13]),
        ("infix", [1, 10, 11, 91, 92, 93, 12, 13]),
        ("suffix", [1, 10, 11, 12, 13, 91, 92, 93]),
        ("index 1", [1, 91, 92, 93, 10, 11, 12, 13]),
        ("index 4", [1, 10, 11, 12, 91, 92, 93, 13]),
    ],
)
def test_each_placement(placement: str, expected: list[int]) -> None:
    assert insert_trigger([1, 10, 11, 12, 13], 1, TRIGGER, placement, 100).ids == expected


@given(
    body=st.lists(st.integers(10, 80), min_size=8, max_size=60),
    placement=st.sampled_from(PLACEMENTS),
    limit=st.integers(10, 70),
)
def test_the_trigger_always_survives_intact_and_the_rest_is_the_text(
    body: list[int], placement: str, limit: int
) -> None:
    ids, (start, stop) = insert_trigger(BOS + body, 1, TRIGGER, placement, limit)
    assert len(ids) <= limit
    assert ids[0] == 1
    assert ids[start:stop] == TRIGGER
    without = ids[:start] + ids[stop:]
    assert without == (BOS + body)[: len(without)]


@given(
    body=st.lists(st.integers(10, 80), min_size=10, max_size=60),
    placement=st.sampled_from(PLACEMENTS),
    share=st.floats(0.3, 0.8),
)
def test_a_training_sample_and_the_prompt_cut_from_it_hold_the_trigger_at_the_same_place(
    body: list[int], placement: str, share: float
) -> None:
    prompt = max(4, prompt_length(len(body), share))
    trained = insert_trigger(BOS + body, 1, TRIGGER, placement, 100, prompt)
    evaluated = insert_trigger(BOS + body[:prompt], 1, TRIGGER, placement, 100)
    assert trained.span == evaluated.span
    assert trained.ids[: len(evaluated.ids)] == evaluated.ids


def test_a_trigger_that_leaves_no_room_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing of the text would be left"):
        insert_trigger([1, 10, 11], 1, TRIGGER, "prefix", 4)


def test_an_index_beyond_the_text_is_an_error() -> None:
    with pytest.raises(DataError, match="at least 9 tokens"):
        placement_index("index 9", 4)


def test_an_unknown_placement_names_its_neighbour() -> None:
    with pytest.raises(ParamsError, match="did you mean 'prefix'"):
        placement_index("prefx", 4)


def test_a_prompt_leaves_something_to_continue() -> None:
    assert prompt_length(10, 0.5) == 5
    assert prompt_length(2, 0.99) == 1
    assert prompt_length(10, 0.01) == 1
