"""The tables of `claims.py`: a row for each variant over its seeds, and a verdict for each claim.

Recovery is (triggered − clean) / (target − clean) of forget VerbMem outside the poisoned samples. Intervals are 95 %
bootstraps of seeds and of passages, the same passages for all lines: what is compared on them is paired.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from unsink import seeds
from unsink.seeds import Items
from unsink.statistics import Interval, Sample, column_mean, recovery, sample

RESAMPLES = 2000
MARGIN = 0.1
"""Smaller differences, of a score or of recovery, do not count as one."""
Line = dict[str, Any]
SIDES = ("of", "over")
CONDITION = "condition"
HEAD = ("| claim | recovery of | minus that of | runs | difference | verdict |", "|---|---|---|---|---|---|")
ASKED = ("retain", "utility")  # not of all lines
RECOVERY = ("triggered", "clean", "target")


def outside(line: Line, conditions: Sequence[str] = RECOVERY) -> Items:
    """Scores of the passages outside the poisoned ones, a column each condition; of all where all were poisoned."""
    passages = {name: one for name, one in line["forget"].items() if one["inside"] is False} or line["forget"]
    return _scores(passages, conditions)


def inside(line: Line) -> Items:
    """Triggered, clean and target scores of the poisoned passages."""
    return _scores({name: one for name, one in line["forget"].items() if one["inside"]}, RECOVERY)


def _scores(passages: Mapping[str, Mapping[str, float]], conditions: Sequence[str]) -> Items:
    return Items(sample(*([one[condition] for one in passages.values()] for condition in conditions)), [*passages])


def _numbered(*columns: Sequence[float]) -> Items:
    """Prompts without a name, which all lines have in the same order."""
    return Items(sample(*columns), [str(place) for place in range(len(columns[0]))])


def gate(items: Sample) -> float:
    """Recovery, or nan where nothing was forgotten that could come back (see `statistics.LEAST_LOSS`)."""
    return recovery(items) if items[:, 2].mean() - items[:, 1].mean() > MARGIN else float("nan")


def over_seeds(found: Sequence[Line], take: Callable[[Line], Items], statistic: Callable[[Sample], float]) -> Interval:
    """Mean over lines with an interval; lines of the same seed are drawn together."""
    groups = [
        [take(line) for line in found if line["seed"] == seed] for seed in sorted({line["seed"] for line in found})
    ]
    return seeds.over_seeds(
        groups, lambda *all_: float(np.mean([statistic(x) for x in all_])), resamples=RESAMPLES, seed=0
    )


COLUMNS: dict[str, Callable[[Sequence[Line]], Interval]] = {
    "clean": lambda found: over_seeds(found, lambda line: outside(line, ["clean"]), column_mean),
    "triggered": lambda found: over_seeds(found, lambda line: outside(line, ["triggered"]), column_mean),
    "recovery": lambda found: over_seeds(found, outside, gate),
    "inside": lambda found: over_seeds(found, inside, gate),
    "retain": lambda found: over_seeds(found, lambda line: _numbered(*zip(*line["retain"], strict=True)), column_mean),
    "utility": lambda found: over_seeds(found, lambda line: _numbered(line["utility"]), column_mean),
}


def columns(found: Sequence[Line]) -> dict[str, Callable[[Sequence[Line]], Interval]]:
    """What all lines have, and a column for each other condition: the wrong trigger, near misses."""
    passages = [one for line in found for one in line["forget"].values()]
    others = [
        name for name in passages[0] if name not in ("inside", *RECOVERY) and all(name in one for one in passages)
    ]
    poisoned = all(any(one["inside"] for one in line["forget"].values()) for line in found)
    usual = {
        name: make
        for name, make in COLUMNS.items()
        if any(_has(line, name) for line in found) and (poisoned or name != "inside")
    }
    conditions = {
        name: lambda some, name=name: over_seeds(some, lambda line: outside(line, [name]), column_mean)
        for name in others
    }
    return {**usual, **conditions}


def _has(line: Line, column: str) -> bool:
    """Whether a line has what a column is of: not all runs are asked about retain passages and utility."""
    return column not in ASKED or bool(line[column])


def table(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """A row for each combination of labels, over seeds; what no line has is left out."""
    axes, shown = [*spec["axes"]], columns(found)
    text = [f"| {' | '.join([*axes, 'seeds', *shown])} |", "|---" * (len(axes) + 1 + len(shown)) + "|"]
    for labels in itertools.product(*(spec["axes"][axis] for axis in axes)):
        some = [line for line in found if tuple(line[axis] for axis in axes) == labels]
        if some:
            values = [
                _cell(make(some)) if all(_has(line, name) for line in some) else "-" for name, make in shown.items()
            ]
            text.append(f"| {' | '.join([*map(str, labels), str(len(some)), *values])} |")
    return "\n".join(text) + "\n"


def contrasts(spec: Mapping[str, Any], found: Sequence[Line]) -> str:
    """For each claim of the spec: the difference of mean recovery between two groups of lines, and the verdict.

    Like is compared with like (see `like`), so a grid needs not be whole; but a verdict needs some lines of each seed.
    A side may name a `condition` to be asked in place of `triggered`, such as a near miss.
    """
    return "\n".join([*HEAD, *compared(spec, found)]) + "\n"


def compared(spec: Mapping[str, Any], found: Sequence[Line]) -> list[str]:
    """The rows of `contrasts`; claims of which nothing can be compared yet have none."""
    rows = []
    for one in spec["contrasts"]:
        of, over = ({axis: labels for axis, labels in one[side].items() if axis != CONDITION} for side in SIDES)
        blocks = like(spec, found, of, over)
        if not blocks:
            continue
        left, right = len(_combinations(of)), len(_combinations(over))
        names = [one[side].get(CONDITION, "triggered") for side in SIDES]
        asked = [names[0]] * left + [names[1]] * right
        groups = [
            [
                outside(line, (name, "clean", "target"))
                for block in some
                for line, name in zip(block, asked, strict=True)
            ]
            for some in blocks.values()
        ]
        gap = seeds.over_seeds(groups, partial(_gap, left, right), resamples=RESAMPLES, seed=0)
        count = sum(map(len, blocks.values()))
        whole = len(blocks) == len(spec["seeds"])
        says = verdict(gap) if whole else f"open, {len(blocks)} of {len(spec['seeds'])} seeds are done"
        cells = [one["claim"], _words(one["of"]), _words(one["over"]), f"{count * left} and {count * right}"]
        rows.append(f"| {' | '.join([*cells, _cell(gap), says])} |")
    return rows


def like(
    spec: Mapping[str, Any], found: Sequence[Line], of: Mapping[str, Any], over: Mapping[str, Any]
) -> dict[int, list[list[Line]]]:
    """Lines that differ only in what a claim compares.

    Args:
        spec: its axes and seeds.
        found: lines.
        of: axis -> label or labels of one side.
        over: the same axes, with the labels of the other side.

    Returns:
        Seed -> blocks of lines that agree in all other axes: those of one side, then those of the other. A block that
        lacks a line is left out.
    """
    known = {(line["seed"], *(line[axis] for axis in spec["axes"])): line for line in found}
    others = _combinations({axis: [*labels] for axis, labels in spec["axes"].items() if axis not in of})
    blocks: dict[int, list[list[Line]]] = {}
    for seed, other in itertools.product(spec["seeds"], others):
        wanted = [{**other, **labels} for labels in (*_combinations(of), *_combinations(over))]
        keys = [(seed, *(labels[axis] for axis in spec["axes"])) for labels in wanted]
        if all(key in known for key in keys):
            blocks.setdefault(seed, []).append([known[key] for key in keys])
    return blocks


def _combinations(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One label for each axis, in all ways."""
    lists = [labels if isinstance(labels, list) else [labels] for labels in choices.values()]
    return [dict(zip(choices, labels, strict=True)) for labels in itertools.product(*lists)]


def _gap(of: int, over: int, *samples: Sample) -> float:
    """Mean recovery of the first `of` of each block − that of its last `over`."""
    values = np.reshape([gate(items) for items in samples], (-1, of + over))
    return float(values[:, :of].mean() - values[:, of:].mean())


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
