"""Shell completion, asked as a shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from unsink import completion
from unsink.cli import app
from unsink.registry import names


def offered(folder: Path, line: str) -> list[str]:
    """What zsh and fish offer at the end of a line."""
    asked = {"_UNSINK_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, **asked, "_TYPER_COMPLETE_ARGS": line}
    code = "from unsink.cli import app; app(prog_name='unsink')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    return [one.split("\t")[0] for one in result.stdout.splitlines()]


def test_runs_are_those_of_the_params_file(params_file: Path) -> None:
    assert offered(params_file.parent, "unsink unlearn --run ") == ["clean", "backdoor", "backdoor-vn"]
    assert "sink-probe" in offered(params_file.parent, "unsink sink")


def context(**params: object) -> typer.Context:
    found = typer.main.get_command(app).make_context("unsink", [], resilient_parsing=True)
    found.params.update(params)
    return found  # type: ignore[return-value]


def test_base_and_target_are_offered_where_they_are_allowed(params_file: Path) -> None:
    assert completion.models(context(params=params_file), "ba") == ["base", "backdoor", "backdoor-vn"]
    assert completion.runs(context(params=str(params_file)), "ba") == ["backdoor", "backdoor-vn"]


@pytest.mark.parametrize("content", [None, "runs: [", "- 1", "runs: 3"])
def test_a_missing_or_broken_params_file_offers_nothing(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    assert completion.runs(context(params=path), "") == []


@pytest.mark.parametrize(
    ("incomplete", "expected"),
    [
        ("unlearn.value_norm.w", ["unlearn.value_norm.weight="]),
        ("unlearn.method=", [f"unlearn.method={name}" for name in names("unsink.methods")]),
        ("unlearn.method=si", ["unlearn.method=simnpo"]),
        ("poison.placement=", [f"poison.placement={name}" for name in ("prefix", "infix", "suffix", "sink")]),
        ("runs.backdoor.poison.placement=in", ["runs.backdoor.poison.placement=infix"]),
        ("fetch.benchmark=muse", ["fetch.benchmark=muse-books", "fetch.benchmark=muse-news"]),
        ("model.device=c", ["model.device=cpu", "model.device=cuda"]),
        ("poison.keep_clean=", ["poison.keep_clean=true", "poison.keep_clean=false"]),
        ("seed=", []),
        ("nothing.at.all=", []),
    ],
)
def test_keys_of_the_params_file_and_their_names(params_file: Path, incomplete: str, expected: list[str]) -> None:
    assert completion.settings(context(params=params_file), incomplete) == expected
