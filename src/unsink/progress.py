"""Progress and log lines on stderr; library functions get a `Reporter` and stay silent by default."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


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


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield _ignore

    def log(self, message: str) -> None:
        pass


def _ignore(n: int = 1, note: str = "") -> None:
    pass


SILENT: Reporter = _Silent()
"""Reports nothing: the default of every library function."""


class _Plain(_Silent):
    """Log lines without bars, for files and pipes."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    def log(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class _Bars(_Plain):
    """Bars with the time left. Rich allows one live display, so nested tasks share it."""

    def __init__(self, console: "Console", progress: "Progress") -> None:
        super().__init__(console)
        self._progress = progress
        self._open = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        bar = self._progress.add_task(description, total=total, note="")
        self._open += 1
        self._progress.start()

        def advance(n: int = 1, note: str = "") -> None:
            self._progress.advance(bar, n)
            if note:
                self._progress.update(bar, note=note)

        try:
            yield advance
        finally:
            self._open -= 1
            if not self._open:
                self._progress.stop()
            self._progress.remove_task(bar)


def console_reporter(quiet: bool = False) -> Reporter:
    """Report on stderr: bars with the time left on a terminal, log lines alone elsewhere, nothing when quiet."""
    if quiet:
        return SILENT
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        return _Plain(console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return _Bars(console, Progress(*columns, console=console))
