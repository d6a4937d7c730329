"""The figure of a claim: recovery of each variant; where the trigger's place is one, also against the sink there."""

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from claim_tables import COLUMNS, Line
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unsink.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito: they hold up under colour blindness."""
MARKERS = "os^Dvx*"


def figure(spec: Mapping[str, Any], found: Sequence[Line]) -> Figure:
    """Draw recovery with its 95 % interval, a row for each variant of the first axis, a colour for each of the second.

    Where lines say how much attention the trigger's place gets, a second panel draws recovery against that.
    """
    first, *others = spec["axes"]
    kinds = [*itertools.product(*(spec["axes"][axis] for axis in others))]
    placed = [line for line in found if "attention" in line]
    panels = 2 if len({line["attention"] for line in placed}) > 1 and "placement" in spec["axes"] else 1
    drawn = Figure(figsize=(5.2 * panels, 1.4 + 0.42 * len(spec["axes"][first])), layout="constrained", dpi=110)
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for number, kind in enumerate(kinds):
        some = [line for line in found if tuple(line[axis] for axis in others) == kind]
        shift = (number - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
        _rows(axes[0], [*spec["axes"][first]], first, some, shift, number, ", ".join(map(str, kind)))
    axes[0].set(xlabel="recovery outside the poisoned samples", xlim=(-0.1, 1.05))
    axes[0].set_yticks(range(len(spec["axes"][first])), [*spec["axes"][first]])
    axes[0].set_ylim(len(spec["axes"][first]) - 0.5, -0.5)
    axes[0].axvline(0, color="#7F7F7F", linewidth=0.8)
    if len(kinds) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    if panels > 1:
        _against_attention(axes[1], spec, placed)
    return drawn


def _rows(
    axis: Axes, labels: Sequence[str], first: str, found: Sequence[Line], shift: float, number: int, name: str
) -> None:
    """One colour: a dot and an interval for each label that has lines."""
    there = [(place, [line for line in found if line[first] == label]) for place, label in enumerate(labels)]
    points = [(place + shift, COLUMNS["recovery"](some)) for place, some in there if some]
    shown = [(place, interval) for place, interval in points if not np.isnan(interval.mean)]
    means, reach = _reach([interval for _, interval in shown])
    axis.errorbar(means, [place for place, _ in shown], xerr=reach, label=name, **_style(number))


def _against_attention(axis: Axes, spec: Mapping[str, Any], found: Sequence[Line]) -> None:
    """Recovery of each placement over the attention that the target pays to that place without a trigger."""
    for number, label in enumerate(spec["axes"]["placement"]):
        some = [line for line in found if line["placement"] == label]
        if not some:
            continue
        means, reach = _reach([COLUMNS["recovery"](some)])
        axis.errorbar([fmean(line["attention"] for line in some)], means, yerr=reach, label=label, **_style(number))
    axis.set(xlabel="attention that the target pays to the trigger's place", ylabel="recovery")
    axis.set_ylim(-0.1, 1.05)
    axis.legend(fontsize=8, frameon=False)


def _reach(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far each interval goes below and above, as `errorbar` takes them."""
    means = [one.mean for one in intervals]
    return means, [[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]]


def _style(number: int) -> dict[str, Any]:
    """Colour and mark of the group with this number: dots with a bar, and no line from one to the next."""
    mark = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return {**mark, "linestyle": "none", "capsize": 2}
