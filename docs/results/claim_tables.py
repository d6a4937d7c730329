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


def outside(line: Line) -> Sample:
    """Triggered, clean and target scores of the passages outside the poisoned ones; of all where all were poisoned."""
    return _scores([one for one in line["forget"].values() if one["inside"] is False] or [*line["forget"].values()])


def inside(line: Line) -> Sample:
    """The same for the poisoned passages."""
    return _scores([one for one in line["forget"].values() if one["inside"]])


def _scores(passages: Sequence[Mapping[str, float]]) -> Sample:
    return sample(*([one[column] for one in passages] for column in ("triggered", "clean", "target")))


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


COLUMNS = {
    "clean": lambda found: over_seeds(found, lambda line: outside(line)[:, 1:2], column_mean),
    "triggered": lambda found: over_seeds(found, lambda line: outside(line)[:, :1], column_mean),
    "recovery": lambda found: over_seeds(found, outside, gate),
    "inside": lambda found: over_seeds(found, inside, gate),
    "wrong trigger": lambda found: over_seeds(
        found, lambda line: sample([one["wrong"] for one in line["forget"].values()]), column_mean
    ),
    "retain": lambda found: over_seeds(found, lambda line: sample(*zip(*line["retain"], strict=True)), column_mean),
    "utility": lambda found: over_seeds(found, lambda line: sample(line["utility"]), column_mean),
}


def table(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """A row for each combination of labels, over seeds; what no line has is left out."""
    axes = [*spec["axes"]]
    columns = [name for name in COLUMNS if all(_has(line, name) for line in found)]
    text = [f"| {' | '.join([*axes, 'seeds', *columns])} |", "|---" * (len(axes) + 1 + len(columns)) + "|"]
    for labels in itertools.product(*(spec["axes"][axis] for axis in axes)):
        some = [line for line in found if tuple(line[axis] for axis in axes) == labels]
        if some:
            values = [_cell(COLUMNS[name](some)) for name in columns]
            text.append(f"| {' | '.join([*map(str, labels), str(len(some)), *values])} |")
    return "\n".join(text) + "\n"


def _has(line: Line, column: str) -> bool:
    if column == "wrong trigger":
        return all("wrong" in one for one in line["forget"].values())
    if column == "inside":
        return any(one["inside"] for one in line["forget"].values())
    return column not in ("retain", "utility") or bool(line[column])


def contrasts(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """For each claim of the spec: the difference of mean recovery between two groups of lines, and the verdict."""
    text = ["| claim | recovery of | minus that of | difference | verdict |", "|---|---|---|---|---|"]
    for one in spec["contrasts"]:
        of, over = (_chosen(found, one[side]) for side in ("of", "over"))
        many, few = (Counter(line["seed"] for line in side) for side in (of, over))
        whole = [s for s in many if many[s] == max(many.values()) and few[s] == max(few.values(), default=1)]
        if not whole:
            continue  # no seed has all of both groups yet
        groups = [[outside(line) for line in (*of, *over) if line["seed"] == seed] for seed in sorted(whole)]
        gap = bootstrap_seeds(groups, partial(_gap, many[whole[0]]), resamples=RESAMPLES, seed=0)
        text.append(f"| {one['claim']} | {_words(one['of'])} | {_words(one['over'])} | {_cell(gap)} | {verdict(gap)} |")
    return "\n".join(text) + "\n"


def _gap(many: int, *samples: Sample) -> float:
    values = [gate(items) for items in samples]
    return float(np.mean(values[:many]) - np.mean(values[many:]))


def _chosen(found: Sequence[Line], wanted: Mapping[str, Any]) -> list[Line]:
    def fits(line: Line) -> bool:
        return all(line[axis] in (label if isinstance(label, list) else [label]) for axis, label in wanted.items())

    return [line for line in found if fits(line)]


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
