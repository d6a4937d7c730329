"""DVC does not follow imports: dvc.yaml has to name every source file that can change what a stage writes."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from guards.source import PACKAGE, ROOT, stage_deps

PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

PARAMS = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]


def definition(name: str) -> dict[str, Any]:
    stage: dict[str, Any] = PIPELINE[name]
    return stage.get("do", stage)


def module(name: str) -> str:
    """The file in stages/ whose work a stage's command does."""
    command: str = definition(name)["cmd"]
    return command.split()[1].replace("-", "_")


@pytest.mark.parametrize("name", PIPELINE)
def test_deps_are_the_import_closure_of_the_stage(name: str) -> None:
    listed = {dep for dep in definition(name)["deps"] if dep.startswith("src/")}
    wanted = stage_deps(module(name))
    missing, needless = sorted(wanted - listed), sorted(listed - wanted)
    assert (missing, needless) == ([], []), f"stages.{name}.deps: add {missing}, remove {needless}"


@pytest.mark.parametrize("name", PIPELINE)
def test_every_section_that_a_stage_reads_is_a_param(name: str) -> None:
    source = ast.parse((PACKAGE / "stages" / f"{module(name)}.py").read_text())
    nodes = [node for node in ast.walk(source) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "params"}
    if "params.yaml" in definition(name)["deps"]:
        return  # it reads the whole file
    listed = {param.split(".")[0].replace("-", "_") for param in definition(name)["params"]}
    per_run = "foreach" in PIPELINE[name]
    wanted = read - {"run", "runs"} | ({"runs"} if per_run else set())
    assert listed >= wanted, f"stages.{name}.params: add {sorted(wanted - listed)}"


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_every_params_file_has_the_keys_that_dvc_asks_for(path: Path) -> None:
    params = yaml.safe_load(path.read_text())
    keys = {key for name in PIPELINE for key in definition(name).get("params", ()) if "$" not in key}
    missing = [key for key in sorted(keys) if not has(params, key.split("."))]
    assert not missing, f"{path.name}: DVC reads {missing}, and stops where a key is left to its default"


def has(section: Any, key: list[str]) -> bool:
    return not key or (isinstance(section, dict) and key[0] in section and has(section[key[0]], key[1:]))


@pytest.mark.parametrize("name", PIPELINE)
def test_the_command_is_a_stage_and_nothing_else(name: str) -> None:
    assert name.startswith(definition(name)["cmd"].split()[1])
    assert (PACKAGE / "stages" / f"{module(name)}.py").exists()


def test_every_metrics_file_stays_out_of_the_cache_and_in_git() -> None:
    metrics = [entry for name in PIPELINE for entry in definition(name).get("metrics", [])]
    assert metrics
    assert all(options == {"cache": False} for entry in metrics for options in entry.values())
