"""Where the numbers of the page come from: commands, parameters, seeds, hashes, versions."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import yaml

from unsink.artifacts import PRODUCERS
from unsink.params import Params
from unsink.report.project import Project

_PACKAGES = ("unsink", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "scipy", "dvc")
_MISSING = {
    "the target": "unsink evaluate --run target",
    "the base": "unsink evaluate --run base",
    "attention sinks": "unsink sink-probe --run NAME",
    "training curves": "unsink unlearn --run NAME",
    "an audit": "unsink audit --run NAME",
    "ablations": "unsink ablate --run NAME",
    "stress tests": "unsink stress --run NAME",
}


class File(NamedTuple):
    """A file that was read."""

    path: str
    sha256: str
    command: str


class Provenance(NamedTuple):
    """What the last section of the page says.

    Attributes:
        params: all parameters, defaults included, as YAML.
        seeds: model -> seed.
        files: read.
        versions: package -> version, where the page was made.
        missing: part that is not on the page -> command that would add it.
    """

    params: str
    seeds: Mapping[str, int]
    files: Sequence[File]
    versions: Mapping[str, str]
    missing: Mapping[str, str]


def provenance(project: Project, params: Params) -> Provenance:
    """Everything that is needed to make the numbers again.

    Args:
        project: what was read.
        params: of the project, resolved.
    """
    dump: dict[str, Any] = Params.model_dump(params, mode="json", by_alias=True)
    return Provenance(
        params=yaml.safe_dump(dump, sort_keys=False, allow_unicode=True),
        seeds={
            model.name: seed
            for model in project.models
            if (seed := model.settings.get("settings", {}).get("seed")) is not None
        },
        files=[File(path, sha, command(path)) for path, sha in project.files.items()],
        versions={"python": platform.python_version(), **_versions()},
        missing=missing(project),
    )


def command(path: str) -> str:
    """The command that writes a file.

    Args:
        path: from the project folder, with slashes.
    """
    folder, _, rest = path.partition("/")
    name = rest.partition("/")[0].partition(".")[0]
    if folder == "data":
        return "unsink fetch"
    if (folder, name) == ("adapters", "target"):
        return "unsink memorize"
    return f"unsink {PRODUCERS[folder]} --run {name}"


def missing(project: Project) -> dict[str, str]:
    """Part that the project does not have -> the command that makes it."""
    kinds = {kind for kind, _ in project.variants}
    there = {
        "the target": project.model("target"),
        "the base": project.model("base"),
        "attention sinks": any(model.probe for model in project.models),
        "training curves": any(model.history for model in project.models),
        "an audit": project.audits,
        "ablations": "ablate" in kinds,
        "stress tests": "stress" in kinds,
    }
    return {part: command for part, command in _MISSING.items() if not there[part]}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a wheel without this extra
            continue
    return found
