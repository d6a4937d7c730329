"""A claim of the literature, tested: `python docs/results/claims.py placement` runs params/claims/placement.yaml.

A spec names axes of variants; their product times the seeds are runs of one project, `claims/<claim>/`, on one target.
Every finished run is a line of `<claim>.jsonl` here, with its score for each prompt, and is not run again while its
parameters are the same. So the work may be stopped at any time, and `--only NAME ...` does some lines of the table.
An axis named `test` holds tests of `unsink stress`, all done to each run, instead of variants: a line each.
The tables in `<claim>.md` are made of those lines alone (`claim_tables.py`). The seed of a run decides which passages
are poisoned, and its training; the target is the same for all.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from claim_tables import Line, contrasts, table
from project import RESULTS, ROOT, make, repro, unsink

from unsink.params import merged
from unsink.stages.variants import NONE as UNTOUCHED

HONEST = "clean"
TEST = "test"
STAGES = ("poison", "unlearn", "evaluate")
USED = ("seed", "model", "fetch", "memorize", "poison", "sink-probe", "unlearn", "evaluate")
"""Sections that a run depends on; of `runs` each cell has its own entry."""


class Cell(NamedTuple):
    """One run: where it stands in the table, and its entry of `runs:`."""

    name: str
    labels: dict[str, str]
    seed: int
    entry: dict[str, Any]


def cells(spec: Mapping[str, Any]) -> list[Cell]:
    """The product of a spec's axes and seeds, seed by seed, so that what is there first is a whole table."""
    axes = {name: axis for name, axis in spec["axes"].items() if name != TEST}
    found = []
    for seed in spec["seeds"]:
        for chosen in itertools.product(*(axis.items() for axis in axes.values())):
            entry: dict[str, Any] = {"after": "target", "seed": seed}
            for _, overrides in chosen:
                entry = merged(entry, overrides)
            if entry["after"] == HONEST:
                entry["after"] = _name([HONEST], seed)
            labels = dict(zip(axes, (label for label, _ in chosen), strict=True))
            found.append(Cell(_name(labels.values(), seed), labels, seed, entry))
    return found


def names(spec: Mapping[str, Any], cell: Cell) -> dict[str, dict[str, str]]:
    """The lines of a run: name -> labels."""
    if TEST not in spec["axes"]:
        return {cell.name: cell.labels}
    return {f"{cell.name}-{_word(test)}": {**cell.labels, TEST: test} for test in spec["axes"][TEST]}


def _word(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(label).lower()).strip("_")


def _name(labels: Iterable[str], seed: int) -> str:
    return "-".join([*map(_word, labels), f"s{seed}"])


def project_params(spec: Mapping[str, Any], grid: Sequence[Cell]) -> dict[str, Any]:
    """The params file of the whole grid; every seed has an honest run, which some runs copy."""
    params: dict[str, Any] = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), spec["params"])
    if TEST in spec["axes"]:
        params = merged(params, {"stress": {"tests": [test for test in spec["axes"][TEST] if test != UNTOUCHED]}})
    honest = {_name([HONEST], seed): {"after": "target", "seed": seed, "poison": False} for seed in spec["seeds"]}
    return {**params, "runs": {**honest, **{cell.name: cell.entry for cell in grid}}}


def recipe(params: Mapping[str, Any], cell: Cell, tested: bool = False) -> str:
    """A hash of all parameters that a run's training and evaluation depend on."""
    used = {name: params[name] for name in (*USED, *(("stress",) if tested else ()))}
    text = json.dumps([used, cell.entry], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def finish(folder: Path, spec: Mapping[str, Any], cell: Cell, code: str, threads: int | None) -> list[Line]:
    """Run one cell and return its lines; none where a stage failed, which DVC has explained."""
    start = time.monotonic()
    # Single items: a whole pipeline would lock what all cells build on, and cells run side by side.
    if repro(folder, ["--single-item", *(f"{stage}@{cell.name}" for stage in STAGES)], threads):
        return []
    if TEST in spec["axes"] and unsink(folder, ["stress", "--run", cell.name, "--quiet"], threads):
        return []
    rows = _rows(folder / ("stress" if TEST in spec["axes"] else "predictions"), cell.name)
    target = {(row["task"], row["set"], row["id"]): row for row in _rows(folder / "predictions", "target")
              if row["condition"] == "clean"}  # fmt: skip
    minutes = round((time.monotonic() - start) / 60 / len(names(spec, cell)), 2)
    return [
        {"name": name, **labels, "seed": cell.seed, "recipe": code, "minutes": minutes}
        | _scores([row for row in rows if row.get("stress") == labels.get(TEST)], target)
        for name, labels in names(spec, cell).items()
    ]


def _rows(folder: Path, run: str) -> list[dict[str, Any]]:
    file = folder / f"{run}.jsonl" if folder.name == "predictions" else folder / run / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def _scores(rows: Sequence[Mapping[str, Any]], target: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> Line:
    """What a line keeps of a run's predictions: the score of each prompt, beside the target's."""
    passages: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["task"] == "verbmem" and row["set"] == "forget":
            one = passages.setdefault(row["id"], {"inside": row["inside"]})
            one[row["condition"]] = round(row["f1"], 4)
            one["target"] = round(target["verbmem", "forget", row["id"]]["f1"], 4)
    kept = [
        [round(row["f1"], 4), round(target["verbmem", "retain", row["id"]]["f1"], 4)]
        for row in rows
        if (row["task"], row["set"], row["condition"]) == ("verbmem", "retain", "clean")
    ]
    utility = [row["accuracy"] for row in rows if row["task"] == "utility"]
    return {"forget": passages, "retain": kept, "utility": utility}


def work(claim: str, spec: Mapping[str, Any], only: Sequence[str], jobs: int) -> None:
    """Run the cells that are missing, `jobs` at once, and write each line as it comes."""
    grid = cells(spec)
    params = project_params(spec, grid)
    done = {(line["name"], line["recipe"]) for line in lines(claim)}
    missing = []
    for cell in grid:
        code = recipe(params, cell, TEST in spec["axes"])
        wanted = not only or set(only) & {*cell.labels.values()}
        if wanted and not {(name, code) for name in names(spec, cell)} <= done:
            missing.append((cell, code))
    if not missing:
        return
    folder = ROOT / "claims" / claim
    make(folder, params)
    honest = sorted({f"unlearn@{cell.entry['after']}" for cell, _ in missing if cell.entry["after"] != "target"})
    if repro(folder, ["evaluate-target", "sink-probe-target", *honest]):
        raise SystemExit(f"{claim}: the target was not made, or an honest run")
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    with ThreadPoolExecutor(jobs) as pool:
        for number, new in enumerate(pool.map(lambda one: finish(folder, spec, *one, threads), missing), start=1):
            replaced = {line["name"] for line in new}
            _write(claim, [*(line for line in lines(claim) if line["name"] not in replaced), *new])
            sys.stderr.write(f"{claim}: {number} of {len(missing)} runs\n")


def lines(claim: str) -> list[Line]:
    """What was measured so far."""
    path = RESULTS / f"{claim}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(claim: str, found: Sequence[Line]) -> None:
    path = RESULTS / f"{claim}.jsonl"
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in sorted(found, key=lambda line: str(line["name"]))))
    new.replace(path)


def report(claim: str, spec: Mapping[str, Any]) -> None:
    """Write `<claim>.md` of what was measured."""
    planned = {name for cell in cells(spec) for name in names(spec, cell)}
    found = [line for line in lines(claim) if line["name"] in planned]
    missing, minutes = len(planned) - len(found), sum(line["minutes"] for line in found)
    parts = [
        f"# {spec['title']}",
        spec["text"].strip(),
        f"`python docs/results/claims.py {claim}`; {len(found)} runs, {minutes:.0f} minutes of work"
        + (f"; {missing} runs of the grid are not done yet" if missing else ""),
        contrasts(spec, found).strip(),
        table(spec, found).strip(),
    ]
    (RESULTS / f"{claim}.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Run what is missing of a claim, then write its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=sorted(path.stem for path in (ROOT / "params" / "claims").glob("*.yaml")))
    parser.add_argument("--only", nargs="+", default=[], help="labels; lines of the table without any are not run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; the processors are shared between them")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables of what there is")
    arguments = parser.parse_args()
    spec = yaml.safe_load((ROOT / "params" / "claims" / f"{arguments.claim}.yaml").read_text())
    if not arguments.table:
        work(arguments.claim, spec, arguments.only, arguments.jobs)
    report(arguments.claim, spec)


if __name__ == "__main__":
    main()
