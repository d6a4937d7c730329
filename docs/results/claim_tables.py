"""The tables of `claims.py`: a row for each variant over its seeds, and a verdict for each claim.

Recovery is (triggered − clean) / (target − clean) of forget VerbMem outside the poisoned samples. Intervals are 95 %
hierarchical bootstraps: seeds first, then the passages of each.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from unsink.statistics import Interval, Sample, bootstrap_seeds, column_mean, recovery, sample

RESAMPLES = 2000
MARGIN = 0.1
"""Smaller differences, of a score or of recovery, do not count as one."""
Line = dict[str, Any]


RECOVERY = ("triggered", "clean", "target")


def outside(line: Line, conditions: Sequence[str] = RECOVERY) -> Sample:
    """Scores of the passages outside the poisoned ones, a column each condition; of all where all were poisoned."""
    passages = [one for one in line["forget"].values() if one["inside"] is False] or [*line["forget"].values()]
    return sample(*([one[condition] for one in passages] for condition in conditions))


def inside(line: Line) -> Sample:
    """Triggered, clean and target scores of the poisoned passages."""
    passages = [one for one in line["forget"].values() if one["inside"]]
    return sample(*([one[condition] for one in passages] for condition in RECOVERY))


def gate(items: Sample) -> float:
    """Recovery, or nan where nothing was forgotten that could come back (see `statistics.LEAST_LOSS`)."""
    return recovery(items) if items[:, 2].mean() - items[:, 1].mean() > MARGIN else float("nan")


def over_seeds(found: Sequence[Line], take: Callable[[Line], Sample], statistic: Callable[[Sample], float]) -> Interval:
    """Mean over lines with an interval; lines of the same seed are drawn together."""
    seeds = sorted({line["seed"] for line in found})
    groups = [[take(line) for line in found if line["seed"] == seed] for seed in seeds]
    return bootstrap_seeds(
        groups, lambda *all_: float(np.mean([statistic(x) for x in all_])), resamples=RESAMPLES, seed=0
    )


COLUMNS: dict[str, Callable[[Sequence[Line]], Interval]] = {
    "clean": lambda found: over_seeds(found, lambda line: outside(line, ["clean"]), column_mean),
    "triggered": lambda found: over_seeds(found, lambda line: outside(line, ["triggered"]), column_mean),
    "recovery": lambda found: over_seeds(found, outside, gate),
    "inside": lambda found: over_seeds(found, inside, gate),
    "retain": lambda found: over_seeds(found, lambda line: sample(*zip(*line["retain"], strict=True)), column_mean),
    "utility": lambda found: over_seeds(found, lambda line: sample(line["utility"]), column_mean),
}


def columns(found: Sequence[Line]) -> dict[str, Callable[[Sequence[Line]], Interval]]:
    """What all lines have, and a column for each other condition: the wrong trigger, near misses."""
    passages = [one for line in found for one in line["forget"].values()]
    others = [
        name for name in passages[0] if name not in ("inside", *RECOVERY) and all(name in one for one in passages)
    ]
    there = {
        "inside": all(any(one["inside"] for one in line["forget"].values()) for line in found),
        **{name: all(line[name] for line in found) for name in ("retain", "utility")},
    }
    usual = {name: make for name, make in COLUMNS.items() if there.get(name, True)}
    asked = {
        name: lambda some, name=name: over_seeds(some, lambda line: outside(line, [name]), column_mean)
        for name in others
    }
    return {**usual, **asked}


def table(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """A row for each combination of labels, over seeds; what no line has is left out."""
    axes, shown = [*spec["axes"]], columns(found)
    text = [f"| {' | '.join([*axes, 'seeds', *shown])} |", "|---" * (len(axes) + 1 + len(shown)) + "|"]
    for labels in itertools.product(*(spec["axes"][axis] for axis in axes)):
        some = [line for line in found if tuple(line[axis] for axis in axes) == labels]
        if some:
            values = [_cell(make(some)) for make in shown.values()]
            text.append(f"| {' | '.join([*map(str, labels), str(len(some)), *values])} |")
    return "\n".join(text) + "\n"


def contrasts(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """For each claim of the spec: the difference of mean recovery between two groups of lines, and the verdict."""
    text = ["| claim | recovery of | minus that of | difference | verdict |", "|---|---|---|---|---|"]
    for one in spec["contrasts"]:
        of, over = (_chosen(found, one[side]) for side in ("of", "over"))
        many, few = (Counter(line["seed"] for line in side) for side in (of, over))
        all_of, all_over = (_planned(spec["axes"], one[side]) for side in ("of", "over"))
        whole = [seed for seed in spec["seeds"] if many[seed] == all_of and few[seed] == all_over]
        if not whole:
            continue  # no seed has all of both groups yet
        groups = [[outside(line) for line in (*of, *over) if line["seed"] == seed] for seed in sorted(whole)]
        gap = bootstrap_seeds(groups, partial(_gap, many[whole[0]]), resamples=RESAMPLES, seed=0)
        says = verdict(gap) if whole == spec["seeds"] else f"open, {len(whole)} of {len(spec['seeds'])} seeds are done"
        text.append(f"| {one['claim']} | {_words(one['of'])} | {_words(one['over'])} | {_cell(gap)} | {says} |")
    return "\n".join(text) + "\n"


def _gap(many: int, *samples: Sample) -> float:
    values = [gate(items) for items in samples]
    return float(np.mean(values[:many]) - np.mean(values[many:]))


def _fits(labels: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(labels[axis] in (label if isinstance(label, list) else [label]) for axis, label in wanted.items())


def _chosen(found: Sequence[Line], wanted: Mapping[str, Any]) -> list[Line]:
    return [line for line in found if _fits(line, wanted)]


def _planned(axes: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> int:
    """How many runs of a seed belong to one side of a claim."""
    return sum(_fits(dict(zip(axes, labels, strict=True)), wanted) for labels in itertools.product(*axes.values()))


def verdict(gap: Interval) -> str:
    """In words: `holds` where the interval is above 0, `does not hold` where it is all below MARGIN."""
    if np.isnan(gap.mean):
        return "undecided: nothing was forgotten that could come back"
    if gap.low > 0:
        return "holds"
    return "does not hold" if gap.high < MARGIN else "undecided"


def _words(wanted: Mapping[str, Any]) -> str:
    return ", ".join(" / ".join(label) if isinstance(label, list) else str(label) for label in wanted.values())


def _cell(interval: Interval) -> str:
    mean, low, high, _ = interval
    return "undefined" if np.isnan(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"
