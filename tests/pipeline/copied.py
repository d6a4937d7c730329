"""Parts of the project in a folder of their own, and the environment in which a user's commands run there."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy(names: Iterable[str], folder: Path) -> None:
    """Copy these files and folders there, with the tiny parameters."""
    for name in names:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    shutil.copy(ROOT / "params" / "tiny.yaml", folder / "params.yaml")


def environment(folder: Path) -> dict[str, str]:
    """Variables with which `unsink` is this code, and nothing of DVC is shared; what they need is put into a folder."""
    command = folder / "bin" / "unsink"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unsink "$@"\n')
    command.chmod(0o755)
    places = {f"DVC_{kind}_DIR": str(folder / kind) for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    return {**os.environ, **places, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
