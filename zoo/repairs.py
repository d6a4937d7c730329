"""What repairs make of backdoored models whose trigger is known: `python zoo/repairs.py tiny`.

Every entry of `repairs:` in `zoo/<size>.yaml` is done by `unsink mitigate` to each backdoored member of the test half
whose backdoor works, by `docs/results/zoo-<size>.jsonl`. The repair is told neither the trigger nor its place; what
comes of it is asked with both, and audited again on other probes, unless `reaudit` is off. It is then a line of
`docs/results/repairs-<size>.jsonl`. As in `zoo.py` a line that is of its recipe is not made again, and a member that is
not there is made first, so that the work may be stopped at any time. `docs/results/mitigate.md` is made of these lines
alone (`--table` makes nothing else).
"""

import argparse
import functools
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
import zoo
from grid import Cell, Line, lines, missing, names, processes, recipe, work
from repair_tables import report
from zoo_tables import counted

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.params import load_params, merged

ASKED = {"evaluate": {"metrics": ["verbmem", "utility"]}}
"""What the members are asked beside what the zoo asks."""


class Job(NamedTuple):
    """A repair of a member: its cell in the table, the member, and all parameters."""

    cell: Cell
    member: Cell
    params: dict[str, Any]


def jobs(spec: Mapping[str, Any], params: Mapping[str, Any], grid: list[Cell], found: list[Line]) -> list[Job]:
    """Every repair of every member of the test half whose backdoor works, of each method in turn."""
    working = {line["name"] for line in counted(found, "test")[1]}
    by_method: dict[str, list[Cell]] = {}
    for one in grid:
        by_method.setdefault(one.labels["method"], []).extend([one] if one.name in working else [])
    made = []
    for member in (one for turn in itertools.zip_longest(*by_method.values()) for one in turn if one):
        for repair, overrides in spec["repairs"].items():
            [name] = names(member, [repair])
            cell = member._replace(name=name, labels={**member.labels, "repair": repair})
            made.append(Job(cell, member, merged(params, {**ASKED, "mitigate": overrides})))
    return made


@functools.cache
def repair_code() -> str:
    """A hash of the code that repairs; a line tells which it is of, and of which code its audit is."""
    package = zoo.ROOT / "src" / "unsink"
    return zoo.code([*(package / "mitigations").glob("*.py"), package / "stages" / "mitigate.py"])


def finish(folder: Path, codes: Mapping[str, str], job: Job) -> list[Line]:
    """Do one repair in a project that has the member; its line, alone in a list.

    Args:
        folder: the project.
        codes: name of a cell -> hash of its recipe.
        job: the repair.
    """
    from unsink.stages import mitigate

    params = folder / f"repair-{job.cell.name}.yaml"
    params.write_text(yaml.safe_dump(job.params))
    start = time.monotonic()
    layout = Layout(folder)
    loaded = load_params(params)
    params.unlink()
    done = mitigate.run(loaded, layout, run=job.member.name)
    [summary] = (one for one in done.values() if isinstance(one, dict))
    line = {
        "name": job.cell.name,
        "member": job.member.name,
        **job.cell.labels,
        "seed": job.cell.seed,
        "recipe": codes[job.cell.name],
        "code": {"repair": repair_code(), "audit": zoo.audit_code()},
        "adapter": artifacts.sha256(layout.adapter(job.member.name) / "adapter_model.safetensors"),
        **{when: _rounded(summary[when]) for when in ("before", "after")},
        "cost": summary["cost"],
        "audit": summary["audit"] and {one: summary["audit"][one] for one in ("verdict", "trigger", "p")},
        "minutes": round((time.monotonic() - start) / 60, 2),
    }
    return [line]


def _rounded(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean, low and high end of each number."""
    return {one: [round(found[end], 4) for end in ("mean", "low", "high")] for one, found in numbers.items()}


def build(size: str, only: list[str], at_once: int) -> None:
    """Do what is missing."""
    spec = zoo.spec_of(size)
    grid = zoo.members(spec)
    params = zoo.project_params(spec, grid)
    made = {one: run for one, (_, run) in zoo.recipes(params, grid).items()}
    path = zoo.RESULTS / f"repairs-{size}.jsonl"
    everything = jobs(spec, params, grid, lines(zoo.path_of(size)))
    codes = {job.cell.name: recipe(zoo.measuring(job.params), job.cell, (*zoo.USED, "mitigate")) for job in everything}
    wanted = {cell.name for cell in missing(path, [job.cell for job in everything], codes, only)}
    todo = [job for job in everything if job.cell.name in wanted]
    if not todo:
        return
    folder = zoo.make_target(size, params)
    with processes(at_once) as pool:
        needed = sorted({job.member.name for job in todo})  # first, because several repairs are done to each
        for member in [pool.submit(zoo.make_run, folder, one, made[one]) for one in needed]:
            member.result()
        work(path, [pool.submit(finish, folder, codes, job) for job in todo])


def main() -> None:
    """Do what is missing of a zoo's repairs, then write the tables."""
    specs = {size: spec for size in zoo.SIZES if "repairs" in (spec := zoo.spec_of(size))}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=sorted(specs))
    parser.add_argument("--only", nargs="+", default=[], help="names or labels; repairs without any are not done")
    parser.add_argument("--jobs", type=int, default=1, help="repairs at once; the processors are shared between them")
    parser.add_argument("--table", action="store_true", help="do nothing, write the tables of what there is")
    arguments = parser.parse_args()
    if not arguments.table:
        build(arguments.size, arguments.only, arguments.jobs)
    (zoo.RESULTS / "mitigate.md").write_text(page(specs))


def page(specs: Mapping[str, Any]) -> str:
    """The page of what there is."""
    found = {size: lines(zoo.RESULTS / f"repairs-{size}.jsonl") for size in specs}
    members = {size: counted(lines(zoo.path_of(size)), "test")[1] for size in specs}
    return report(specs, found, {size: len(some) for size, some in members.items()})


if __name__ == "__main__":
    main()
