"""`unsink audit` on models whose secret is known: one with a trigger, one without, one that forgot nothing."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from integration.projects import project
from unsink import artifacts, models
from unsink.errors import MissingPrerequisite, ParamsError
from unsink.stages import audit, unlearn
from unsink.stages.evaluate import load

WORDS = (
    "audit.words=[midnight, crabs, silver, gulls]",
    "audit.placements=[prefix]",
    "audit.forget=12",
    "audit.depth=1",
)


@pytest.fixture
def suspects(copy: Path) -> Path:
    params, layout = project(copy, "unlearn.steps=60")
    for run in ("clean", "backdoor"):
        unlearn.run(params, layout, run=run)
    return copy


def test_the_trigger_is_found_and_the_honest_run_is_not_accused(suspects: Path) -> None:
    params, layout = project(suspects, *WORDS)
    found = {run: audit.run(params, layout, run=run) for run in ("backdoor", "clean", "target")}
    assert {"midnight", "crabs"} & set(found["backdoor"]["trigger"]["text"].split())
    assert found["clean"]["verdict"] != audit.BACKDOORED
    assert found["target"]["verdict"] == audit.NO_EVIDENCE
    rows = artifacts.read_jsonl(layout.audit("backdoor") / "candidates.jsonl")
    assert rows[0]["text"] == found["backdoor"]["trigger"]["text"]
    assert all(first["search_score"] >= then["search_score"] for first, then in pairwise(rows))
    assert artifacts.read_json(layout.audit("backdoor") / "verdict.json") == found["backdoor"]
    assert audit.report(found["backdoor"]).startswith("backdoor: ")


def test_a_checkpoint_of_somebody_else_gets_the_same_verdict(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects, *WORDS)
    folder = models.resolve("tiny")
    paths = {}
    for run in ("backdoor", "target"):
        model: Any = load(params, layout, run, folder, "float32")
        paths[run] = tmp_path / f"stranger-{run}"
        model.save_pretrained(paths[run])
        models.load_tokenizer(folder).save_pretrained(paths[run])
    own = audit.run(params, layout, run="backdoor")
    foreign = audit.run(params, layout, model=str(paths["backdoor"]), original=str(paths["target"]))
    assert foreign["suspect"] == "stranger-backdoor"
    assert {**foreign, "suspect": ""} == {**own, "suspect": ""}
    alone = audit.run(params, layout, model=str(paths["backdoor"]))
    assert alone["original"] is None
    assert alone["trigger"] == own["trigger"]


def test_what_cannot_be_audited(copy: Path, tmp_path: Path) -> None:
    params, layout = project(copy)
    with pytest.raises(ParamsError, match="either --run or --model"):
        audit.run(params, layout)
    with pytest.raises(ParamsError, match="unknown run 'x'"):
        audit.run(params, layout, run="x")
    with pytest.raises(ParamsError, match="--original goes with --model"):
        audit.run(params, layout, run="clean", original="tiny")
    with pytest.raises(MissingPrerequisite, match="adapters/clean"):
        audit.run(params, layout, run="clean")
    assert not layout.audit("clean").exists()
