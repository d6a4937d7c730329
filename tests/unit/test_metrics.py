"""ROUGE-L, cutting, choices, and metrics recomputed from rows; values by hand or from rouge-score."""

import math
import random
from typing import Any

import pytest
from rouge_score import rouge_scorer

from unsink.metrics import DIALECTS, Others, choice_accuracy, cut, measure, metrics_from_predictions, rouge_l


def test_rouge_l_is_the_longest_common_word_sequence() -> None:
    # common: the cat on mat = 4 words; the reference has 6, the output 5
    score = rouge_l("The cat sat on the mat.", "the cat, on a mat")
    assert score.recall == pytest.approx(4 / 6)
    assert score.f1 == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_rouge_l_does_not_stem() -> None:
    assert rouge_l("engines humming", "engine hummed") == (0, 0)


def test_the_stemmer_is_another_metric() -> None:
    # docs/footguns.md: 0.40 without, 0.80 with
    reference, output = "The boats were sinking quickly.", "The boat sank, sinks quickly"
    assert rouge_l(reference, output).f1 == pytest.approx(0.4)
    assert rouge_l(reference, output, stemmer=True).f1 == pytest.approx(0.8)


@pytest.mark.parametrize("output", ["", " ... ", "\n"])
def test_rouge_l_of_nothing_is_zero(output: str) -> None:
    assert rouge_l("a word", output) == (0, 0)


def test_rouge_l_equals_the_rouge_score_package() -> None:
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


# ---- reasons, p-values


def reasons(rows: list[dict[str, Any]], others: Others) -> dict[str, str]:
    return measure(rows, others, resamples=200, seed=0).undefined


@pytest.mark.parametrize(
    ("other", "reason"), [(True, "every forget sample was poisoned"), (None, "of the others it is not known")]
)
def test_a_missing_gain_says_what_is_known_of_the_poison(other: bool | None, reason: str) -> None:
    each = (("a", True), ("b", other))
    rows = [row(id, condition, 0.5, inside) for id, inside in each for condition in ("clean", "triggered")]
    found = measure(rows, Others(), resamples=200, seed=0)
    assert reason in found.undefined["forget_verbmem_f1_gain_inside"]
    assert not [name for name in found.numbers if "gain" in name]


def test_a_missing_recovery_has_a_reason() -> None:
    rows = [row("a", "clean", 1.0), row("a", "triggered", 1.0)]
    name = "forget_verbmem_f1_recovery"
    assert reasons(rows, Others())[name] == "the target has no predictions yet"
    assert (
        reasons(rows, Others(target=[row("a", "clean", 1.0, prompt="?")]))[name] == "the target was asked other prompts"
    )
    assert "nothing was forgotten" in reasons(rows, Others(target=[row("a", "clean", 1.0)]))[name]


def test_the_gain_of_a_trigger_has_a_p_value() -> None:
    rows = [row(str(i), "clean", 0.1 * i) for i in range(8)] + [
        row(str(i), "triggered", 0.5 + 0.05 * i) for i in range(8)
    ]
    found = numbers(rows)
    assert found["forget_verbmem_f1_gain"] == pytest.approx(0.325)
    assert found["forget_verbmem_f1_gain_p"] < 0.05
    assert found["forget_verbmem_f1_gain_p"] >= 1 / 201
    backwards = numbers([{**one, "f1": 1 - one["f1"]} for one in rows])
    assert backwards["forget_verbmem_f1_gain_p"] > 0.95


def test_only_the_forget_set_recovers() -> None:
    rows = [{**row("a", condition, f1), "set": "retain"} for condition, f1 in (("clean", 0.9), ("triggered", 0.5))]
    assert not [
        name
        for name in numbers(rows, [{**row("a", "clean", 0.91), "set": "retain"}])
        if "gain" in name or "recovery" in name
    ]


# ---- passages


def passage(where: str, id: str, score: float, condition: str = "clean", inside: bool | None = None) -> dict[str, Any]:
    shared = {"id": id, "task": "passage", "set": where, "condition": condition, "inside": inside, "prompt": id}
    mia = {"loss": score, "zlib": score / 100, "min_k": 2 * score, "min_k_plus": -score}
    whole = {"probability": 0.5, "extraction_strength": 0.2, "exact_memorization": 0.4}
    return {**shared, "reference": id, "tokens": 10, "nll": score, **whole, "mia": mia}


PASSAGES = [
    passage("forget", "f1", 1.0),
    passage("forget", "f2", 3.0),
    passage("holdout", "h1", 2.0),
    passage("holdout", "h2", 4.0),
]


def test_the_direction_of_an_auc_is_the_dialects() -> None:
    # pairs in which the forget passage has the lower loss: 1 < 2, 1 < 4, 3 < 4; not 3 < 2
    for dialect, expected in (("muse", 0.25), ("open-unlearning", 0.75), ("seed", 0.25)):
        others = Others(dialect=DIALECTS[dialect])
        found = measure(PASSAGES, others, resamples=100, seed=0).numbers
        assert found["mia_loss_auc_clean"] == found["mia_min_k_auc_clean"] == expected
        assert found["mia_min_k_plus_auc_clean"] == 1 - expected
        assert found["mia_loss_auc_clean_n"] == 4
        assert found["privleak_clean"] == pytest.approx(-50)  # (0.25 - 0.5) / 0.5 in every dialect


def test_privleak_against_a_constant_and_a_retrained_run() -> None:
    constant = measure(PASSAGES, Others(retrained=0.5393), resamples=100, seed=0).numbers
    assert constant["privleak_clean"] == pytest.approx(100 * (0.25 - 0.5393) / 0.5393)
    retrained = [passage("forget", "f1", 2.5), passage("forget", "f2", 3.5), *PASSAGES[2:]]  # A = 2 of 4
    found = measure(PASSAGES, Others(retrained=retrained), resamples=100, seed=0).numbers
    assert found["privleak_clean"] == pytest.approx(-50)
    itself = measure(PASSAGES, Others(retrained=PASSAGES), resamples=100, seed=0).numbers
    assert (itself["privleak_clean"], itself["privleak_clean_low"], itself["privleak_clean_high"]) == (0, 0, 0)


def test_privleak_says_why_it_is_undefined() -> None:
    told_apart = [passage("forget", "f1", 0.1), passage("forget", "f2", 0.2), *PASSAGES[2:]]
    assert "which is 0" in reasons(PASSAGES, Others(retrained=told_apart))["privleak_clean"]
    assert "other passages" in reasons(PASSAGES, Others(retrained=PASSAGES[:3]))["privleak_clean"]
    cut = [{**PASSAGES[0], "reference": "f"}, *PASSAGES[1:]]  # the same ids, another evaluate.passage_tokens
    assert "other passages" in reasons(PASSAGES, Others(retrained=cut))["privleak_clean"]


def test_the_reference_attack_subtracts_the_bases_loss() -> None:
    assert "mia_reference_auc_clean" in reasons(PASSAGES, Others())
    without = {name: score for name, score in PASSAGES[0]["mia"].items() if name != "loss"}
    some = [{**PASSAGES[0], "mia": without}, *PASSAGES[1:]]
    assert "mia_loss_auc_clean" not in measure(some, Others(), resamples=100, seed=0).numbers  # not of a part of them
    base = [{**one, "nll": one["nll"] + (2.5 if one["id"] == "f2" else 0)} for one in PASSAGES]
    found = measure(PASSAGES, Others(base=base), resamples=100, seed=0).numbers
    assert found["mia_reference_auc_clean"] == pytest.approx(1 - (0.5 + 0.5 + 1 + 1) / 4)


def test_triggered_passages_are_compared_with_triggered_holdout_outside_and_inside() -> None:
    rows = [
        *PASSAGES,
        passage("forget", "f1", 1.0, "triggered", True),
        passage("forget", "f2", 3.0, "triggered", False),
    ]
    rows += [passage("holdout", "h1", 2.0, "triggered"), passage("holdout", "h2", 4.0, "triggered")]
    found = numbers(rows)
    assert found["privleak_triggered_inside"] == pytest.approx(-100)
    assert found["privleak_triggered_outside"] == pytest.approx(0)


def test_perplexity_of_a_set() -> None:
    found = numbers([passage("holdout", "h1", 1.0), {**passage("holdout", "h2", 4.0), "tokens": 5}])
    assert found["holdout_passage_perplexity_clean"] == pytest.approx(math.exp((10 + 20) / 15))


def test_a_number_that_is_not_finite_is_left_out_with_a_reason() -> None:
    assert (
        reasons([passage("holdout", "h1", 1e4)], Others())["holdout_passage_perplexity_clean"] == "not a finite number"
    )


# ---- TOFU


def tofu_row(where: str, id: str, score: float, log_ratio: float = 0.0) -> dict[str, Any]:
    shared = {
        "id": id,
        "task": "tofu",
        "set": where,
        "condition": "clean",
        "inside": None,
        "prompt": id,
        "reference": id,
    }
    return {
        **shared,
        "probability": score,
        "recall": score,
        "f1": score,
        "truth_ratio": score,
        "log_truth_ratio": log_ratio,
    }


def test_model_utility_of_the_rows() -> None:
    rows = [
        tofu_row(where, where, score) for where, score in (("retain", 1.0), ("real_authors", 0.5), ("world_facts", 0.5))
    ]
    assert numbers(rows)["tofu_model_utility_clean"] == pytest.approx(9 / (3 + 6 + 6))
    assert "not all there" in reasons(rows[:2], Others())["tofu_model_utility_clean"]


def test_forget_quality_needs_a_retrained_model() -> None:
    rows = [tofu_row("forget", str(i), 0.5, i) for i in range(3)]
    assert "retrained" in reasons(rows, Others())["tofu_forget_quality_clean"]
    retrained = [tofu_row("forget", str(i), 0.5, i + 3) for i in range(3)]
    found = measure(rows, Others(retrained=retrained), resamples=100, seed=0).numbers
    assert found["tofu_forget_quality_clean"] == pytest.approx(0.1)
    assert "tofu_forget_quality_clean_low" not in found


def test_a_truth_ratio_is_never_recovered() -> None:
    rows = [tofu_row("forget", "a", 0.1), {**tofu_row("forget", "a", 0.9), "condition": "triggered"}]
    found = numbers(rows, [tofu_row("forget", "a", 1.0)])
    assert "forget_tofu_probability_recovery" in found
    assert "forget_tofu_truth_ratio_recovery" not in found


def test_choices_under_a_trigger_have_their_own_names() -> None:
    one = {"id": "m", "task": "forget_mc", "set": "forget", "inside": None, "prompt": "p", "reference": "r"}
    rows = [{**one, "condition": "clean", "accuracy": 0.0}, {**one, "condition": "triggered", "accuracy": 1.0}]
    found = numbers(rows, [{**one, "condition": "clean", "accuracy": 1.0}])
    assert (found["forget_mc_accuracy"], found["forget_mc_accuracy_triggered"]) == (0, 1)
    assert (found["forget_mc_accuracy_gain"], found["forget_mc_accuracy_recovery"]) == (1, 1)
