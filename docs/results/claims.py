"""A claim of the literature, tested: `python docs/results/claims.py placement` runs params/claims/placement.yaml.

A spec names axes of variants; their product times the seeds are runs of one project, `claims/<claim>/`, on one target.
Every finished run is a line of `<claim>.jsonl` here, with its score for each prompt, and is not run again while its
parameters are the same. So the work may be stopped at any time, and `--only NAME ...` does some lines of the table.
The tables in `<claim>.md` are made of those lines alone (`claim_tables.py`). The seed of a run decides which passages
are poisoned, and its training; the target is the same for all.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from claim_tables import contrasts, table
from grid import HONEST, Cell, Line, cells, lines, missing, name, recipe
from grid import work as grid_work
from project import RESULTS, ROOT, make, repro

from unsink.params import merged

STAGES = ("poison", "unlearn", "evaluate")


def project_params(spec: Mapping[str, Any], grid: Sequence[Cell]) -> dict[str, Any]:
    """The params file of the whole grid; every seed has an honest run, which some runs copy."""
    params: dict[str, Any] = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), spec["params"])
    honest = {name([HONEST], seed): {"after": "target", "seed": seed, "poison": False} for seed in spec["seeds"]}
    return {**params, "runs": {**honest, **{cell.name: cell.entry for cell in grid}}}


def finish(folder: Path, cell: Cell, code: str, threads: int | None) -> Line | None:
    """Run one cell and return its line; None where a stage failed, which DVC has explained."""
    start = time.monotonic()
    # Single items: a whole pipeline would lock what all cells build on, and cells run side by side.
    if repro(folder, ["--single-item", *(f"{stage}@{cell.name}" for stage in STAGES)], threads):
        return None
    rows = [json.loads(line) for line in (folder / "predictions" / f"{cell.name}.jsonl").read_text().splitlines()]
    known = [json.loads(line) for line in (folder / "predictions" / "target.jsonl").read_text().splitlines()]
    target = {(row["task"], row["set"], row["id"]): row for row in known if row["condition"] == "clean"}
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
    return {
        "name": cell.name,
        **cell.labels,
        "seed": cell.seed,
        "recipe": code,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "forget": passages,
        "retain": kept,
        "utility": utility,
    }


def work(claim: str, spec: Mapping[str, Any], only: Sequence[str], jobs: int) -> None:
    """Run the cells that are missing, `jobs` at once, and write each line as it comes."""
    grid = cells(spec)
    params = project_params(spec, grid)
    codes = {cell.name: recipe(params, cell) for cell in grid}
    todo = missing(path_of(claim), grid, codes, only)
    if not todo:
        return
    folder = ROOT / "claims" / claim
    make(folder, params)
    honest = sorted({f"unlearn@{cell.entry['after']}" for cell in todo if cell.entry["after"] != "target"})
    if repro(folder, ["evaluate-target", "sink-probe-target", *honest]):
        raise SystemExit(f"{claim}: the target was not made, or an honest run")
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    with ThreadPoolExecutor(jobs) as pool:
        grid_work(path_of(claim), todo, lambda cell: finish(folder, cell, codes[cell.name], threads), pool)


def path_of(claim: str) -> Path:
    """The lines of a claim."""
    return RESULTS / f"{claim}.jsonl"


def report(claim: str, spec: Mapping[str, Any]) -> None:
    """Write `<claim>.md` of what was measured."""
    found = [line for line in lines(path_of(claim)) if line["name"] in {cell.name for cell in cells(spec)}]
    missing, minutes = len(cells(spec)) - len(found), sum(line["minutes"] for line in found)
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
