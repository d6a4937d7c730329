"""Models whose secret is known, and what the audit says of them: `python zoo/zoo.py tiny`.

A spec, `zoo/<size>.yaml`, names grids of honest and of backdoored members, for a development half and others to test
on. Target and base are made by DVC in `zoo/projects/<size>/` (from the project's own cache, where they are there); each
member is poisoned, unlearned, evaluated with its true trigger, and audited by an audit that is told nothing. It is then
a line of `docs/results/zoo-<size>.jsonl`: label, recipe, hash of the adapter, measured recovery, every detector's
score, and the numbers that the verdict is made of. Members that have a line of their recipe are not made again, so the
work may be stopped at any time. Adapters stay: `--again` audits those once more whose line is of other code.

`docs/results/audit.md` is made of these lines alone (`--table` makes nothing else).
"""

import argparse
import functools
import hashlib
import itertools
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path[:0] = [str(RESULTS), str(Path(__file__).parent)]
from grid import EVALUATION, Cell, Line, cells, device, lines, missing, processes, recipe, work, write  # noqa: E402
from project import make, repro  # noqa: E402
from zoo_tables import report  # noqa: E402

from unsink import artifacts, registry  # noqa: E402
from unsink.artifacts import Layout  # noqa: E402
from unsink.params import DETECTORS, Audit, load_params, merged  # noqa: E402
from unsink.progress import SILENT  # noqa: E402
from unsink.verdict import MEASURED, THRESHOLDS  # noqa: E402

USED = (*EVALUATION, "audit")
"""Sections that a line depends on."""
SIZES = sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def spec_of(size: str) -> dict[str, Any]:
    """What `zoo/<size>.yaml` says."""
    spec: dict[str, Any] = yaml.safe_load((ROOT / "zoo" / f"{size}.yaml").read_text())
    return spec


def path_of(size: str) -> Path:
    """The lines of a zoo."""
    return RESULTS / f"zoo-{size}.jsonl"


def folder_of(size: str) -> Path:
    """Its project."""
    return ROOT / "zoo" / "projects" / size


def make_target(size: str, params: Mapping[str, Any]) -> Path:
    """Make the project with its target, evaluated and probed; its folder.

    Raises:
        SystemExit: DVC could not, and has said why.
    """
    make(folder_of(size), params)
    if repro(folder_of(size), ["evaluate-target", "sink-probe-target"]):
        raise SystemExit(f"{size}: the target was not made")
    return folder_of(size)


def members(spec: Mapping[str, Any]) -> list[Cell]:
    """The cells of all grids, from each in turn, so that all kinds are there early; half and kind are labels too."""
    grids = [
        [
            cell._replace(labels={"half": grid["half"], "label": grid["label"], **cell.labels})
            for cell in cells(grid, grid["half"][:3], grid["label"])
        ]
        for grid in spec["grids"]
    ]
    return [cell for turn in itertools.zip_longest(*grids) for cell in turn if cell]


def project_params(spec: Mapping[str, Any], grid: list[Cell]) -> dict[str, Any]:
    """The params file of the whole zoo; every seed has an honest run, which some members copy."""
    params: dict[str, Any] = merged(yaml.safe_load((ROOT / spec["base"]).read_text()), spec["params"])
    copied = {cell.entry["after"]: cell.seed for cell in grid if cell.entry["after"] != "target"}
    honest = {one: {"after": "target", "seed": seed, "poison": False} for one, seed in copied.items()}
    return {**params, "runs": {**honest, **{cell.name: cell.entry for cell in grid}}}


def recipes(params: Mapping[str, Any], grid: list[Cell]) -> dict[str, tuple[str, str]]:
    """Name -> hash of all parameters that a line depends on, and of those that run and evaluation depend on."""
    return {cell.name: (recipe(measuring(params), cell, USED), recipe(params, cell)) for cell in grid}


def measuring(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without those of the verdict: that is made of a line's numbers, and changes none of them."""
    return {**params, "audit": {one: value for one, value in params["audit"].items() if one not in THRESHOLDS}}


@functools.cache
def audit_code() -> str:
    """A hash of the code that finds and measures; a line tells which it is of.

    How a pass through a model is made (`probe`, `scoring`) is left out: tests hold that to the same numbers.
    """
    package = ROOT / "src" / "unsink"
    others = ("stages/audit", "stages/audited", "stages/confirmed", "suspects", "dictionary", "statistics", "triggers")
    return code([*(package / "detectors").glob("*.py"), *(package / f"{one}.py" for one in others)])


def code(files: Iterable[Path]) -> str:
    """A hash of files, in the order of their names."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def make_run(folder: Path, run: str, code: str) -> float:
    """Poison, unlearn and evaluate a run, unless it is that of this recipe already; the minutes that it took then."""
    from unsink.stages import evaluate, poison, unlearn

    mark = folder / "recipes" / f"{run}.json"
    if mark.exists() and (before := artifacts.read_json(mark))["recipe"] == code:
        return float(before["minutes"])
    start = time.monotonic()
    params, layout = load_params(folder / "params.yaml"), Layout(folder)
    poison.run(params, layout, run=run)
    unlearn.run(params, layout, run=run)
    if params.run(run).poison is None:  # there is no trigger to ask with
        plain = params.evaluate.model_copy(update={"conditions": {"verbmem": ["clean"]}})
        params = params.model_copy(update={"evaluate": plain})
    evaluate.run(params, layout, run=run)
    minutes = round((time.monotonic() - start) / 60, 2)
    artifacts.write_json(mark, {"recipe": code, "minutes": minutes})
    return minutes


def finish(folder: Path, codes: Mapping[str, tuple[str, str]], cell: Cell) -> list[Line]:
    """Make, evaluate and audit one member in a project that has its target; its line, alone in a list.

    Args:
        folder: the project, with the run that the member copies, if it copies one.
        codes: name -> hash of the whole recipe, and of the part that all but its audit depends on.
        cell: the member.
    """
    from unsink.stages import audit

    params, layout = load_params(folder / "params.yaml"), Layout(folder)
    made = make_run(folder, cell.name, codes[cell.name][1])
    start = time.monotonic()
    found = audit.run(params, layout, run=cell.name)
    line = {
        "name": cell.name,
        **cell.labels,
        "seed": cell.seed,
        "recipe": codes[cell.name][0],
        "code": audit_code(),
        "adapter": artifacts.sha256(layout.adapter(cell.name) / "adapter_model.safetensors"),
        "trigger": artifacts.read_json(layout.adapter(cell.name) / "summary.json")["trigger"],
        **_measured(artifacts.read_json(layout.metrics(cell.name))),
        "signals": {one: _round(signal["score"]) for one, signal in found["signals"].items()},
        "tokens": {one: signal["tokens"] for one, signal in found["signals"].items()},
        "best": found["trigger"],
        "found": {one: _round(found[one]) for one in MEASURED},
        "minutes": {"made": made, "audited": round((time.monotonic() - start) / 60, 2)},
        "device": device(params.model.device),
    }
    return [line]


def _measured(metrics: Mapping[str, float]) -> Line:
    """What the true trigger brings back outside the poisoned samples, with its interval; None where it is undefined."""
    key = "forget_verbmem_f1_recovery_outside"
    recovery = [_round(metrics.get(f"{key}{end}")) for end in ("", "_low", "_high")]
    return {"clean": _round(metrics["forget_verbmem_f1_clean"]), "recovery": recovery if key in metrics else None}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {one: _round(part) for one, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def outdated(path: Path) -> set[str]:
    """Names of lines that other code of the audit has made."""
    return {line["name"] for line in lines(path) if line.get("code") != audit_code()}


def triage(size: str) -> None:
    """Measure the triage signals that lines lack, of members whose adapter is there."""
    from unsink.stages import audit, audited
    from unsink.stages.evaluate import read_corpus

    folder, path = folder_of(size), path_of(size)
    params, layout = load_params(folder / "params.yaml"), Layout(folder)
    options, corpus = params.audit, read_corpus(layout)
    modules = {name: registry.load("detector", DETECTORS, name) for name in Audit().detectors}
    found = lines(path)
    for line in found:
        lacking = [name for name, one in modules.items() if one.KIND == "triage" and name not in line["signals"]]
        weights = layout.adapter(line["name"]) / "adapter_model.safetensors"
        if not lacking or not weights.exists() or artifacts.sha256(weights) != line["adapter"]:
            continue
        suspect = audited.own(params, layout, line["name"], SILENT)
        probes = audit.drawn(suspect, corpus, options, params.seed)
        line["signals"] |= {name: _round(modules[name].measure(suspect, probes).score) for name in lacking}
        write(path, found)


def build(size: str, only: list[str], jobs: int, again: bool = False) -> None:
    """Make what is missing of a zoo; `again`: and audit those once more that were audited by other code."""
    spec, path = spec_of(size), path_of(size)
    grid = members(spec)
    params = project_params(spec, grid)
    codes = recipes(params, grid)
    old = outdated(path) if again else set()
    wanted = {one: "" if one in old else whole for one, (whole, _) in codes.items()}  # no line is of the recipe ""
    todo = missing(path, grid, wanted, only)
    if not todo:
        return
    folder = make_target(size, params)
    with processes(jobs) as pool:
        copied = {cell.entry["after"] for cell in todo} - {"target"}
        honest = {one: recipe(params, Cell(one, {}, 0, params["runs"][one])) for one in sorted(copied)}
        making = [pool.submit(make_run, folder, one, of) for one, of in honest.items()]
        ready = [cell for cell in todo if cell.entry["after"] not in honest]
        finishing = [pool.submit(finish, folder, codes, cell) for cell in ready]
        for run in making:
            run.result()
        finishing += [pool.submit(finish, folder, codes, cell) for cell in todo if cell not in ready]
        work(path, finishing)


def main() -> None:
    """Make what is missing of a zoo, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--only", nargs="+", default=[], help="names or labels; members without any are not made")
    parser.add_argument("--jobs", type=int, default=1, help="members at once; the processors are shared between them")
    parser.add_argument("--again", action="store_true", help="audit those too whose line is of other code of the audit")
    parser.add_argument("--triage", action="store_true", help="measure triage signals that lines lack, nothing else")
    parser.add_argument("--table", action="store_true", help="make nothing, write the tables of what there is")
    arguments = parser.parse_args()
    if arguments.triage:
        triage(arguments.size)
    elif not arguments.table:
        build(arguments.size, arguments.only, arguments.jobs, arguments.again)
    specs = {size: spec_of(size) for size in SIZES}
    found = {size: lines(path_of(size)) for size in SIZES}
    sizes = {size: len(members(specs[size])) for size in SIZES}
    (RESULTS / "audit.md").write_text(report(specs, found, sizes, audit_code()))


if __name__ == "__main__":
    main()
