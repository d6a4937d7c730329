r"""`make bench`: our speed and memory against the plain path of plain.py, in one run, and the page that says so.

    python benchmarks/performance.py              time per step, evaluation, memory: 20 minutes on two quiet cores
    python benchmarks/performance.py --growth     how they grow with forget set, length, batch and model size, too
    python benchmarks/performance.py --model 1.7b --dtype bfloat16 --device cuda --joined 4 --batch 12 \
        --out docs/results/gpu
    python benchmarks/performance.py --only npo "memory npo ours"      some parts: prints them, and writes no page;
                                                                       the next whole call need not measure them

Prints a table and writes docs/results/performance.json and performance.md. Each part runs in a process of its own. What
an interrupted call has measured is kept in .bench/ and not measured again; `--fresh` forgets it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from performance_page import DEFAULTS, page, table

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".bench"  # as in workload.py, which is not imported here: this process stays small
RESULTS = ROOT / "docs" / "results"

Numbers = dict[str, Any]
Part = tuple[str, str, Mapping[str, Any], tuple[Any, ...]]
"""Name, function of measures.py, fields of its workload, further arguments."""

QUICK: list[Part] = [
    ("gemm", "gemm", {}, ()),
    ("npo", "training", {"method": "npo", "steps": 10}, ()),
    ("rmu", "training", {"method": "rmu", "steps": 10}, ()),
    ("share npo", "share", {"method": "npo", "steps": 16}, ()),
    ("share rmu", "share", {"method": "rmu", "steps": 31}, ()),
    ("evaluation", "evaluation", {"passages": 50, "joined": 1, "steps": 1}, ()),
    *(
        (f"memory {what} {who}", "side", {"method": method, "steps": 2, **more}, (who, what))
        for what, method, more in (
            ("npo", "npo", {}),
            ("rmu", "rmu", {}),
            ("evaluation", "rmu", {"passages": 50, "joined": 1}),
        )
        for who in ("plain", "ours")
    ),
]
GROWTH: dict[str, list[Mapping[str, Any]]] = {
    "forget set": [{"passages": n} for n in (50, 100, 200)],
    "sequence length": [{"joined": n} for n in (1, 2, 4)],
    "batch": [{"batch": n} for n in (6, 12, 24)],
    "model size": [{"model": name} for name in ("embedded", "360m")],
}


EVALUATED = ("forget set", "model size")
"""What the evaluation grows with: how many prompts there are, and what one takes."""


def parts(growth: bool) -> list[Part]:
    """What is measured."""
    more = [*_growth("", "npo"), *_growth("rmu ", "rmu"), *_growth_of_evaluation()]
    return QUICK + (more if growth else [])


def _growth(label: str, method: str) -> Iterator[Part]:
    for axis, points in GROWTH.items():
        for point in points:
            for who in ("plain", "ours"):
                name = f"growth {label}{axis} {next(iter(point.values()))} {who}"
                yield name, "side", {"method": method, "steps": 3, **point}, (who, method)


def _growth_of_evaluation() -> Iterator[Part]:
    for axis in EVALUATED:
        for point in GROWTH[axis]:
            workload = {"passages": 50, "joined": 1, "steps": 1, **point}
            name = f"growth evaluation {axis} {next(iter(point.values()))}"
            yield name, "evaluation", workload, (1, 40)  # every fortieth prompt by the plain path


def main() -> int:
    """Measure, print, write."""
    options = _arguments()
    if options.part:
        return _measure_here(json.loads(options.part))
    common = {name: getattr(options, name) for name in DEFAULTS}
    key = json.dumps([common, options.threads, _revision()])
    if options.fresh or not (KEPT / "key").exists() or (KEPT / "key").read_text() != key:
        shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(exist_ok=True)
    (KEPT / "key").write_text(key)
    found: dict[str, Numbers] = {}
    same: dict[str, Numbers] = {}  # where curves of growth meet, one measurement serves them all
    chosen = [part for part in parts(growth=True) if part[0] in options.only] or parts(options.growth)
    for name, function, fields, arguments in chosen:
        file = KEPT / f"{name.replace(' ', '-')}.json"
        what = json.dumps([function, sorted({**common, **fields}.items()), arguments])
        if not file.exists() and what in same:
            file.write_text(json.dumps(same[what]), encoding="utf-8")
        if not file.exists():
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            text = _run(function, {**common, **fields}, arguments, options)
            if text is None:
                return 1
            file.with_suffix(".part").write_text(text, encoding="utf-8")
            file.with_suffix(".part").replace(file)
        found[name] = same[what] = json.loads(file.read_text(encoding="utf-8"))
    if options.only:
        print(json.dumps(found, indent=1, sort_keys=True))
        return 0
    result = {"machine": _machine(found["gemm"], options), "workload": common, "parts": found}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "performance.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (options.out / "performance.md").write_text(page(result), encoding="utf-8")
    shutil.rmtree(KEPT)
    print(table(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="measure growth, too: about an hour and a half more")
    parser.add_argument("--model", default=DEFAULTS["model"], help="model.source; default: embedded (SmolLM2)")
    parser.add_argument("--dtype", default=DEFAULTS["dtype"], help="auto | float32 | bfloat16")
    parser.add_argument("--device", default=DEFAULTS["device"], help="cpu | cuda")
    parser.add_argument(
        "--joined", type=int, default=DEFAULTS["joined"], help="passages of the corpus in one text of the training"
    )
    parser.add_argument("--batch", type=int, default=DEFAULTS["batch"], help="samples of each kind in a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page; default: docs/results")
    parser.add_argument("--fresh", action="store_true", help="measure again what an interrupted call has measured")
    names = [name for name, *_ in parts(growth=True)]
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, metavar="PART", help=", ".join(names[:4]) + " …"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def _revision() -> str:
    """Of the code, so that nothing is taken for measured that another code was measured on."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip()  # none where the project is no clone


def _run(
    function: str, workload: Mapping[str, Any], arguments: tuple[Any, ...], options: argparse.Namespace
) -> str | None:
    """Measure one part in a process of its own; None where it failed, which it then has said itself."""
    part = {"function": function, "workload": workload, "arguments": arguments}
    command = [sys.executable, __file__, "--part", json.dumps(part)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else None


def _measure_here(part: Numbers) -> int:
    import measures
    from workload import Workload, source

    fields = part["workload"]
    function: Callable[..., Numbers] = getattr(measures, part["function"])
    try:
        found = function(Workload(**{**fields, "model": source(fields["model"], fields["device"])}), *part["arguments"])
    except measures.DifferentNumbers as error:
        print(f"the plain path and ours differ: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def _machine(gemm: Numbers, options: argparse.Namespace) -> Numbers:
    return {
        "processor": platform.machine(),
        "cores": options.threads,
        "instructions": gemm["instructions"],
        "dtype": gemm["dtype"],
        "device": gemm.get("device", "cpu"),
    }


if __name__ == "__main__":
    sys.exit(main())
