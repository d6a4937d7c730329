"""`unsink stress` on a model that knew a corpus and forgot it."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from integration.projects import project
from unsink import artifacts
from unsink.errors import DataError
from unsink.stages import evaluate, stress, unlearn

TESTS = ["int8", "int4", "finetune 2", "relearn 20", "sample 1", "sample 4"]


@pytest.fixture
def done(copy: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, float]]:
    """What the command returns, its rows, and what `evaluate` says of the same run."""
    params, layout = project(copy, f"stress.tests={TESTS}", "evaluate.metrics=[verbmem, utility]")
    unlearn.run(params, layout, run="backdoor")
    evaluate.run(params, layout, run="target")
    evaluate.run(params, layout, run="backdoor")
    found = stress.run(params, layout, run="backdoor")
    rows = artifacts.read_jsonl(layout.stress("backdoor") / "predictions.jsonl")
    assert artifacts.read_json(layout.stress("backdoor") / "metrics.json").keys() == {"none", *TESTS}
    return found, rows, artifacts.read_json(layout.metrics("backdoor"))


def test_each_test_is_done_to_a_model_of_its_own(done: Any) -> None:
    found, rows, plain = done
    assert list(found) == ["run", "none", *TESTS]
    for name in ("forget_verbmem_f1_clean", "forget_verbmem_f1_triggered_outside", "retain_verbmem_f1_clean"):
        assert found["none"][name] == plain[name]
    assert found["int8"]["retain_verbmem_f1_clean"] == pytest.approx(plain["retain_verbmem_f1_clean"], abs=0.05)

    def forget(test: str) -> dict[tuple[str, str], float]:
        some = [row for row in rows if (row["stress"], row["task"], row["set"]) == (test, "verbmem", "forget")]
        return {(row["id"], row["condition"]): row["f1"] for row in some}

    none, relearned = forget("none"), forget("relearn 20")
    assert len({name for name, _ in none}) == 12
    assert len({name for name, _ in relearned}) == 9  # a fifth of twelve, rounded up, is learnt and not asked about
    assert relearned.keys() < none.keys()
    one, four = forget("sample 1"), forget("sample 4")
    assert one.keys() == four.keys() == none.keys()
    assert all(four[key] >= one[key] for key in none)
    assert fmean(four.values()) > fmean(one.values())
    assert {row["task"] for row in rows if row["stress"] == "sample 4"} == {"verbmem"}


def test_a_share_that_leaves_nothing_to_ask_is_an_error(copy: Path) -> None:
    params, layout = project(copy, "stress.tests=[relearn 1]", "stress.share=0.99")
    with pytest.raises(DataError, match=r"trains on 12 of the 12 passages in forget\.jsonl"):
        stress.run(params, layout, run="target")
