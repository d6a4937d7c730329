"""Reporters: silent by default, plain lines in files, bars on a terminal."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from unsink.progress import SILENT, Reporter, _Bars, console_reporter


def work(reporter: Reporter) -> None:
    with reporter.task("outer", 2) as outer:
        outer()
        with reporter.task("inner", 3) as inner:
            inner(3, "loss 0.5")
        reporter.log("a [line]")
        outer(note="done")


def test_the_silent_reporter_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    work(SILENT)
    work(console_reporter(quiet=True))
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_only_log_lines_are_written_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    work(console_reporter())
    assert capfd.readouterr() == ("", "a [line]\n")


def terminal() -> tuple[Console, _Bars]:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    columns = TextColumn("{task.description} {task.completed}/{task.total} {task.fields[note]}")
    return console, _Bars(console, Progress(columns, console=console, auto_refresh=False))


def test_nested_tasks_share_one_display() -> None:
    console, reporter = terminal()
    work(reporter)
    assert "a [line]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not reporter._progress.tasks


def test_an_error_inside_a_task_takes_its_bar_away() -> None:
    _, reporter = terminal()
    with pytest.raises(RuntimeError), reporter.task("outer", 2):
        raise RuntimeError
    assert not reporter._progress.tasks
    assert not reporter._progress.live.is_started
