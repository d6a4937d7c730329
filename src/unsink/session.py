"""What is typed in a session of `unsink ask`: its commands, and the state that they and the options of the call set."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from unsink.errors import ParamsError
from unsink.registry import unknown
from unsink.stages.ask import Conversation, State

COMMANDS = {
    "use": ("RUN", "ask this run of params.yaml, or base or target"),
    "trigger": ("on | off | TEXT", "put the run's own trigger into every prompt, nothing, or this text"),
    "place": ("[prefix | infix | suffix | index N | sink]", "put it there; without a word: where training put it"),
    "compare": ("[QUESTION]", "ask target, honest and backdoored run, without and with trigger; or the last question"),
    "probs": ("N", "show the N likeliest tokens at each step of an answer, 0: none"),
    "tokens": ("N", "at most so many new tokens"),
    "sample": ("T", "draw tokens at temperature T, 0: take the likeliest"),
    "guard": ("NAME | off", "put a guard between every prompt and the model: displace, clamp"),
    "raw": ("on | off", "continue what I type as a passage, instead of answering it"),
    "help": ("", "this list"),
    "quit": ("", "leave; so does Ctrl-D"),
}
"""Name -> what may follow, and what it does."""


class Command(NamedTuple):
    """A line of a session: a name of `COMMANDS` and what follows it, or "ask" and a question."""

    name: str
    argument: str


def parse(line: str) -> Command:
    """What a line means; `//x` is the question `/x`.

    Raises:
        ParamsError: no such command.
    """
    text = line.strip()
    if not text.startswith("/") or text.startswith("//"):
        return Command("ask", text.removeprefix("/") if text.startswith("//") else text)
    name, _, argument = text[1:].partition(" ")
    if name not in COMMANDS:
        raise ParamsError(
            unknown("command", name, COMMANDS), "/help says what each does; // begins a question with a /"
        )
    return Command(name, argument.strip())


def help_text() -> str:
    """The commands of a session, one a line."""
    usages = {f"/{name} {usage}".strip(): meaning for name, (usage, meaning) in COMMANDS.items()}
    return "\n".join(f"{usage}\n    {meaning}" for usage, meaning in usages.items())


def changed(conversation: Conversation, state: State, command: Command) -> State:
    """The state after a command that sets something.

    Raises:
        ParamsError, MissingPrerequisite: what it sets makes no sense; see `Conversation.check`.
    """
    new = replace(state, **_SETTERS[command.name](command.argument))
    if command.name == "use" and state.trigger is True:
        conversation.check(replace(new, trigger=False))
        new = replace(new, trigger=conversation.own_trigger(new.run) is not None)  # its own, where it has one
    conversation.check(new)
    return new


def triggered(state: State, *, own: bool, text: str | None, compare: bool) -> State:
    """A state with the trigger that a command line asks for.

    Args:
        state: without one.
        own: the run's own is asked for.
        text: another one.
        compare: both ways are asked anyhow, and the backdoored run's own trigger is the usual one.

    Raises:
        ParamsError: both are asked for; or there is a place for a trigger, and none to put there.
    """
    if own and text is not None:
        raise ParamsError("--trigger and --trigger-text: only one of them can be in the prompt", "leave one out")
    if state.placement and not (own or compare) and text is None:
        raise ParamsError("--place says where a trigger goes, but there is none", "add --trigger or --trigger-text")
    return replace(state, trigger=own and not compare if text is None else text)


# --- what a command sets


def _number(command: str, text: str, least: float, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ParamsError(f"/{command}: a{' whole' if whole else ''} number from {least} is expected, got {text!r}")
    return value


def _switch(command: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise ParamsError(f"/{command}: on or off is expected, got {text!r}")
    return text == "on"


def _trigger(text: str) -> bool | str:
    if not text:
        raise ParamsError("/trigger: on, off or a text is expected")
    return {"on": True, "off": False}.get(text, text)


_SETTERS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "use": lambda text: {"run": text},
    "trigger": lambda text: {"trigger": _trigger(text)},
    "place": lambda text: {"placement": text or None},
    "probs": lambda text: {"top": _number("probs", text, 0, whole=True)},
    "tokens": lambda text: {"tokens": _number("tokens", text, 1, whole=True)},
    "sample": lambda text: {"temperature": _number("sample", text, 0, whole=False)},
    "guard": lambda text: {"guard": None if text in ("", "off") else text},
    "raw": lambda text: {"raw": _switch("raw", text)},
}
