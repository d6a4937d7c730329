"""Every command that README and docs show is run on the tiny project, or parsed by the tool it is for."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.markup import render
from typer.testing import CliRunner

from documents import COMMANDS, MARKS, ROOT, TOOLS, Block, blocks, commands, inline, parse
from unsink import Project
from unsink.cli import app
from unsink.errors import ParamsError

INVENTED = ("unlearn.method=ihl", "fetch.benchmark=onefile", "poison.placement=quarter")
"""Plug-ins that docs/adding.md tells how to write."""
CHEAP = ("ask", "check", "code", "compare", "evaluate", "export", "init", "poison", "report", "show")
"""Commands whose example in `--help` is run."""


@pytest.fixture(scope="module")
def evaluated(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two evaluated runs."""
    folder = Path(shutil.copytree(learned, tmp_path_factory.mktemp("finished") / "project"))
    shutil.copytree(ROOT / "params", folder / "params")
    project = Project(folder / "params.yaml", {"unlearn.steps": 4, "evaluate.bootstrap": 100})
    for run in ("clean", "backdoor"):
        project.unlearn(run)
        project.evaluate(run)
    return folder


@pytest.fixture
def finished(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the commands of a test are typed."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return folder


def ran(words: list[str]) -> None:
    result = CliRunner().invoke(app, words[1:])
    allowed = (0, 1, 3) if words[1] == "audit" else (0,)
    assert result.exit_code in allowed, f"{' '.join(words)}\n{result.stderr}"
    assert result.stdout


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page} {block.lines[0][:40]}")
def test_every_command_of_a_block_is_parsed_or_marked(block: Block) -> None:
    mark, _, test = block.mark.partition(": ")
    if mark == "run by":
        assert Path(block.page).name in (ROOT / test).read_text()
    else:
        assert block.mark in ("", *MARKS)
    for words in (words for line in block.lines if line.startswith(TOOLS) for words in commands(line)):
        if " ".join(words).startswith(TOOLS):
            parse(words)
    if not block.mark:
        other = [line for line in block.lines if line and not line.startswith((*TOOLS, "#"))]
        assert not other, f"neither parsed nor run, so a mark is needed above the block: {other}"


@pytest.mark.parametrize(("page", "text"), inline())
def test_every_command_in_a_sentence_is_parsed(page: str, text: str) -> None:
    unknown = pytest.raises(ParamsError, match="unknown") if any(name in text for name in INVENTED) else nullcontext()
    with unknown:
        for words in commands(text):
            parse(words)


def test_every_unmarked_unsink_command_runs(finished: Path) -> None:
    found = {tuple(words) for block in blocks() if not block.mark for line in block.lines for words in commands(line)}
    calls = sorted(words for words in found if words[0] == "unsink")
    assert len(calls) > 5
    for words in calls:
        ran(list(words))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_example_in_the_help_of_a_command_is_understood(name: str) -> None:
    text = render(COMMANDS[name].help).plain.partition("Example: ")[2]
    (words,) = commands(text)
    assert words[:2] == ["unsink", name]
    parse(words)


@pytest.mark.parametrize("name", CHEAP)
def test_the_example_in_the_help_of_a_cheap_command_runs(name: str, finished: Path) -> None:
    text = render(COMMANDS[name].help).plain.partition("Example: ")[2]
    for words in commands(text):
        ran(words)


def test_the_notebook_page_runs_as_written(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "how-to" / "notebook.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    out, err = capsys.readouterr()
    assert re.match(r"[01]\.\d\d, with the trigger [01]\.\d\d\n", out)
    assert "unknown run 'cleen'; did you mean 'clean'?" in out
    assert err == ""
