"""`unsink show` over several seeds of one run; no model is needed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.cli import app
from unsink.metrics import measure
from unsink.params import load_params
from unsink.stages.show import pooled

SEEDS = (
    "runs.backdoor.seed=0",
    "runs.again={after: target, seed: 1}",
    "runs.other={after: target, seed: 2, poison: {ratio: 0.25}}",
)


def evaluated(layout: Layout, name: str, score: float) -> None:
    """A run that says the same of all its passages."""
    row = {"task": "verbmem", "set": "forget", "condition": "clean", "inside": None, "prompt": "p", "reference": "r"}
    rows = [{**row, "id": f"p{i}", "f1": score, "recall": score} for i in range(5)]
    artifacts.write_jsonl(layout.predictions(name), rows)
    artifacts.write_json(layout.metrics(name), measure(rows, resamples=100, seed=0).numbers)


def test_runs_that_differ_in_their_seed_alone_are_pooled(params_file: Path) -> None:
    layout = Layout.of(params_file)
    for name, score in (("backdoor", 0.0), ("again", 1.0), ("other", 0.7)):
        evaluated(layout, name, score)
    found = pooled(load_params(params_file, SEEDS), layout)
    # within a seed nothing varies, so all of the interval is between them: 0 and 0, 0 and 1, 1 and 1
    assert found == {"backdoor (2 seeds)": {"clean": {"mean": 0.5, "low": 0.0, "high": 1.0}}}


def test_a_run_waits_for_its_other_seeds(params_file: Path) -> None:
    layout = Layout.of(params_file)
    evaluated(layout, "backdoor", 0.5)
    assert pooled(load_params(params_file, SEEDS), layout) == {}


@pytest.mark.parametrize("seeds", [True, False])
def test_the_table_has_a_row_for_all_seeds_together(params_file: Path, seeds: bool) -> None:
    if seeds:
        with params_file.open("a") as file:
            file.write("  again:\n    after: target\n    seed: 1\n")
    for name in ("backdoor", "again"):
        evaluated(Layout.of(params_file), name, 0.5)
    result = CliRunner().invoke(app, ["show", "--params", str(params_file)])
    assert result.exit_code == 0
    assert ("backdoor (2 seeds)" in result.stdout) == seeds
