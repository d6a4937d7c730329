"""The Python API mirrors the commands, and costs nothing before it is used."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import unsink
from unsink import Project
from unsink.cli import Call, app
from unsink.errors import MissingPrerequisite, ParamsError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_ON_A_PROJECT = {"ask", "code", "init"}
"""A conversation, what DVC needs of an installed package, and what makes a project."""
PRINTED = {"junit", "md", "exit_zero"}
"""Options that say how a result is written, not what it is."""
SHORTHAND = {"every"}
"""Options for what a method takes without them: `export --all` is `run=None`."""


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - NOT_ON_A_PROJECT))
def test_every_command_is_a_method_with_its_own_options(name: str) -> None:
    method = getattr(Project, name.replace("-", "_"), None)
    assert method, f"unsink/api.py has no method for `unsink {name}`"
    own = {one.name for one in COMMANDS[name].params} - Call.__dataclass_fields__.keys() - PRINTED - SHORTHAND
    assert inspect.signature(method).parameters.keys() - {"self"} == own
    assert inspect.getdoc(method)
    assert "Raises:" in inspect.getdoc(method)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, unsink; assert unsink.Project;"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_package_offers_what_it_names() -> None:
    assert {name: getattr(unsink, name) for name in unsink.__all__}["Project"] is Project
    with pytest.raises(AttributeError, match="no attribute 'projekt'"):
        unsink.projekt  # noqa: B018


@pytest.mark.parametrize(
    "overrides", [{"unlearn.lr": 2e-5, "poison.trigger": "a: b"}, ["unlearn.lr=2e-5", "poison.trigger=a: b"]]
)
def test_overrides_are_a_mapping_or_as_on_the_command_line(params_file: Path, overrides: Any) -> None:
    params = Project(params_file, overrides).params
    assert (params.unlearn.lr, params.poison.trigger) == (2e-5, "a: b")


def test_values_of_any_kind_can_be_overridden(params_file: Path) -> None:
    overrides = {"runs.clean.poison": False, "evaluate.metrics": ["verbmem"], "fetch.path": Path("corpus")}
    params = Project(params_file, {**overrides, "unlearn.adapter": {"rank": 2, "alpha": 4}}).params
    assert params.evaluate.metrics == ["verbmem"]
    assert params.fetch.path == "corpus"
    assert params.unlearn.adapter.rank == 2


def test_the_params_file_is_read_at_each_call(params_file: Path) -> None:
    project = Project(params_file)
    params_file.write_text(params_file.read_text().replace("seed: 0", "seed: 7"))
    assert project.params.seed == 7


def test_a_method_returns_what_the_command_prints(params_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = Project(params_file).fetch(check=True)
    assert found["rows"]["forget"] == 12
    assert capfd.readouterr() == ("", "")


def test_what_a_user_can_mend_is_raised(params_file: Path) -> None:
    with pytest.raises(MissingPrerequisite, match="no results yet"):
        Project(params_file).show()
    with pytest.raises(ParamsError, match=r"unlearn\.lrr: unknown key"):
        Project(params_file, {"unlearn.lrr": 1}).memorize()


def test_progress_is_shown_by_the_reporter_that_is_given(params_file: Path) -> None:
    said: list[str] = []

    class Listener(type(unsink.console_reporter(quiet=True))):  # type: ignore[misc]
        def working(self, description: str) -> Any:
            said.append(description)
            return super().working(description)

    Project(params_file, reporter=Listener()).fetch(check=True)
    assert said == ["fetch"]
