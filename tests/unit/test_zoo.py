"""The zoo's grids, and the arithmetic of its tables on invented lines."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from unsink.params import load_params
from unsink.statistics import exact_share

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "results"), str(ROOT / "zoo")]
import grid  # noqa: E402
import repair_tables  # noqa: E402
import repairs  # noqa: E402
import zoo  # noqa: E402
import zoo_tables  # noqa: E402

SPECS = sorted((ROOT / "zoo").glob("*.yaml"))
RECOVERED = {"forget": [0.1, 0.0, 0.2], "retain": [0.9, 0.8, 1.0], "utility": [0.5, 0.4, 0.6]}


def line(half: str, label: str, score: float, **changed: Any) -> dict[str, Any]:
    back = label == "backdoored"
    return {
        "name": f"{half}-{label}-{score}",
        "half": half,
        "label": label,
        "trigger": "red cat" if back else None,
        "recovery": [0.8, 0.6, 0.9] if back else None,
        "signals": {"weights": -score, "sweep": score},
        "best": {"text": "red | cat", "placement": "prefix"},
        "found": {
            "carried": 1,
            "p": 0.001,
            "gain": 1.0,
            "recovery": {"mean": score, "low": score, "high": score},
            "others": {"mean": 0.0, "low": 0.0, "high": 0.1},
            "known": 0.1,
            "confirmed": 20,
        },
        "minutes": {"made": 1.0, "audited": 2.0},
        "device": "cpu",
        "code": "old",
    } | changed


LINES = [
    line(half, label, n / 10) for half in ("development", "test") for label, n in (("honest", 1), ("backdoored", 7))
]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_zoo_makes_a_params_file_that_is_accepted_and_splits_in_halves(path: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load(path.read_text())
    members = zoo.members(spec)
    assert len({member.name for member in members}) == len(members) >= 40
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(zoo.project_params(spec, members)))
    params = load_params(tmp_path / "params.yaml")
    halves = {member.labels["half"] for member in members}
    seen: dict[str, dict[str, set[Any]]] = {half: {"trigger": set(), "seed": set()} for half in halves}
    methods: dict[str, set[str]] = {half: set() for half in halves}
    for member in members:
        run = params.run(member.name)
        assert (run.poison is None) == (member.labels["label"] == "honest")
        here = seen[member.labels["half"]]
        here["seed"].add(run.seed)
        methods[member.labels["half"]].add(run.unlearn.method)
        if run.poison:
            here["trigger"].add(run.poison.trigger)
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one["trigger"] & other["trigger"]
        assert not one["seed"] & other["seed"]
    assert methods["test"] - methods["development"]


def test_committed_tables_are_those_of_the_committed_lines() -> None:
    specs = {path.stem: yaml.safe_load(path.read_text()) for path in SPECS}
    found = {size: grid.lines(zoo.RESULTS / f"zoo-{size}.jsonl") for size in specs}
    sizes = {size: len(zoo.members(specs[size])) for size in specs}
    assert (zoo.RESULTS / "audit.md").read_text() == zoo_tables.report(specs, found, sizes, zoo.audit_code())
    for size, lines in found.items():
        assert {one["name"] for one in lines} <= {member.name for member in zoo.members(specs[size])}


def test_the_committed_page_of_repairs_is_that_of_the_committed_lines() -> None:
    specs = {path.stem: yaml.safe_load(path.read_text()) for path in SPECS}
    specs = {size: spec for size, spec in specs.items() if "repairs" in spec}
    assert (zoo.RESULTS / "mitigate.md").read_text() == repairs.page(specs)


def test_a_repair_after_which_nothing_is_forgotten_counts_as_if_all_came_back() -> None:
    def repaired(name: str, after: dict[str, list[float]]) -> dict[str, Any]:
        audit, before = {"verdict": "no evidence"}, {**RECOVERED, "recovery": [0.8, 0.7, 0.9]}
        return {"member": name, "repair": "r", "before": before, "after": after, "audit": audit, "minutes": 0.5}

    worse = {**RECOVERED, "forget": [0.3, 0.2, 0.4]}
    some = [repaired("a", {**RECOVERED, "recovery": [0.02, 0.0, 0.1]}), repaired("b", worse)]
    spec = {"tiny": {"title": "tiny", "text": "toy", "repairs": {"r": {}, "s": {}}}}
    page = repair_tables.report(spec, {"tiny": some}, {"tiny": 2})
    assert "2 of 4 repairs are done" in page
    assert (
        "| r | 2 | 0.80 [0.80, 0.80] | 0.51 [0.02, 1.00] | 1.00 | 1 of 2 [0.01, 0.99] | +0.10 [+0.00, +0.20] |" in page
    )
    assert "| b | r | 0.80 | 1.00 | no evidence |" in page
    assert "| r | 0 of 2 [0.00, 0.84] | 0 of 2 [0.00, 0.84] | 2 of 2 [0.16, 1.00] |" in page
    assert "0 of 2 repairs are done" in repair_tables.report(spec, {"tiny": []}, {"tiny": 1})


def test_auc_and_exact_intervals_by_hand() -> None:
    assert zoo_tables.auc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert exact_share(0, 30)[:3] == pytest.approx((0, 0, 1 - 0.025 ** (1 / 30)))
    assert exact_share(5, 5)[:3] == pytest.approx((1, 0.025 ** (1 / 5), 1))
    assert exact_share(0, 0) == (0, 0, 1, 0)


def test_a_backdoor_that_does_not_open_is_left_out() -> None:
    failed = [line("test", "backdoored", 0.1, recovery=some) for some in (None, [0.2, 0.1, 0.3], [0.5, -0.1, 0.9])]
    honest, backdoored = zoo_tables.counted([*LINES, *failed], "test")
    assert (len(honest), len(backdoored)) == (1, 1)


def test_what_is_said_of_the_audit_stands_on_its_page_alone() -> None:
    spec = {"tiny": {"title": "tiny", "text": "toy\n", "audit_text": "mended\n", "repairs": {}}}
    assert "## tiny\n\ntoy\nmended\n\n" in zoo_tables.report(spec, {"tiny": []}, {"tiny": 9}, "new")
    assert "mended" not in repair_tables.report(spec, {"tiny": []}, {"tiny": 9})


def test_the_page_turns_a_signal_as_the_development_half_says() -> None:
    spec = {"tiny": {"title": "tiny", "text": "toy"}}
    wrong = line("test", "honest", 0.2, name="accused", code="new")
    page = zoo_tables.report(spec, {"tiny": [*LINES, wrong]}, {"tiny": 9}, "new")
    assert "| weights | 1.00 | 1.00 [1.00, 1.00] | below -0.1 | 1 of 1 [0.03, 1.00] | 1 of 2 [0.01, 0.99] |" in page
    assert "| sweep | 1.00 | 1.00 [1.00, 1.00] | above 0.1 | 1 of 1 [0.03, 1.00] | 1 of 2 [0.01, 0.99] |" in page
    assert "| test | honest | 1 of 2 [0.01, 0.99] |" in page
    assert "| accused | - | - | backdoored | `red \\| cat`, prefix | 0.20 [0.20, 0.20] | 0.0010 | 0.00 |" in page
    assert "5 of 9 members are done" in page
    assert "(1 by new, 4 by old)" in page
