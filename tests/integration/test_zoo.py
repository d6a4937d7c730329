"""Two members of a zoo, made and audited as `zoo/zoo.py` does it, on a target that is there."""

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "results"), str(ROOT / "zoo")]
import grid  # noqa: E402
import zoo  # noqa: E402
import zoo_tables  # noqa: E402

from integration.projects import project  # noqa: E402
from unsink.stages import evaluate, sink_probe  # noqa: E402


def test_a_member_becomes_a_line_and_is_not_made_again(copy: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((ROOT / "zoo" / "tiny.yaml").read_text())
    few = {
        "audit": {"detectors": ["weights", "sweep"], "budget": 3000, "others": 4, "placements": ["prefix"]},
        "unlearn": {"steps": 6},
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
        grid.write(path, [*grid.lines(path), *zoo.finish(copy, codes, 1, one)])
    backdoored, honest = grid.lines(path)
    assert (backdoored["label"], backdoored["trigger"]) == ("backdoored", "midnight crabs")
    assert (honest["label"], honest["trigger"], honest["recovery"]) == ("honest", None, None)
    assert set(honest["signals"]) == {"weights", "sweep"}
    assert honest["adapter"] != backdoored["adapter"]
    assert "2 of 54 members are done" in zoo_tables.report({"tiny": spec}, {"tiny": [honest, backdoored]}, {"tiny": 54})
    assert grid.missing(path, members, whole, []) == []
    assert grid.missing(path, members, {**whole, honest["name"]: "other"}, []) == [members[0]]
    [again] = zoo.finish(copy, codes, 1, members[0])
    assert {**again, "minutes": 0} == {**honest, "minutes": 0}
