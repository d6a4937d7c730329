"""The real command line in a forked process, which has no need to import torch again."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from unsink import cli


def nothing() -> None:
    pass


def unsink(
    arguments: Sequence[str],
    output: Path,
    name: str = "0",
    environment: Mapping[str, str] = {},
    before: Callable[[], None] = nothing,
) -> BaseProcess:
    """Start `unsink <arguments>`; what it prints goes to the files `stdout-<name>` and `stderr-<name>` in `output`."""
    process = multiprocessing.get_context("fork").Process(
        target=_main, args=(arguments, output, name, environment, before)
    )
    process.start()
    return process


def _main(
    arguments: Sequence[str], output: Path, name: str, environment: Mapping[str, str], before: Callable[[], None]
) -> None:
    torch.set_num_threads(1)  # a forked process has lost the threads that the pool remembers
    os.environ |= environment
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / f"{stream}-{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    before()
    sys.argv = ["unsink", *arguments]
    cli.main()
