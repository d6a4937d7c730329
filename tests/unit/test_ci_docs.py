"""What docs/ci.md offers for copying, and the workflow of this repository: valid YAML, and commands that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from unsink.artifacts import Layout, write_json
from unsink.cli import app
from unsink.gates import Gates, load_gates

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
DOCS = (ROOT / "docs" / "ci.md").read_text()
RUNS = ["clean", "backdoor", "backdoor-vn"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def texts(value: Any) -> Iterator[str]:
    """All strings in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts(one)


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of each call of `unsink` in a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        words.whitespace_split = True
        found = list(words)
        if len(found) > 1 and found[0] == "unsink":
            end = next((i for i, word in enumerate(found) if word and set(word) <= set("();<>|&")), len(found))
            yield found[1:end]


WORKFLOWS = {"ci.yml": yaml.safe_load(WORKFLOW.read_text())}
for block in blocks("yaml"):
    document = yaml.safe_load(block)
    WORKFLOWS["gates.yaml" if "gates" in document else "GitHub" if "jobs" in document else "GitLab"] = document
SCRIPTS = [*blocks("sh"), *(text for document in WORKFLOWS.values() for text in texts(document))]
CALLS = [call for script in SCRIPTS for call in commands(script)]


def test_the_docs_show_gates_and_both_workflows() -> None:
    assert set(WORKFLOWS) == {"ci.yml", "gates.yaml", "GitHub", "GitLab"}
    assert len(CALLS) == 8  # four in the first example, one with a worktree, one in each workflow


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_every_command_is_one(call: list[str]) -> None:
    name, *arguments = call
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments).close()  # raises on an unknown option


def test_the_gates_in_the_docs_are_valid(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text(next(block for block in blocks("yaml") if "\ngates:" in block))
    assert len(load_gates(tmp_path / "gates.yaml", RUNS).checks(RUNS)) == 9


def test_the_docs_explain_every_key() -> None:
    table = DOCS[DOCS.index("| key |") : DOCS.index("## When a bound")]
    for key in Gates.model_fields["gates"].annotation.__args__[0].model_fields:  # type: ignore[union-attr]
        assert f"`{key}`" in table, key


@pytest.fixture(params=["default", "tiny"])
def finished(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as `unsink init` makes it, with numbers that keep all of its bounds."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", ".", "--template", request.param]).exit_code == 0
    layout = Layout(tmp_path)
    numbers: dict[str, dict[str, float]] = {}
    for check in load_gates(tmp_path / "gates.yaml", RUNS).checks(RUNS):
        gate, metric = check.gate, check.gate.metric or ""
        mean = gate.max - 0.02 if gate.max is not None else 0.95
        values = {metric: mean, f"{metric}_low": mean - 0.01, f"{metric}_high": mean + 0.01, f"{metric}_n": 200}
        for run in filter(None, (check.run, gate.against)):
            numbers.setdefault(run, {}).update(values)
    for run, found in numbers.items():
        write_json(layout.metrics(run), found)
        write_json(layout.settings(run), {"settings": {"dialect": "muse"}, "undefined": {}})
    return tmp_path


@pytest.mark.parametrize("name", ["GitHub", "GitLab"])
def test_the_gate_of_a_workflow_runs_in_a_new_project(name: str, finished: Path) -> None:
    (call,) = (call for text in texts(WORKFLOWS[name]) for call in commands(text) if call[0] == "gate")
    result = CliRunner().invoke(app, call)
    assert (result.exit_code, result.output) == (0, result.stdout)
    assert "unsink gate: passed" in result.stdout
    assert list(finished.rglob("gates.xml"))


@pytest.mark.parametrize("name", ["ci.yml", "GitHub"])
def test_a_workflow_on_github_keeps_its_reports(name: str) -> None:
    (job,) = WORKFLOWS[name]["jobs"].values()
    steps = job["steps"]
    upload = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    gate = next(step for step in steps if "unsink gate" in step.get("run", ""))
    assert "--junit reports/gates.xml" in gate["run"]
    assert "|" not in gate["run"]  # a pipe would hide the exit code
    assert "continue-on-error" not in gate
    shallow = "fetch-depth: 0" not in yaml.safe_dump(steps)
    assert shallow == ("--baseline" not in gate["run"])


def test_gitlab_keeps_its_reports() -> None:
    job = WORKFLOWS["GitLab"]["gate"]
    assert job["artifacts"]["when"] == "always"
    (gate,) = (line for line in job["script"] if line.startswith("unsink gate"))
    assert f"--junit {job['artifacts']['reports']['junit']}" in gate
    assert "allow_failure" not in job


def test_ci_runs_what_developers_run_and_gates_that_exist() -> None:
    text = WORKFLOW.read_text()
    assert "run: .ci/run" in text
    (path,) = re.findall(r"--gates (\S+)", text)
    assert (ROOT / path).is_file()
