"""The commands that the documentation shows, and whether they are understood."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import typer

from unsink.cli import app
from unsink.params import load_params

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = ("long", "setup", "example", "needs: gpu", "needs: hub")
"""What may stand above a block that is not run: its commands are parsed only."""
TOOLS = ("unsink", "dvc", "make", "python docs/")
"""What is parsed. Anything else is the shell's, and needs a mark."""

_BLOCK = re.compile(r"^( *)(?:<!-- ([^>]*) -->\n\1)?```sh\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:unsink|dvc|make) [^`]+)`")
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]


class Block(NamedTuple):
    """A fenced `sh` block: its page, the mark above it or "", and its lines."""

    page: str
    mark: str
    lines: list[str]


def blocks() -> list[Block]:
    """All of them, in the order of the pages."""
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            mark or "",
            [line.strip() for line in text.replace("\\\n", " ").splitlines()],
        )
        for page in PAGES
        for _, mark, text in _BLOCK.findall(page.read_text())
    ]


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without what the shell does with its input and output."""
    for command in re.split(r" && ", line):
        words = [word for word in shlex.split(command, comments=True) if not word.startswith("$")]
        ends = [words.index(sign) for sign in ("<", ">", ">>", "|") if sign in words]
        if words:
            yield words[: min(ends, default=len(words))]


def inline() -> list[tuple[str, str]]:
    """Page and text of the commands that stand in a sentence."""
    return [
        (page.relative_to(ROOT).as_posix(), text.replace("\n", " "))
        for page in PAGES
        for text in _INLINE.findall(_FENCED.sub("", page.read_text()))
    ]


def parse(words: list[str]) -> None:
    """Have the tool read its command line; nothing is run.

    Raises:
        Exception: the tool would not understand it: an unknown command, option, key or file.
    """
    if words[0] == "unsink":
        _unsink(words[1:])
    elif words[0] == "dvc" and words[1:] in (["exp"], ["metrics"], ["plots"], ["queue"]):
        return  # the name of a group of commands, not a call
    elif words[0] == "dvc":
        from dvc.cli.parser import get_main_parser

        get_main_parser().parse_args(words[1:])  # type: ignore[no-untyped-call]
        overrides = [value for flag, value in pairwise(words) if flag == "-S"]
        load_params(ROOT / "params.yaml", overrides)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    else:
        assert words[0] == "python", f"{words[0]} is none of {TOOLS}"
        assert (ROOT / words[1]).is_file(), words[1]


def _unsink(words: list[str]) -> None:
    if words[0].startswith("-"):
        assert words[0] in {"--help", *(name for option in GROUP.params for name in option.opts)}
        return
    command = COMMANDS.get(words[0])
    assert command, f"there is no `unsink {words[0]}`"
    if not words[1:]:
        return  # the name of a command, not a call
    context = command.make_context(words[0], words[1:])
    if overrides := context.params.get("overrides"):
        given = context.params.get("params")
        there = given and (ROOT / given).is_file()
        load_params(ROOT / given if there else ROOT / "params.yaml", overrides)
