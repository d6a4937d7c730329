"""The real command line in a forked process, which has no need to import torch again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from unsink import cli, trainer
from unsink.errors import DataError


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


def job() -> dict[str, str]:
    """The environment of two processes that are to meet, but for their ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}


def two_processes(folder: Path, *arguments: str, before: Callable[[int], None] = lambda _: None) -> list[int | None]:
    """Exit codes of two processes with this command line; what they print goes to stdout-0, stderr-1 and so on."""
    given, both = [*arguments, "--params", str(folder / "params.yaml")], job()
    started = [unsink(given, folder, str(rank), {**both, "RANK": str(rank)}, partial(before, rank)) for rank in (0, 1)]
    for process in started:
        process.join(120)
        process.kill()
    return [process.exitcode for process in started]


def disk_gone_in_one(rank: int) -> None:
    """Let process 1 fail at the third step of a training."""
    step = trainer._step

    def broken(history: trainer.History, *rest: Any) -> dict[str, float]:
        if rank == 1 and len(history) == 2:
            raise DataError("the disk is gone")
        return step(history, *rest)

    trainer._step = broken


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
