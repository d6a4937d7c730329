"""A claim of the literature, tested: `python docs/results/claims.py placement` runs params/claims/placement.yaml.

A spec names axes of variants; their product times the seeds are runs of one project, `claims/<claim>/`, on one target.
Every finished run is a line of `<claim>.jsonl` here, with its score for each prompt, and is not run again while its
parameters are the same, not for another claim's table either. So the work may be stopped at any time, and
`--only NAME ...` does some lines of the table.
An axis named `test` holds tests of `unsink stress`, all done to each run, instead of variants: a line each.
The tables in `<claim>.md` and the figure beside them are made of those lines alone (`claim_tables.py`,
`claim_figures.py`). The seed of a run decides which passages are poisoned, and its training; the target is the same for
all.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from claim_figures import figure
from claim_tables import HEAD, MARGIN, compared, contrasts, table
from grid import (
    EVALUATION,
    HONEST,
    TEST,
    Cell,
    Line,
    by_device,
    cells,
    device,
    lines,
    missing,
    name,
    names,
    recipe,
    resolved,
    threads_each,
    write,
)
from grid import work as grid_work
from project import RESULTS, ROOT, make, repro, unsink

from unsink import figures
from unsink.params import merged
from unsink.stages.variants import NONE as UNTOUCHED

SPECS = ROOT / "params" / "claims"
STAGES = ("poison", "unlearn", "evaluate")
_VERDICTS = f"""\
Differences of recovery, outside the poisoned samples, with 95 % intervals: bootstraps of seeds and of passages, the
same passages for all runs. A claim *holds* where the interval is above 0, and *does not hold* where it is all below
{MARGIN}; else it is undecided. The head of `claims.py` says how they are measured; the page of each has its command,
its runs and their wall time."""


def tests_of(spec: Mapping[str, Any]) -> list[str]:
    """The tests of `unsink stress` that a claim asks for."""
    return list(spec["axes"].get(TEST, ()))


def project_params(spec: Mapping[str, Any], grid: Sequence[Cell]) -> dict[str, Any]:
    """The params file of the whole grid; every seed has an honest run, which some runs copy."""
    params: dict[str, Any] = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), spec["params"])
    if tests := tests_of(spec):
        params = merged(params, {"stress": {"tests": [test for test in tests if test != UNTOUCHED]}})
    honest = {name([HONEST], seed): {"after": "target", "seed": seed, "poison": False} for seed in spec["seeds"]}
    return {**params, "runs": {**honest, **{cell.name: cell.entry for cell in grid}}}


def recipes(spec: Mapping[str, Any], params: Mapping[str, Any], grid: Sequence[Cell]) -> dict[str, str]:
    """Run -> hash of all that its lines depend on."""
    used = (*EVALUATION, "stress") if tests_of(spec) else EVALUATION
    return {cell.name: recipe(params, cell, used) for cell in grid}


def finish(folder: Path, cell: Cell, tests: Sequence[str], code: str, place: str, threads: int) -> list[Line]:
    """Run one cell and return its lines; none where a stage failed, which has explained why."""
    start = time.monotonic()
    # Single items: a whole pipeline would lock what all cells build on, and cells run side by side.
    if repro(folder, ["--single-item", *(f"{stage}@{cell.name}" for stage in STAGES)], threads):
        return []
    if tests and unsink(folder, ["stress", "--run", cell.name, "--quiet"], threads):
        return []
    rows = _rows(folder / ("stress" if tests else "predictions"), cell.name)
    known = _rows(folder / "predictions", "target")
    target = {(row["task"], row["set"], row["id"]): row for row in known if row["condition"] == "clean"}
    statistics = json.loads((folder / "probes" / "target" / "statistics.json").read_text())
    stood = stands([row for row in rows if row["task"] == "verbmem"], statistics["clean"]["alpha_by_position"])
    own = names(cell, tests)
    minutes = round((time.monotonic() - start) / 60 / len(own), 2)
    return [
        {"name": line, **labels, "seed": cell.seed, "recipe": code, "minutes": minutes, "device": place, **stood}
        | _scores([row for row in rows if row.get("stress") == labels.get(TEST)], target)
        for line, labels in own.items()
    ]


def stands(rows: Sequence[Mapping[str, Any]], attention: Sequence[float]) -> Line:
    """Where the trigger stands in the prompts, and how strong the sink is that the target has there without it.

    Args:
        rows: predictions.
        attention: of each position, from `sink-probe`: the mean attention that later tokens pay to it.

    Returns:
        `position` of the trigger's first token, BOS = 0, and `attention` to its tokens' positions, means over the
        forget prompts; nothing where no prompt has a trigger. Positions behind those that were probed do not count.
    """
    spans = [row["trigger"] for row in rows if row["set"] == "forget" and row["condition"] == "triggered"]
    paid = [attention[start:stop] for start, stop in spans if attention[start:stop]]
    if not paid:
        return {}
    return {
        "position": round(fmean(start for start, _ in spans), 2),
        "attention": round(fmean(fmean(one) for one in paid), 6),
    }


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


def adopt(claim: str, todo: Sequence[Cell], params: Mapping[str, Any], codes: Mapping[str, str]) -> list[Cell]:
    """Take the lines of runs that another claim has made with the same parameters; return the cells without such."""
    made = [(resolved(theirs, cell), line) for theirs, cell, line in _made(claim)]
    new = []
    for cell in todo:
        mine = resolved(params, cell)
        same = next((line for theirs, line in made if theirs == mine), None)
        if same:
            new.append({**same, "name": cell.name, **cell.labels, "recipe": codes[cell.name]})
    replaced = {line["name"] for line in new}
    if new:
        write(path_of(claim), [*(line for line in lines(path_of(claim)) if line["name"] not in replaced), *new])
    return [cell for cell in todo if cell.name not in replaced]


def _made(claim: str) -> Iterator[tuple[dict[str, Any], Cell, Line]]:
    """Params, cell and line of each run that the other claims have made; those with tests say less of a run."""
    for path in sorted(SPECS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        if path.stem == claim or tests_of(spec):
            continue
        grid = cells(spec)
        params = project_params(spec, grid)
        codes, made = recipes(spec, params, grid), {line["name"]: line for line in lines(path_of(path.stem))}
        for cell in grid:
            if cell.name in made and made[cell.name]["recipe"] == codes[cell.name]:
                yield params, cell, {key: value for key, value in made[cell.name].items() if key not in cell.labels}


def work(claim: str, spec: Mapping[str, Any], only: Sequence[str], jobs: int) -> None:
    """Run the cells that are missing, `jobs` at once, and write their lines as they come."""
    grid, tests = cells(spec), tests_of(spec)
    params = project_params(spec, grid)
    codes = recipes(spec, params, grid)
    todo = missing(path_of(claim), grid, codes, only, tests)
    if not tests:
        todo = adopt(claim, todo, params, codes)
    if not todo:
        return
    folder = ROOT / "claims" / claim
    make(folder, params)
    honest = sorted({f"unlearn@{cell.entry['after']}" for cell in todo if cell.entry["after"] != "target"})
    if repro(folder, ["evaluate-target", "sink-probe-target", *honest]):
        raise SystemExit(f"{claim}: the target was not made, or an honest run")
    place, threads = device(params["model"]["device"]), threads_each(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        finishing = [pool.submit(finish, folder, cell, tests, codes[cell.name], place, threads) for cell in todo]
        grid_work(path_of(claim), finishing)


def path_of(claim: str) -> Path:
    """The lines of a claim."""
    return RESULTS / f"{claim}.jsonl"


def planned(spec: Mapping[str, Any]) -> set[str]:
    """The names of all lines that a claim is to have."""
    return {line for cell in cells(spec) for line in names(cell, tests_of(spec))}


def measured(claim: str, spec: Mapping[str, Any]) -> list[Line]:
    """The lines that a claim has of those that it is to have."""
    all_of = planned(spec)
    return [line for line in lines(path_of(claim)) if line["name"] in all_of]


def report(claim: str, spec: Mapping[str, Any]) -> None:
    """Write `<claim>.md` of what was measured; where that is nothing yet, there is no page."""
    all_of, found = planned(spec), measured(claim, spec)
    if not found:
        return
    left = len(all_of) - len(found)
    figures.save(figure(spec, found), RESULTS / "figures" / claim)
    parts = [
        f"# {spec['title']}",
        spec["text"].strip(),
        f"`python docs/results/claims.py {claim}`; {_work(found)}"
        + (f"; {left} runs of the grid are not done yet" if left else ""),
        f"![Recovery of each variant](figures/{claim}.svg)",
        contrasts(spec, found).strip(),
        table(spec, found).strip(),
    ]
    (RESULTS / f"{claim}.md").write_text("\n\n".join(parts) + "\n")


def _work(found: Sequence[Line]) -> str:
    parts = {place: (len(some), sum(line["minutes"] for line in some)) for place, some in by_device(found).items()}
    return ", ".join(
        f"{count} runs in {minutes:.0f} minutes of work ({place})" for place, (count, minutes) in parts.items()
    )


def overview() -> None:
    """Write `claims.md`: the verdicts on all claims, of what was measured."""
    parts = ["# Which claims hold on the default model", _VERDICTS]
    for path in sorted(SPECS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        rows = compared(spec, measured(path.stem, spec))
        parts.append(f"## {spec['title']}")
        if rows:
            parts += ["\n".join([*HEAD, *rows]), f"All runs: [{path.stem}.md]({path.stem}.md)."]
        else:
            parts.append(f"Not measured yet: `python docs/results/claims.py {path.stem}`.")
    (RESULTS / "claims.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Run what is missing of a claim, then write its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=sorted(path.stem for path in SPECS.glob("*.yaml")))
    parser.add_argument("--only", nargs="+", default=[], help="labels; lines of the table without any are not run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; the processors are shared between them")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables of what there is")
    arguments = parser.parse_args()
    spec = yaml.safe_load((SPECS / f"{arguments.claim}.yaml").read_text())
    if not arguments.table:
        work(arguments.claim, spec, arguments.only, arguments.jobs)
    report(arguments.claim, spec)
    overview()


if __name__ == "__main__":
    main()
