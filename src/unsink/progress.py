"""Progress and log lines on stderr; library functions get a `Reporter` and stay silent by default.

What is loaded, read and written goes to the logger `unsink`, below the level that Python shows by itself. On a terminal
the last such line stands where no task says how far it is; `narrated` (`--verbose`) prints them all.
"""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.text import Text

LOG = logging.getLogger("unsink")


class Advance(Protocol):
    """How a task is moved forward."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Advance by `n` units and show a short note, such as the loss, beside the bar."""


class Reporter(Protocol):
    """Where a stage says how far it is."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of `total` units; the context yields the function that advances it."""

    def log(self, message: str) -> None:
        """Say one line."""

    def working(self, description: str) -> AbstractContextManager[None]:
        """Show that work goes on while the context is open, also where no task is."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        with _timed(description, total):
            yield _ignore

    def log(self, message: str) -> None:
        pass

    @contextmanager
    def working(self, description: str) -> Iterator[None]:
        yield


def _ignore(n: int = 1, note: str = "") -> None:
    pass


@contextmanager
def _timed(description: str, total: int) -> Iterator[None]:
    began = time.monotonic()
    yield
    LOG.debug("%s: %d in %.1f s", description, total, time.monotonic() - began)


SILENT: Reporter = _Silent()
"""Reports nothing: the default of every library function."""


@cache
def _stderr_console() -> Console:
    """The one console on stderr: only lines that go through it do not tear up its bars."""
    return Console(stderr=True)


class _Display(Progress):
    """Bars of the open tasks, or else `waiting`. What is no longer open is gone, but for the bars that were left."""

    def __init__(self, console: Console, auto_refresh: bool = True) -> None:
        self.waiting = ""
        self._spinner = Spinner("dots")
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            auto_refresh=auto_refresh,
            transient=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown now."""
        if self.tasks or not self.waiting:
            yield self.make_tasks_table(self.tasks)
        else:
            self._spinner.update(text=Text(self.waiting, no_wrap=True, overflow="ellipsis"))
            yield self._spinner

    def leave(self, task: TaskID) -> None:
        """Close a task; its bar stays on the screen unless the task was a part of another one."""
        if len(self.tasks) == 1:
            self.console.print(self.make_tasks_table(self.tasks))
        self.remove_task(task)


class _Plain(_Silent):
    """Log lines without bars, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def log(self, message: str) -> None:
        _say(self._console, message)


class _Bars(_Plain):
    """Bars with the time left. Rich allows one live display, so nested tasks share it."""

    def __init__(self, console: Console, display: _Display) -> None:
        super().__init__(console)
        self._display = display
        self._open = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        bar = self._display.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            self._display.advance(bar, n)
            if note:
                self._display.update(bar, note=note)

        with self._shown(), _timed(description, total):
            try:
                yield advance
            finally:
                self._display.leave(bar)

    @contextmanager
    def working(self, description: str) -> Iterator[None]:
        latest = _Latest(self._display, description)
        with self._shown(), _handled(latest, LOG):
            yield

    @contextmanager
    def _shown(self) -> Iterator[None]:
        self._open += 1
        self._display.start()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._display.stop()


class _Latest(logging.Handler):
    """Puts what was begun or done last beside the name of the command."""

    def __init__(self, display: _Display, description: str) -> None:
        super().__init__()
        self._display, self._description = display, description
        display.waiting = description

    def emit(self, record: logging.LogRecord) -> None:
        self._display.waiting = f"{self._description}: {record.getMessage()}"


class _Narrator(logging.Handler):
    """Prints what was done, behind the seconds since the program began."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        _say(self._console, f"{record.relativeCreated / 1000:7.1f} s  {record.getMessage().rstrip()}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _handled(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    level, propagate = logger.level, logger.propagate
    # Libraries install handlers at the root; these get such lines only if somebody has asked for them.
    logger.propagate = propagate and logger.isEnabledFor(logging.DEBUG)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)


def console_reporter(quiet: bool = False) -> Reporter:
    """Report on stderr: bars with the time left on a terminal, log lines alone elsewhere, nothing when quiet."""
    if quiet:
        return SILENT
    console = _stderr_console()
    return _Bars(console, _Display(console)) if console.is_terminal else _Plain(console)


@contextmanager
def narrated() -> Iterator[None]:
    """Say on stderr what is loaded, read and written, and when; show the warnings of libraries."""
    narrator = _Narrator(_stderr_console())
    with warnings.catch_warnings(), _handled(narrator, LOG), _handled(narrator, logging.getLogger("py.warnings")):
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
