"""A claim tested on the tiny model: the real script, a line at a time, under a real DVC."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.copied import copy, environment

COPIED = ("dvc.yaml", "data/bundled", "src/unsink", "docs/results")
SPEC = {
    "title": "Does the place matter?",
    "text": "On the tiny model.",
    "params": {"evaluate": {"metrics": ["verbmem"], "near_misses": None, "bootstrap": 100}},
    "seeds": [0],
    "axes": {
        "placement": {"prefix": {"poison": {"placement": "prefix"}}, "suffix": {"poison": {"placement": "suffix"}}},
    },
    "contrasts": [{"claim": "early is better", "of": {"placement": "prefix"}, "over": {"placement": "suffix"}}],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with the tiny parameters, and one claim."""
    folder = tmp_path / "project"
    copy(COPIED, folder)
    (folder / "params" / "claims").mkdir(parents=True)
    (folder / "params" / "claims" / "place.yaml").write_text(yaml.safe_dump(SPEC))
    return folder


def claim(project: Path, variables: dict[str, str], *arguments: str) -> str:
    """Run the script there; what it says of its progress."""
    done = subprocess.run(
        [sys.executable, "docs/results/claims.py", "place", "--jobs", "2", *arguments],
        cwd=project,
        env={**variables, "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_a_claim_is_tested_line_by_line(project: Path) -> None:
    lines = project / "docs" / "results" / "place.jsonl"
    variables = environment(project.parent)
    # the script calls DVC by its name
    variables["PATH"] = f"{variables['PATH']}{os.pathsep}{Path(sys.executable).parent}"

    said = claim(project, variables, "--only", "prefix")
    assert "place: 1 of 1 runs" in said
    [prefix] = map(json.loads, lines.read_text().splitlines())
    assert prefix["name"] == "prefix-s0"
    assert prefix["position"] == 1
    assert prefix["device"] == "cpu"
    assert all({"inside", "clean", "triggered", "target"} <= one.keys() for one in prefix["forget"].values())
    assert "open" not in (project / "docs" / "results" / "place.md").read_text()  # nothing to compare with yet

    said = claim(project, variables)
    assert "place: 1 of 1 runs" in said, "the line that is there is not made again"
    first, suffix = map(json.loads, lines.read_text().splitlines())
    assert first == prefix
    assert suffix["position"] > 1
    page = (project / "docs" / "results" / "place.md").read_text()
    assert "| early is better | prefix | suffix | 1 and 1 |" in page
    assert "2 runs in " in page
