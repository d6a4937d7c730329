"""What a project folder is made of, for those who installed the package and have no clone of its repository.

In the repository DVC watches each source file that a stage imports. An installed package lies outside of every project,
in another place on each computer. So there `code.json` holds one hash per stage, of the same files, and each stage
depends on its own: after an upgrade `dvc repro` reruns the stages whose code has changed, and no other.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from unsink import artifacts
from unsink.benchmarks import bundled
from unsink.errors import ParamsError
from unsink.registry import unknown

CODE = "code.json"
PIPELINE = "dvc.yaml"
PARAMS = "params.yaml"
GATES = "gates.yaml"
SETTINGS = (".dvc/config", ".dvc/plots/offline.html", ".dvc/.gitignore", ".dvcignore", ".gitignore")
"""Taken over as they are."""
DEFAULT = "default"

_PACKAGE = Path(__file__).parent
_IN_PACKAGE = _PACKAGE / "template"  # put there when the wheel is built
_REPOSITORY = _PACKAGE.parents[1]
_SOURCE = "src/unsink"
_CORPUS = "data/bundled"


def templates() -> dict[str, Path]:
    """Name -> params file; `default` is the one of the repository's own project."""
    root = _root()
    return {DEFAULT: root / PARAMS} | {path.stem: path for path in sorted((root / "params").glob("*.yaml"))}


def files(template: str) -> dict[str, str]:
    """Name in the project folder -> text, of a whole project.

    Raises:
        ParamsError: no such template.
    """
    known = templates()
    if template not in known:
        raise ParamsError(unknown("template", template, known))
    copied = {name: _root() / name for name in SETTINGS} | {PARAMS: known[template]} | _gates(template)
    return {name: path.read_text(encoding="utf-8") for name, path in copied.items()} | {PIPELINE: _pipeline_text()}


def _gates(template: str) -> dict[str, Path]:
    """The bounds that were measured with these params; other templates have none yet."""
    path = _root() / (GATES if template == DEFAULT else f"params/gates/{template}.yaml")
    return {GATES: path} if path.is_file() else {}


def code() -> dict[str, str]:
    """Stage -> SHA-256 over the names and bytes of the package's files that its results depend on."""
    return {name: _digest([dep for dep in _body(stage).get("deps", []) if _is_code(dep)]) for name, stage in _stages()}


def _pipeline_text() -> str:
    comment = (
        "# The pipeline: `dvc repro` runs what changed. `unsink init` made this file; change params.yaml instead.\n"
    )
    outs = [{CODE: {"cache": False}}]
    pipeline = _repository_pipeline()
    pipeline["stages"] = {
        "code": {"cmd": "unsink code", "always_changed": True, "outs": outs},
        **{name: _installed(name, stage) for name, stage in _stages()},
    }
    return comment + yaml.safe_dump(pipeline, sort_keys=False, width=120)


def _installed(name: str, stage: dict[str, Any]) -> dict[str, Any]:
    """The stage with the hash of its code in the place of source files."""
    body = dict(_body(stage))
    deps = [dep for dep in body.pop("deps", []) if not _is_code(dep)]
    body = {"cmd": body.pop("cmd")} | ({"deps": deps} if deps else {}) | body
    body["params"] = [*body.get("params", []), {CODE: [name]}]
    return {**stage, "do": body} if "do" in stage else body


def _stages() -> list[tuple[str, dict[str, Any]]]:
    return list(_repository_pipeline()["stages"].items())


def _repository_pipeline() -> dict[str, Any]:
    pipeline: dict[str, Any] = yaml.safe_load((_root() / PIPELINE).read_text(encoding="utf-8"))
    return pipeline


def _body(stage: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = stage.get("do", stage)
    return body


def _is_code(dep: str) -> bool:
    return dep.startswith((f"{_SOURCE}/", _CORPUS))


def _digest(deps: list[str]) -> str:
    lines = [
        f"{dep}/{path.relative_to(place).as_posix()} {artifacts.sha256(path)}\n"
        for dep in sorted(deps)
        for place in [_place(dep)]
        for path in ([place] if place.is_file() else sorted(place.rglob("*")))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _place(dep: str) -> Path:
    """Where a file of the repository lies in the installed package."""
    return bundled.installed() if dep == _CORPUS else _PACKAGE / Path(dep).relative_to(_SOURCE)


def _root() -> Path:
    return _IN_PACKAGE if _IN_PACKAGE.is_dir() else _REPOSITORY
