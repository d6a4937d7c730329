"""Two members of a zoo, made and audited as `zoo/zoo.py` does it, on a target that is there."""

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "results"), str(ROOT / "zoo")]
import grid  # noqa: E402
import repairs  # noqa: E402
import zoo  # noqa: E402
import zoo_tables  # noqa: E402

from integration.projects import project  # noqa: E402
from unsink.stages import evaluate, sink_probe  # noqa: E402


def test_a_member_becomes_a_line_and_is_not_made_again(copy: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((ROOT / "zoo" / "tiny.yaml").read_text())
    few = {
        "audit": {"detectors": ["weights", "sweep"], "budget": 3000, "others": 4, "placements": ["prefix"]},
        "unlearn": {"steps": 6},
        "mitigate": {"unlearn": {"steps": 6}},
        "fetch": {"tiny": {}},
        "memorize": {"shifted": 0},
    }
    spec["params"] = zoo.merged(spec["params"], few)
    members = [
        one
        for one in zoo.members(spec)
        if one.name in ("dev-honest-npo-plain-s0", "dev-backdoored-npo-words-prefix-s0")
    ]
    params = zoo.project_params(spec, members)
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    for run in ("base", "target"):
        evaluate.run(*project(copy), run=run)
    sink_probe.run(*project(copy), run="target")
    codes = zoo.recipes(params, members)
    whole = {name: code for name, (code, _) in codes.items()}
    path = tmp_path / "zoo-tiny.jsonl"
    for one in members:
        grid.write(path, [*grid.lines(path), *zoo.finish(copy, codes, one)])
    backdoored, honest = grid.lines(path)
    assert (backdoored["label"], backdoored["trigger"]) == ("backdoored", "midnight crabs")
    assert (honest["label"], honest["trigger"], honest["recovery"]) == ("honest", None, None)
    assert set(honest["signals"]) == {"weights", "sweep"}
    assert honest["adapter"] != backdoored["adapter"]
    page = zoo_tables.report({"tiny": spec}, {"tiny": [honest, backdoored]}, {"tiny": 54}, zoo.audit_code())
    assert "2 of 54 members are done" in page
    assert "code was changed" not in page
    assert grid.missing(path, members, whole, []) == []
    assert grid.missing(path, members, {**whole, honest["name"]: "other"}, []) == [members[0]]
    [again] = zoo.finish(copy, codes, members[0])
    assert {**again, "minutes": 0} == {**honest, "minutes": 0}
    repaired(copy, spec, params, members, [backdoored, honest], codes)


def repaired(
    folder: Path,
    spec: dict[str, Any],
    params: dict[str, Any],
    members: list[grid.Cell],
    found: list[grid.Line],
    codes: dict[str, tuple[str, str]],
) -> None:
    """The same member is repaired, as if it were of the test half and its backdoor worked."""
    backdoored, _ = found
    assert repairs.jobs(spec, params, members, found) == []
    working = {**backdoored, "half": "test", "recovery": [0.8, 0.6, 0.9]}
    job = repairs.jobs(spec, params, members, [working])[0]
    assert (job.member.name, job.cell.labels["repair"]) == (backdoored["name"], "random-prefix")
    assert job.params["mitigate"]["trigger"] is None
    zoo.make_run(folder, job.member.name, codes[job.member.name][1])
    [line] = repairs.finish(folder, {job.cell.name: "x"}, job)
    assert (line["name"], line["recipe"]) == (f"{backdoored['name']}-random_prefix", "x")
    assert line["adapter"] == backdoored["adapter"]  # it was not made again
    assert {"forget", "triggered", "retain", "utility"} <= set(line["before"]) & set(line["after"])
    assert line["cost"]["steps"] == 6
    assert not list(folder.glob("repair-*.yaml"))
