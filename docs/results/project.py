"""A copy of the project that runs with other parameters: what `seeds.py` and `claims.py` share."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def make(folder: Path, params: Mapping[str, Any]) -> None:
    """Make a project that runs the code as it is now; where there is one already, its code and results stay.

    All copies share the DVC cache of the project they come from: what one of them has trained, the others need not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "src", "data/bundled"):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
    text = yaml.safe_dump(dict(params), sort_keys=False)
    if not (folder / "params.yaml").exists() or (folder / "params.yaml").read_text() != text:
        (folder / "params.yaml").write_text(text)
    if not (folder / ".dvc").exists():
        subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
        subprocess.run(["dvc", "cache", "dir", "--quiet", str(ROOT / ".dvc" / "cache")], cwd=folder, check=True)


def repro(folder: Path, targets: Sequence[str] = (), threads: int | None = None) -> int:
    """Run `dvc repro` there, with the code that was copied; return its exit code.

    It waits while another call holds DVC's lock, as when that puts an adapter into the cache: by itself DVC gives up
    after seconds.
    """
    return _run(["dvc", "--wait-for-lock", "repro", *targets], folder, threads)


def unsink(folder: Path, arguments: Sequence[str], threads: int | None = None) -> int:
    """Run one command of `unsink` there, with the code that was copied; return its exit code."""
    return _run(["unsink", *arguments], folder, threads)


def _run(command: Sequence[str], folder: Path, threads: int | None) -> int:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
