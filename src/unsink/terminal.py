"""What `unsink ask` looks like: a session with a prompt line, answers as they come, tables; or lines for scripts.

Answers go to stdout, everything else to stderr. What a model says may hold control characters, which a terminal would
obey; they are replaced, but not in JSON, where they are escaped.
"""

import json
import math
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unsink.errors import DataError, ParamsError, UnsinkError
from unsink.session import COMMANDS, changed, help_text, parse
from unsink.stages.ask import Answer, Conversation, State

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Form:
    """How answers are shown.

    Attributes:
        as_json: as JSON objects.
        lines: one line for each, for scripts.
        compare: every question goes to all kinds of runs.
    """

    as_json: bool = False
    lines: bool = False
    compare: bool = False


def talk(conversation: Conversation, state: State, question: str | None, form: Form) -> None:
    """Answer one question; without one, those of a person at the terminal or each line of standard input.

    Raises:
        UnsinkError: something cannot be asked; a person is told, and the session goes on.
    """
    conversation.check(state)
    if question is not None:
        _reply(conversation, state, question, form)
    elif sys.stdin.isatty() and sys.stdout.isatty() and not form.as_json:
        _person(_Session(conversation, state, form))
    else:
        _script(_Session(conversation, state, replace(form, lines=True)))


@dataclass
class _Session:
    """A conversation line by line; commands change `state`."""

    conversation: Conversation
    state: State
    form: Form
    last: str = ""

    def take(self, line: str) -> bool:
        """Do what a line says; return whether to go on."""
        command = parse(line)
        if command.name in ("ask", "compare"):
            self.last = command.argument or self.last if command.name == "compare" else command.argument
            form = replace(self.form, compare=self.form.compare or command.name == "compare")
            _reply(self.conversation, self.state, self.last, form)
        elif command.name == "help":
            _say(help_text())
        elif command.name != "quit":
            self.state = changed(self.conversation, self.state, command)
            _say(self.conversation.describe(self.state))
        return command.name != "quit"


def _script(session: _Session) -> None:
    """Answer each line of standard input."""
    number = 0
    try:
        for number, line in enumerate(sys.stdin, start=1):
            try:
                going = session.take(line)
            except UnsinkError as error:
                error.message = f"line {number}: {error.message}"
                raise
            if not going:
                return
    except UnicodeDecodeError as error:
        raise DataError(f"line {number + 1}: not UTF-8 text") from error
    if not number:
        raise ParamsError(
            "no question: standard input is empty", 'give one as an argument, or one a line: unsink ask "Who ...?"'
        )


def _person(session: _Session) -> None:
    """Answer a person until Ctrl-D; Ctrl-C ends an answer, and no error ends the session."""
    _edit_lines(session.conversation.runs)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it shall not look like the Ctrl-C that is caught here
    try:
        _say(f"{session.conversation.describe(session.state)}\n/help lists the commands, Ctrl-D leaves")
        while _turn(session):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _turn(session: _Session) -> bool:
    try:
        line = input(f"{session.state.run}{' +trigger' if session.state.trigger else ''}> ")
    except EOFError:
        _say("")
        return False
    except KeyboardInterrupt:
        _say("\nCtrl-D leaves")
        return True
    try:
        return not line.strip() or session.take(line)
    except KeyboardInterrupt:
        _say("\nstopped")
    except UnsinkError as error:
        _say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    return True


def _edit_lines(runs: Sequence[str]) -> None:
    """Line editing, a history of this session, and Tab for commands and runs, where Python has readline."""
    with suppress(ImportError):
        import readline

        words = [f"/{name} " for name in COMMANDS] + list(runs)  # Python's readline adds no space itself

        def complete(start: str, number: int) -> str | None:
            found = [word for word in words if start and word.startswith(start)]
            return found[number] if number < len(found) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


# --- answers


def _reply(conversation: Conversation, state: State, question: str, form: Form) -> None:
    if form.compare:
        answers = conversation.compare(question, state)
        if form.as_json:
            _json({"question": question, "answers": [_record(answer, state) for answer in answers]}, form)
        else:
            _show(_comparison(conversation, answers))
    elif form.as_json:
        _json(_record(conversation.answer(question, state), state), form)
    else:
        hear = _wait if form.lines else _Live(keep_space=state.raw).hear
        answer = conversation.answer(question, state, hear)
        typer.echo(" ".join(_clean(answer.answer).split()) if form.lines else "")
        if state.top:
            _show(_probabilities(answer))


def _wait(_: str) -> None:
    """A script gets whole answers."""


@dataclass
class _Live:
    """Writes an answer as it comes, without the space before it."""

    keep_space: bool
    begun: bool = False

    def hear(self, piece: str) -> None:
        piece = piece if self.begun or self.keep_space else piece.lstrip()
        self.begun = self.begun or bool(piece)
        typer.echo(_clean(piece), nl=False)


def _record(answer: Answer, state: State) -> dict[str, Any]:
    return answer.record(with_tokens=bool(state.top))


def _json(value: object, form: Form) -> None:
    typer.echo(json.dumps(value, indent=None if form.lines else 2, sort_keys=True, ensure_ascii=False))


def _comparison(conversation: Conversation, answers: Sequence[Answer]) -> Table:
    """A row for each run: what it says without the trigger, and with it."""
    placed = next(answer.trigger for answer in answers if answer.trigger)
    table = Table(box=box.ROUNDED if sys.stdout.isatty() else box.ASCII, show_lines=True)
    for heading in ("run", "no trigger", f"{_clean(placed.text)!r} at {placed.placement}"):
        table.add_column(Text(heading), overflow="fold")
    for without, triggered in zip(answers[::2], answers[1::2], strict=True):
        cells = (conversation.title(without.run), without.answer, triggered.answer)
        table.add_row(*(Text(_clean(cell)) for cell in cells))
    return table


def _probabilities(answer: Answer) -> Table:
    """A row for each token that was said: its probability, and the likeliest ones in its place."""
    table = Table(box=box.SIMPLE)
    for heading in ("token", "p", "likeliest"):
        table.add_column(heading, overflow="fold")
    for token in answer.tokens:
        others = ", ".join(f"{one.text!r} {math.exp(one.logprob):.3f}" for one in token.top)
        table.add_row(Text(repr(token.text)), f"{math.exp(token.logprob):.3f}", Text(others))
    return table


def _show(table: Table) -> None:
    Console(highlight=False).print(table)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _clean(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)
