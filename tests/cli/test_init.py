"""`unsink init` and `unsink code`: a project without a clone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from unsink import project
from unsink.cli import app
from unsink.params import load_params

ROOT = Path(__file__).parents[2]
FILES = [
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvc/plots/offline.html",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "gates.yaml",
    "params.yaml",
]
TEMPLATES = ["default", *sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))]


def init(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["init", str(folder), *arguments])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_inside_git_dvc_uses_git(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    result = init(tmp_path / "new")
    assert result.exit_code == 0
    assert f"next: cd {tmp_path / 'new'}; unsink check; dvc repro" in result.stdout
    assert files(tmp_path / "new") == FILES
    assert (tmp_path / "new" / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_outside_of_git_dvc_does_without(tmp_path: Path) -> None:
    assert init(tmp_path / "new").exit_code == 0
    assert files(tmp_path / "new") == sorted([*FILES, ".dvc/config.local"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_a_params_file_that_loads(name: str, tmp_path: Path) -> None:
    assert json.loads(init(tmp_path / "new", "--template", name, "--json").stdout)["template"] == name
    assert load_params(tmp_path / "new" / "params.yaml", ()).runs


def test_bounds_come_with_the_params_that_they_were_measured_with(tmp_path: Path) -> None:
    sources = {"default": "gates.yaml", "tiny": "params/gates/tiny.yaml", "tofu": None}
    for name, source in sources.items():
        assert init(tmp_path / name, "--template", name).exit_code == 0
        gates = tmp_path / name / "gates.yaml"
        assert (gates.read_text() if gates.exists() else None) == (source and (ROOT / source).read_text())


def test_there_is_a_template_for_every_params_file() -> None:
    assert list(project.templates()) == TEMPLATES


def test_an_unknown_template_is_a_usage_error(tmp_path: Path) -> None:
    result = init(tmp_path / "new", "--template", "tinny")
    assert (result.exit_code, (tmp_path / "new").exists()) == (2, False)
    assert "unknown template 'tinny'; did you mean 'tiny'?" in result.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_already_is_never_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = init(tmp_path)
    assert (result.exit_code, files(tmp_path)) == (2, [name])
    assert f"already holds {name}" in result.stderr
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_with_other_files_can_become_a_project(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert init(tmp_path).exit_code == 0
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    assert init(tmp_path / "new").exit_code == 2


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / ".dvc").write_text("a file where the folder should be")
    result = init(tmp_path)
    assert (result.exit_code, files(tmp_path)) == (3, [".dvc"])


# ---- code


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The hashes of a copy of the repository, which may be changed."""
    for name in ("dvc.yaml", "src/unsink", "data/bundled"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.setattr(project, "_PACKAGE", tmp_path / "src" / "unsink")
    monkeypatch.setattr(project, "_REPOSITORY", tmp_path)
    return project.code


def test_code_writes_one_hash_per_stage(params_file: Path) -> None:
    result = CliRunner().invoke(app, ["code", "--json", "--params", str(params_file)])
    assert json.loads(result.stdout) == json.loads((params_file.parent / "code.json").read_text()) == project.code()
    assert {"fetch", "memorize", "unlearn", "evaluate"} <= set(project.code())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("stages/poison.py", {"poison"}),
        ("methods/rmu.py", {"unlearn"}),
        ("metrics/text.py", {"memorize", "evaluate", "evaluate-base", "evaluate-target"}),
        ("stages/show.py", set()),
    ],
)
def test_a_change_of_code_changes_the_stages_that_use_it(
    name: str, stages: set[str], hashes: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    before, path = hashes(), tmp_path / "src" / "unsink" / name
    path.write_text(path.read_text() + "# changed\n")
    after = hashes()
    assert {stage for stage in before if before[stage] != after[stage]} == stages
