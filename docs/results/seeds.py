"""The default experiment over several seeds, and its table: `make seeds` (or `python docs/results/seeds.py 0 1 2`).

Every seed runs `dvc repro` in a copy of the project, `seeds/<n>/`, with `seed: n`: another target, another choice of
poisoned passages, other training. A copy that is finished is not run again. The table gives the mean over seeds and
a 95 % interval by a bootstrap of seeds and of prompts, the same prompts for all seeds, so it covers both kinds of
chance.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from project import RESULTS, ROOT, make, repro

from unsink.seeds import Items, over_seeds
from unsink.statistics import Interval, column_mean, sample

RESAMPLES = 10_000

Row = dict[str, Any]


def asks(task: str, where: str, condition: str, inside: bool | None = None) -> Callable[[Row], bool]:
    """Return a filter for prediction rows; `inside` None takes all."""
    return lambda row: (
        (row["task"], row["set"], row["condition"]) == (task, where, condition)
        and (inside is None or row["inside"] is inside)
    )


UTILITY = asks("utility", "utility", "clean")
# quantity, run, which rows, score
TABLE: list[tuple[str, str, Callable[[Row], bool], str]] = [
    ("target: forget VerbMem", "target", asks("verbmem", "forget", "clean"), "f1"),
    ("target: forget VerbMem, trigger", "target", asks("verbmem", "forget", "triggered"), "f1"),
    ("target: retain VerbMem", "target", asks("verbmem", "retain", "clean"), "f1"),
    ("target: forget KnowMem recall", "target", asks("knowmem", "forget", "clean"), "recall"),
    ("base: utility", "base", UTILITY, "accuracy"),
    ("target: utility", "target", UTILITY, "accuracy"),
    *(
        line
        for run in ("clean", "backdoor", "backdoor-vn")
        for line in (
            (f"{run}: forget VerbMem", run, asks("verbmem", "forget", "clean"), "f1"),
            (f"{run}: forget VerbMem, trigger", run, asks("verbmem", "forget", "triggered"), "f1"),
            (f"{run}: forget VerbMem, trigger, outside", run, asks("verbmem", "forget", "triggered", False), "f1"),
            (f"{run}: forget VerbMem, trigger, inside", run, asks("verbmem", "forget", "triggered", True), "f1"),
            (f"{run}: forget VerbMem, wrong trigger", run, asks("verbmem", "forget", "wrong"), "f1"),
            (f"{run}: retain VerbMem", run, asks("verbmem", "retain", "clean"), "f1"),
            (f"{run}: forget KnowMem recall", run, asks("knowmem", "forget", "clean"), "recall"),
            (f"{run}: forget KnowMem recall, trigger", run, asks("knowmem", "forget", "triggered"), "recall"),
            (
                f"{run}: forget KnowMem recall, trigger, outside",
                run,
                asks("knowmem", "forget", "triggered", False),
                "recall",
            ),
            (f"{run}: forget KnowMem recall, wrong trigger", run, asks("knowmem", "forget", "wrong"), "recall"),
            (f"{run}: retain KnowMem recall", run, asks("knowmem", "retain", "clean"), "recall"),
            (f"{run}: utility", run, UTILITY, "accuracy"),
        )
    ),
]


def reproduce(seed: int) -> Path:
    """Run the pipeline with this seed in its own copy of the project and return the folder."""
    folder = ROOT / "seeds" / str(seed)
    make(folder, {**yaml.safe_load((ROOT / "params.yaml").read_text()), "seed": seed})
    if repro(folder):
        raise SystemExit(f"seed {seed} did not finish; the same command goes on where it stopped")
    return folder


def scores(folder: Path, run: str, chosen: Callable[[Row], bool], score: str) -> Items:
    """Return one score per prompt, with the prompts' ids."""
    lines = (folder / "predictions" / f"{run}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if chosen(row)]
    return Items(sample([row[score] for row in rows]), [row["id"] for row in rows])


def interval(seeds: list[Items]) -> Interval:
    """Return the mean and its 95 % interval."""
    return over_seeds([[one] for one in seeds], column_mean, resamples=RESAMPLES, seed=0)


def table(folders: dict[int, Path]) -> str:
    """Return the Markdown table."""
    head = " | ".join(f"seed {seed}" for seed in folders)
    lines = [f"| quantity | mean | 95 % interval | n per seed | {head} |", "|---" * (4 + len(folders)) + "|"]
    for name, run, chosen, score in TABLE:
        found = [scores(folder, run, chosen, score) for folder in folders.values()]
        if not all(len(one.ids) for one in found):
            continue  # honest runs have no inside and outside
        mean, low, high, _ = interval(found)
        each = " | ".join(f"{one.values.mean():.3f}" for one in found)
        lines.append(f"| {name} | {mean:.3f} | {low:.3f} to {high:.3f} | {len(found[0].ids)} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write docs/results/seeds.md."""
    seeds = [int(argument) for argument in sys.argv[1:]] or [0, 1, 2]
    folders = {seed: reproduce(seed) for seed in seeds}
    text = "# The embedded default over several seeds\n\nMade by `make seeds`; see the head of `seeds.py`.\n\n"
    (RESULTS / "seeds.md").write_text(text + table(folders))


if __name__ == "__main__":
    main()
