"""Reporters: silent by default, plain lines in files, bars on a terminal."""

import io
import logging
import warnings

import pytest
from rich.console import Console

from unsink.progress import LOG, SILENT, Reporter, _Bars, _Display, console_reporter, narrated


def work(reporter: Reporter) -> None:
    with reporter.working("unlearn clean"), reporter.task("outer", 2) as outer:
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


def terminal() -> tuple[io.StringIO, _Display, _Bars]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    display = _Display(console, auto_refresh=False)
    return screen, display, _Bars(console, display)


def shown(display: _Display) -> str:
    """What the live display holds at this moment."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(display.get_renderable())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_nested_tasks_share_one_display_and_the_outer_bar_stays() -> None:
    screen, display, reporter = terminal()
    work(reporter)
    assert "a [line]" in screen.getvalue()
    assert screen.getvalue().count("2/2") == 1
    assert "3/3" not in screen.getvalue()
    assert not display.tasks


def test_an_error_inside_a_task_ends_the_display() -> None:
    _, display, reporter = terminal()
    with pytest.raises(RuntimeError), reporter.working("fetch"), reporter.task("outer", 2):
        raise RuntimeError
    assert not display.tasks
    assert not display.live.is_started
    assert not LOG.handlers


def test_where_no_bar_runs_the_last_thing_done_is_shown() -> None:
    _, display, reporter = terminal()
    with reporter.working("evaluate clean"):
        assert "evaluate clean" in shown(display)
        logging.getLogger("unsink.models").debug("loading the model in %s", "here")
        assert "evaluate clean: loading the model in here" in shown(display)
        with reporter.task("verbmem", 4) as advance:
            advance(1)
            assert "loading" not in shown(display)
            assert "verbmem" in shown(display)
            assert "1/4" in shown(display)
        assert display.live.is_started
    assert not display.live.is_started


def test_bars_say_how_much_time_is_left() -> None:
    _, display, reporter = terminal()
    clock = iter(range(0, 1000, 2))
    display.get_time = lambda: float(next(clock))  # type: ignore[method-assign]
    with reporter.task("verbmem", 100) as advance:
        for _ in range(5):
            advance(10)
        assert "left 0:00:" in shown(display)


def test_verbose_says_what_was_done_and_when(capfd: pytest.CaptureFixture[str]) -> None:
    with narrated(), SILENT.task("verbmem", 3):
        logging.getLogger("unsink.artifacts").debug("wrote %s", "metrics/[a].json")
        warnings.warn("old weights", UserWarning, stacklevel=1)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].split(" s  ")[1] == "wrote metrics/[a].json"
    assert float(lines[0].split(" s  ")[0]) > 0
    assert "UserWarning: old weights" in err
    assert "verbmem: 3 in 0.0 s" in err
    assert not LOG.handlers
    logging.getLogger("unsink.artifacts").debug("nobody listens")
    assert capfd.readouterr().err == ""


def test_a_library_with_a_handler_of_its_own_does_not_say_it_again() -> None:
    heard: list[str] = []
    root = logging.getLogger()
    level, handler = root.level, logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        with narrated(), terminal()[2].working("fetch"):
            LOG.debug("reading")
        root.setLevel(logging.DEBUG)
        with narrated(), terminal()[2].working("fetch"):
            LOG.debug("writing")
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    assert heard == ["writing"]
