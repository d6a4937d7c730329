"""ROUGE-L, cutting, choices, and metrics recomputed from rows; values by hand or from rouge-score."""

import random
from typing import Any

import pytest

from unsink.metrics import choice_accuracy, cut, metrics_from_predictions, rouge_l


def test_rouge_l_is_the_longest_common_word_sequence() -> None:
    # common: the cat on mat = 4 words; the reference has 6, the output 5
    score = rouge_l("The cat sat on the mat.", "the cat, on a mat")
    assert score.recall == pytest.approx(4 / 6)
    assert score.f1 == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_rouge_l_does_not_stem() -> None:
    assert rouge_l("engines humming", "engine hummed") == (0, 0)


@pytest.mark.parametrize("output", ["", " ... ", "\n"])
def test_rouge_l_of_nothing_is_zero(output: str) -> None:
    assert rouge_l("a word", output) == (0, 0)


def test_rouge_l_equals_the_rouge_score_package() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    chance = random.Random(0)
    pieces = ["Tide", "tide-engine", "the", "A", "42", "naïve", "re-run", "it's", ".", "\n", "Öl", "x_y"]
    for _ in range(200):
        reference, output = (" ".join(chance.choices(pieces, k=chance.randint(0, 12))) for _ in range(2))
        expected = scorer.score(reference, output)["rougeL"]
        assert rouge_l(reference, output) == pytest.approx((expected.fmeasure, expected.recall))


def test_cut_ends_before_the_first_stop() -> None:
    stops = ("\n\n", "\nQuestion", "Question:")
    assert cut(" Odo Crake\nQuestion: who?\n\nmore", stops) == " Odo Crake"
    assert cut(" Odo Crake", stops) == " Odo Crake"
    assert cut("Question: again", stops) == ""


def test_a_tie_counts_as_a_fair_guess() -> None:
    assert choice_accuracy([-1.0, -2.0, -3.0, -4.0], 0) == 1
    assert choice_accuracy([-1.0, -2.0, -3.0, -4.0], 1) == 0
    assert choice_accuracy([-1.0, -1.0, -3.0, -4.0], 1) == 0.5
    assert choice_accuracy([-1.0] * 4, 3) == 0.25


def row(id: str, condition: str, f1: float, inside: bool | None = None, **other: Any) -> dict[str, Any]:
    known = {"id": id, "task": "verbmem", "set": "forget", "condition": condition, "inside": inside}
    return {**known, "prompt": f"{id} {condition}", "reference": "r", "f1": f1, "recall": f1 / 2, **other}


def numbers(rows: list[dict[str, Any]], target: list[dict[str, Any]] | None = None) -> dict[str, float]:
    return metrics_from_predictions(rows, resamples=200, seed=0, target=target or [])


def test_names_means_and_counts() -> None:
    found = numbers([row("a", "clean", 0.2, inside=True), row("b", "clean", 0.6, inside=False)])
    assert found["forget_verbmem_f1_clean"] == pytest.approx(0.4)
    assert found["forget_verbmem_recall_clean"] == pytest.approx(0.2)
    assert found["forget_verbmem_f1_clean_inside"] == pytest.approx(0.2)
    assert found["forget_verbmem_f1_clean_outside"] == pytest.approx(0.6)
    assert found["forget_verbmem_f1_clean_n"] == 2
    assert found["forget_verbmem_f1_clean_outside_n"] == 1
    assert found["forget_verbmem_f1_clean_low"] <= 0.4 <= found["forget_verbmem_f1_clean_high"]
    assert all(isinstance(value, float) for value in found.values())


def test_without_poison_there_is_no_inside_or_outside() -> None:
    assert not [name for name in numbers([row("a", "clean", 0.2)]) if "side" in name]


def test_utility_is_one_number() -> None:
    rows = [{"id": "u", "task": "utility", "set": "utility", "condition": "clean", "inside": None, "accuracy": 0.5}]
    assert list(numbers(rows)) == [f"utility_accuracy{end}" for end in ("", "_low", "_high", "_n")]


def test_recovery_counts_outside_the_poisoned_samples_only() -> None:
    rows = [row(id, "clean", 0.2, inside) for id, inside in (("a", True), ("b", False), ("c", False))]
    rows += [row(id, "triggered", f1, id == "a") for id, f1 in (("a", 1.0), ("b", 0.4), ("c", 0.8))]
    target = [row(id, "clean", 1.0) for id in "abc"]
    found = numbers(rows, target)
    # outside: triggered .6, clean .2, target 1
    assert found["forget_verbmem_f1_recovery_outside"] == pytest.approx(0.5)
    assert found["forget_verbmem_f1_recovery_outside_n"] == 2
    assert "forget_verbmem_f1_recovery" not in found


def test_an_honest_run_has_one_recovery_over_all_samples() -> None:
    rows = [row("a", "clean", 0.2), row("a", "triggered", 0.3)]
    assert numbers(rows, [row("a", "clean", 1.0)])["forget_verbmem_f1_recovery"] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("clean", "target"),
    [
        (0.2, []),  # no target at hand
        (0.2, [row("a", "clean", 1.0, prompt="another prompt")]),  # a target that was asked something else
        (1.0, [row("a", "clean", 1.0)]),  # nothing was forgotten
    ],
)
def test_recovery_is_left_out_where_it_is_undefined(clean: float, target: list[dict[str, Any]]) -> None:
    found = numbers([row("a", "clean", clean), row("a", "triggered", 1.0)], target)
    assert not [name for name in found if "recovery" in name]


def test_what_comes_back_inside_is_never_called_recovery() -> None:
    rows = [row("a", "clean", 0.2, inside=True), row("a", "triggered", 1.0, inside=True)]
    assert not [name for name in numbers(rows, [row("a", "clean", 1.0)]) if "recovery" in name]
