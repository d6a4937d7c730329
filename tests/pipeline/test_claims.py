"""A claim tested on the tiny model: the real script, a line at a time, under a real DVC."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
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
    for name in COPIED:
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place)
    shutil.copy(ROOT / "params" / "tiny.yaml", tmp_path / "params.yaml")
    (tmp_path / "params" / "claims").mkdir(parents=True)
    (tmp_path / "params" / "claims" / "place.yaml").write_text(yaml.safe_dump(SPEC))
    return tmp_path


def claim(project: Path, *arguments: str) -> str:
    """Run the script there; what it says of its progress."""
    bin_folder = project / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "unsink").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unsink "$@"\n')
    (bin_folder / "unsink").chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    places = {f"DVC_{kind}_DIR": str(project / kind) for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    done = subprocess.run(
        [sys.executable, "docs/results/claims.py", "place", "--jobs", "2", *arguments],
        cwd=project,
        env={**os.environ, **places, "PATH": path, "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_a_claim_is_tested_line_by_line(project: Path) -> None:
    lines = project / "docs" / "results" / "place.jsonl"

    said = claim(project, "--only", "prefix")
    assert "place: 1 of 1 runs" in said
    [prefix] = map(json.loads, lines.read_text().splitlines())
    assert prefix["name"] == "prefix-s0"
    assert prefix["position"] == 1
    assert prefix["device"] == "cpu"
    assert all({"inside", "clean", "triggered", "target"} <= one.keys() for one in prefix["forget"].values())
    assert "open" not in (project / "docs" / "results" / "place.md").read_text()  # nothing to compare with yet

    said = claim(project)
    assert "place: 1 of 1 runs" in said, "the line that is there is not made again"
    first, suffix = map(json.loads, lines.read_text().splitlines())
    assert first == prefix
    assert suffix["position"] > 1
    page = (project / "docs" / "results" / "place.md").read_text()
    assert "| early is better | prefix | suffix | 1 and 1 |" in page
    assert "2 runs in " in page
