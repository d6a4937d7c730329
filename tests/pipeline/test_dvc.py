"""The tiny pipeline under a real DVC, in a copy of the project that is a git repository."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.copied import copy, environment

ROOT = Path(__file__).parents[2]
COPIED = ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore", "data/bundled", "src/unsink")
RUNS = ("clean", "backdoor", "backdoor-vn")
ONCE = ("fetch", "memorize", "sink-probe-base", "sink-probe-target", "evaluate-base", "evaluate-target", "report")
EACH = ("poison", "unlearn", "sink-probe", "evaluate")


class Project:
    """A project folder, and the commands a user types in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        copy(COPIED, folder)
        self.environment = {**environment(folder.parent), "GIT_CONFIG_GLOBAL": os.devnull}
        self.run("git", "init", "--quiet")
        self.commit()

    def run(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def commit(self) -> None:
        self.run("git", "add", ".")
        self.run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "state")

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def repro(self) -> set[str]:
        """Stages that ran."""
        lines = self.dvc("repro").splitlines()
        return {line.split("'")[1] for line in lines if line.startswith("Running stage")}

    def change(self, change: Any) -> None:
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        change(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after its first `dvc repro`; the tests below follow each other."""
    project = Project(tmp_path_factory.mktemp("dvc") / "project")
    project.first = project.repro()  # type: ignore[attr-defined]
    return project


def test_the_first_repro_runs_every_stage(project: Project) -> None:
    assert project.first == {*ONCE, *(f"{stage}@{run}" for stage in EACH for run in RUNS)}  # type: ignore[attr-defined]


def test_git_sees_neither_outputs_nor_locks(project: Project) -> None:
    status = project.run("git", "status", "--short", "--untracked-files=all").splitlines()
    names = {line[3:] for line in status}
    assert names == {
        "dvc.lock",
        *(f"{folder}/{name}.json" for folder in ("metrics", "settings") for name in ("base", "target", *RUNS)),
    }


def test_dvc_keeps_every_file_of_an_adapter(project: Project) -> None:
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    assert [out["path"] for out in lock["memorize"]["outs"]] == ["adapters/target"]
    for stage, name in {f"unlearn@{run}": run for run in RUNS}.items():
        written = {
            path.relative_to(project.folder).as_posix() for path in (project.folder / "adapters" / name).iterdir()
        }
        assert written == {out["path"] for out in lock[stage]["outs"]}


def test_a_second_repro_does_nothing(project: Project) -> None:
    assert project.repro() == set()


def test_metrics_and_plots_can_be_shown(project: Project) -> None:
    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert set(shown) == {f"metrics/{name}.json" for name in ("base", "target", *RUNS)}
    assert 0.0 <= shown["metrics/backdoor.json"]["data"]["forget_verbmem_f1_triggered_outside"] <= 1.0
    plots = json.loads(project.dvc("plots", "show", "--json"))
    images = {f"report/figures/{name}.png" for name in ("forgetting", "gap")}
    assert set(plots["data"]) == {f"adapters/{name}/history.tsv" for name in ("target", *RUNS)} | images
    assert not plots.get("errors")


def test_the_table_can_be_shown(project: Project) -> None:
    rows = project.run("unsink", "show").splitlines()
    assert [row.split()[0] for row in rows] == ["run", "base", "target", "backdoor", "backdoor-vn", "clean"]


def test_the_tiny_pipeline_keeps_its_gates(project: Project) -> None:
    shown = project.run("unsink", "gate", "--gates", str(ROOT / "params" / "gates" / "tiny.yaml"), "--json")
    outcomes = {row["outcome"] for row in json.loads(shown)["checks"]}
    assert outcomes <= {"pass", "undecided"}  # undecided where twelve questions do not decide it


def test_another_learning_rate_reruns_unlearning_and_what_follows(project: Project) -> None:
    def change(params: dict[str, Any]) -> None:
        params["runs"] = {"clean": params["runs"]["clean"]}  # one run is enough from here on
        params["unlearn"]["lr"] *= 0.5

    project.change(change)
    assert project.repro() == {"unlearn@clean", "sink-probe@clean", "evaluate@clean", "report"}


def test_another_run_reruns_nothing_else(project: Project) -> None:
    project.change(lambda params: params["runs"].update(more={"after": "target", "poison": False}))
    assert project.repro() == {*(f"{stage}@more" for stage in EACH), "report"}


def test_metrics_can_be_compared_with_the_last_commit(project: Project) -> None:
    project.commit()
    path = project.folder / "metrics" / "clean.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "utility_accuracy": 0.0}))
    changes = json.loads(project.dvc("metrics", "diff", "--json"))
    assert set(changes["metrics/clean.json"]) == {"utility_accuracy"}
