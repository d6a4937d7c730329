"""The package as people get it: a wheel in an environment of its own, far from the repository, and its project."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
REFERENCE = "fetch", "memorize", "poison@clean", "unlearn@backdoor", "evaluate-base", "sink-probe@backdoor-vn"


class Installed:
    """The wheel, an environment that has it, and a project that its `unsink init` made outside of git."""

    def __init__(self, folder: Path) -> None:
        build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder))
        run(folder, sys.executable, "-m", "pip", *build, str(ROOT))
        (self.wheel,) = folder.glob("*.whl")
        self.environment = folder / "env"
        venv.create(self.environment)
        self.python = self.environment / "bin" / "python"
        places = {"base": str(self.environment), "platbase": str(self.environment)}
        packages = Path(sysconfig.get_path("purelib", "venv", places))
        # its dependencies, but not the repository: a .pth file in a folder that a .pth file names is not read
        (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        run(folder, sys.executable, "-m", "pip", "--python", str(self.python), *INSTALL, str(self.wheel))
        self.project = folder / "project"
        self.made = self.unsink(folder, "init", "project", "--template", "tiny", "--json")

    def unsink(self, folder: Path, *arguments: str) -> str:
        return run(folder, str(self.environment / "bin" / "unsink"), *arguments, first=self.environment / "bin")

    def dvc(self, *arguments: str) -> str:
        return run(self.project, str(self.python), "-m", "dvc", *arguments, first=self.environment / "bin")


INSTALL = ("install", "--no-deps", "--no-index", "--quiet")


def run(folder: Path, *command: str, first: Path = Path("/nowhere")) -> str:
    places = {f"DVC_{kind}_DIR": str(folder / kind) for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    environment = {**os.environ, **places, "PATH": f"{first}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_all_that_the_package_reads(installed: Installed) -> None:
    inside = set(zipfile.ZipFile(installed.wheel).namelist())
    code = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "unsink").rglob("*.py")}
    corpus = {f"unsink/benchmarks/bundled_data/{path.name}" for path in (ROOT / "data" / "bundled").iterdir()}
    params = {f"unsink/template/params/{path.name}" for path in (ROOT / "params").glob("*.yaml")}
    others = {"unsink/py.typed", *(f"unsink/template/{name}" for name in ("dvc.yaml", "gates.yaml", "params.yaml"))}
    assert code | corpus | params | others <= inside


def test_the_installed_package_is_the_one_that_runs(installed: Installed) -> None:
    where = run(installed.project, str(installed.python), "-c", "import unsink; print(unsink.__file__)")
    assert Path(where.strip()).is_relative_to(installed.environment)


def test_a_project_outside_of_git_is_whole(installed: Installed) -> None:
    there = {path.relative_to(installed.project).as_posix() for path in installed.project.rglob("*") if path.is_file()}
    assert set(json.loads(installed.made)["files"]) <= there
    assert "no_scm = true" in (installed.project / ".dvc" / "config.local").read_text()
    assert (installed.project / "params.yaml").read_text() == (ROOT / "params" / "tiny.yaml").read_text()


def test_check_is_content_with_it(installed: Installed) -> None:
    checks = json.loads(installed.unsink(installed.project, "check", "--json"))["checks"]
    assert [one["name"] for one in checks if one["ok"]] == ["params", "packages", "disk", "device", "corpus", "model"]


def test_the_bundled_corpus_is_found(installed: Installed) -> None:
    counts = json.loads(
        installed.unsink(installed.project, "fetch", "--check", "--json", "-S", "fetch.benchmark=bundled")
    )
    assert counts["rows"]["forget"] == len((ROOT / "data" / "bundled" / "forget.jsonl").read_text().splitlines())


def test_dvc_runs_a_stage_of_it_and_reruns_it_after_an_upgrade(installed: Installed) -> None:
    assert "Running stage 'fetch'" in installed.dvc("repro", "fetch")
    assert (installed.project / "data" / "fetched" / "manifest.json").exists()
    assert "Running stage 'fetch'" not in installed.dvc("repro", "fetch")
    status = json.loads(installed.dvc("status", "--json"))
    assert set(REFERENCE) - {"fetch"} <= set(status)
    assert status["code"] == ["always changed"]
    assert "fetch" not in status
    (changed,) = installed.environment.rglob("unsink/benchmarks/tiny.py")
    changed.write_text(changed.read_text() + "# another release\n")
    installed.unsink(installed.project, "code")
    assert "code.json" in json.dumps(json.loads(installed.dvc("status", "--json"))["fetch"])


def test_every_stage_of_the_repository_is_in_the_project(installed: Installed) -> None:
    stages = yaml.safe_load((installed.project / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["code", *yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]]
    text = (installed.project / "dvc.yaml").read_text()
    assert "src/unsink" not in text
    assert "data/bundled" not in text
    for name, stage in stages.items():
        if name != "code":
            assert stage.get("do", stage)["params"][-1] == {"code.json": [name]}
