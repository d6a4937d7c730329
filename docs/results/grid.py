"""Grids of runs that can be stopped and resumed: what `claims.py` and `zoo/zoo.py` share.

A spec names axes of variants; their product times the seeds are cells, each an entry of `runs:` in one project on one
target. Every finished cell is a line of a JSONL file, and is not run again while its parameters are the same.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from unsink.params import merged

Line = dict[str, Any]
HONEST = "clean"
TEST = "test"
"""An axis of this name holds tests of `unsink stress`, all done to each run, instead of variants of it."""
TRAINING = ("seed", "model", "fetch", "memorize", "poison", "sink-probe", "unlearn")
"""Sections that an adapter depends on; of `runs` each cell has its own entry."""
EVALUATION = (*TRAINING, "evaluate")


class Cell(NamedTuple):
    """One run: where it stands in the table, and its entry of `runs:`."""

    name: str
    labels: dict[str, str]
    seed: int
    entry: dict[str, Any]


def cells(spec: Mapping[str, Any], *first: str) -> list[Cell]:
    """The product of a spec's axes and seeds, seed by seed, so that what is there first is a whole table.

    Args:
        spec: `axes` and `seeds`.
        first: words that all names begin with.
    """
    axes = {axis: variants for axis, variants in spec["axes"].items() if axis != TEST}
    found = []
    for seed in spec["seeds"]:
        for chosen in itertools.product(*(variants.items() for variants in axes.values())):
            entry: dict[str, Any] = {"after": "target", "seed": seed}
            for _, overrides in chosen:
                entry = merged(entry, overrides)
            if entry["after"] == HONEST:
                entry["after"] = name([HONEST], seed)
            labels = dict(zip(axes, (label for label, _ in chosen), strict=True))
            found.append(Cell(name([*first, *labels.values()], seed), labels, seed, entry))
    return found


def name(labels: Iterable[str], seed: int) -> str:
    """A run's name, of its labels and its seed."""
    return "-".join([*map(_word, labels), f"s{seed}"])


def _word(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(label).lower()).strip("_")


def names(cell: Cell, tests: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """The lines of a cell, one for each test where it has some: name -> labels."""
    return {f"{cell.name}-{_word(test)}": {**cell.labels, TEST: test} for test in tests} or {cell.name: cell.labels}


def recipe(params: Mapping[str, Any], cell: Cell, used: Sequence[str] = EVALUATION) -> str:
    """A hash of all parameters that a cell's lines depend on: its entry of `runs:`, and the sections `used`."""
    text = json.dumps([{section: params[section] for section in used}, cell.entry], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resolved(params: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """All parameters that a cell's lines depend on, its own in their places: the same for the same run in any grid."""
    poison = cell.entry.get("poison")
    own = {
        "poison": False if poison is False else merged(params["poison"], poison),
        "unlearn": merged(params["unlearn"], cell.entry.get("unlearn")),
        "run": [cell.entry["after"], cell.seed],
    }
    return {**{section: params[section] for section in EVALUATION}, **own}


def missing(
    path: Path, grid: Sequence[Cell], codes: Mapping[str, str], only: Sequence[str], tests: Iterable[str] = ()
) -> list[Cell]:
    """Cells that lack a line of their recipe; with `only` those that have one of these labels, or names."""
    done = {(line["name"], line["recipe"]) for line in lines(path)}
    chosen = [cell for cell in grid if not only or set(only) & {cell.name, *cell.labels.values()}]
    return [cell for cell in chosen if not {(one, codes[cell.name]) for one in names(cell, tests)} <= done]


def work(path: Path, finishing: Sequence[Future[Sequence[Line]]]) -> None:
    """Write the lines of each as soon as it has finished; one that failed has none.

    Raises:
        Exception: what the first that failed has raised, when the lines of all others are written.
    """
    errors = []
    for number, future in enumerate(as_completed(finishing), start=1):
        if error := future.exception():
            errors.append(error)
        new = [] if error else future.result()
        replaced = {line["name"] for line in new}
        write(path, [*(line for line in lines(path) if line["name"] not in replaced), *new])
        said = "" if new else f", the last one failed: {error or 'see above'}"
        sys.stderr.write(f"{path.stem}: {number} of {len(finishing)} runs{said}\n")
    if errors:
        raise errors[0]


def threads_each(jobs: int) -> int:
    """Processors for each of some jobs at once: of those that OMP_NUM_THREADS names, or of all."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // jobs)


def processes(jobs: int) -> ProcessPoolExecutor:
    """A pool of so many, among which the processors are shared; its processes end with this one, however that ends."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(threads_each(jobs),))


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)  # each process's own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Who is left over would hold locks and processors, and tell nobody what it finds.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def device(wanted: str) -> str:
    """Where the work is done, for `model.device`: the name of a GPU, or cpu."""
    import torch

    from unsink.models import pick_device

    kind = pick_device(wanted).type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def by_device(found: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines that were made on each."""
    parts: dict[str, list[Line]] = {}
    for line in found:
        parts.setdefault(line["device"], []).append(line)
    return dict(sorted(parts.items()))


def lines(path: Path) -> list[Line]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, found: Sequence[Line]) -> None:
    """Write lines in the order of their names, the whole file or nothing."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in sorted(found, key=lambda line: str(line["name"]))))
    new.replace(path)
