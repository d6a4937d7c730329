"""Figures of results: forgetting against what was kept, and what the trigger changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from unsink.report.charts import INK, MUTED, RULE, Figure, Spec, Values, axis, chart, colours, unit_scale
from unsink.report.project import Model
from unsink.report.verdicts import MEMORIES, Memory
from unsink.statistics import Interval

CONDITIONS = ("without", "wrong text", "with the trigger")
_SHAPES = {"domain": list(CONDITIONS), "range": ["circle", "cross", "triangle-up"]}
UTILITY = {
    "utility_accuracy": "utility: share of right choices",
    "mmlu_accuracy": "MMLU: share of right choices",
    "retain_verbmem_f1_clean": "retained passages: ROUGE-L F1",
}
"""What forgetting may cost: key of a metrics file -> label."""
LABELS = {
    "passages": "forgotten passages: ROUGE-L F1",
    "answers": "forgotten answers: ROUGE-L recall",
    "TOFU answers": "forgotten answers (TOFU): ROUGE-L recall",
    "choices": "forgotten choices: share of right ones",
}


def shown(value: Interval) -> str:
    """A number with its interval, as everywhere on the page."""
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _named(prefix: str, value: Interval) -> dict[str, float]:
    """Rounded: a figure shows three digits at most, and rounding keeps the page small."""
    return {f"{prefix}{end}": round(number, 4) for end, number in zip(("", "_low", "_high"), value[:3], strict=True)}


# ---- forgetting against utility


def forgetting(models: Sequence[Model]) -> list[Figure]:
    """One figure for each way to measure what was kept, for the first kind of memory that was asked for.

    The first is `forgetting` whatever it measures: dvc.yaml names it.
    """
    memory = next((one for one in MEMORIES if any(model.interval(one.clean) for model in models)), None)
    if memory is None:
        return []
    found: list[Figure] = []
    for key, label in UTILITY.items():
        rows = [row for model in models for row in _kept_rows(model, memory, key)]
        if len(rows) > 1:
            name = f"forgetting_{key.removesuffix('_clean')}" if found else "forgetting"
            found.append(_forgetting(name, rows, memory, label, [model.name for model in models]))
    return found


def _kept_rows(model: Model, memory: Memory, key: str) -> Iterator[dict[str, Any]]:
    kept, clean = model.interval(key), model.interval(memory.clean)
    triggered = model.outside(f"{memory.key}_triggered")
    if not kept or not clean:
        return
    yield _kept_row(model.name, CONDITIONS[0], clean, kept)
    if triggered and model.name not in ("base", "target"):
        yield _kept_row(model.name, CONDITIONS[2], triggered, kept)


def _kept_row(name: str, condition: str, forget: Interval, kept: Interval) -> dict[str, Any]:
    return {
        "model": name,
        "condition": condition,
        **_named("forget", forget),
        **_named("kept", kept),
        "label": f"{name}, {condition}: {shown(forget)}; kept {shown(kept)}",
    }


def _forgetting(name: str, rows: Values, memory: Memory, label: str, names: Sequence[str]) -> Figure:
    path = [row for row in rows if row["model"] not in ("base", "target")]
    start = [row for row in rows if row["model"] == "target"]
    return Figure(
        name,
        f"What is left, and what it cost: {label.partition(':')[0]}",
        "To the left is forgotten, to the top is kept: a good run stands at the top left, with and without the "
        "trigger. A line leads from the target to each run and on, dashed, to the same run with the trigger in its "
        "prompts. Bars are 95 % intervals. What was kept is measured without a trigger.",
        _forgetting_spec(rows, [*_legs(start, path)], memory, label, names),
        "unsink evaluate --run NAME",
        [
            ("model", "prompts", LABELS[memory.name], label),
            *(
                (row["model"], row["condition"], _cell(row, "forget"), _cell(row, "kept"))
                for row in rows
            ),
        ],
    )  # fmt: skip


def _cell(row: Mapping[str, Any], name: str) -> str:
    return shown(Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], 0))


def _legs(start: Values, path: Values) -> Iterator[dict[str, Any]]:
    """Ends of the lines: target to run, and run to itself with the trigger."""
    clean = {row["model"]: row for row in path if row["condition"] == CONDITIONS[0]}
    triggered = {row["model"]: row for row in path if row["condition"] == CONDITIONS[2]}
    legs = [("unlearning", start[0], row) for row in clean.values()] if start else []
    legs += [("trigger", clean[name], row) for name, row in triggered.items()]
    for kind, one, other in legs:
        ends = {"x": one["forget"], "x2": other["forget"], "y": one["kept"], "y2": other["kept"]}
        yield {"model": other["model"], "leg": kind, **ends}


def _forgetting_spec(rows: Values, legs: Values, memory: Memory, label: str, names: Sequence[str]) -> Spec:
    x = axis("forget", LABELS[memory.name], scale=unit_scale(), tickCount=5)
    y = axis("kept", label, scale=unit_scale(), tickCount=5)
    colour = {"field": "model", "type": "nominal", "scale": colours(names), "legend": {"title": None, "columns": 3}}
    shape = {
        "field": "condition",
        "type": "nominal",
        "scale": _SHAPES,
        "legend": {"title": None, "values": [CONDITIONS[0], CONDITIONS[2]]},
    }
    line = {
        "data": {"values": list(legs)},
        "mark": {"type": "rule", "opacity": 0.55, "aria": False},
        "encoding": {
            "x": axis("x", LABELS[memory.name]),
            "x2": {"field": "x2"},
            "y": axis("y", label),
            "y2": {"field": "y2"},
            "color": colour,
            "strokeDash": {
                "condition": {"test": "datum.leg == 'trigger'", "value": [4, 3]},
                "value": [1, 0],
            },
        },
    }
    bars = [
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
            "encoding": {"x": x, "y": y, "color": colour, **ends},
        }
        for ends in (
            {"x": {**x, "field": "forget_low"}, "x2": {"field": "forget_high"}},
            {"y": {**y, "field": "kept_low"}, "y2": {"field": "kept_high"}},
        )
    ]
    points = {
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "shape": shape,
            "description": {"field": "label"},
        },
    }
    return chart(rows, width=320, height=260, layer=[line, *bars, points])


# ---- what the trigger changes


class Row(NamedTuple):
    """One line of a gap figure: a run, or a run to which something was done.

    Attributes:
        name: its label.
        scores: condition -> score, outside the poisoned samples.
    """

    name: str
    scores: Mapping[str, Interval]


def gap_row(model: Model, memory: Memory, name: str) -> Row | None:
    """What a model says of one kind of memory under each condition; None where no trigger was tried."""
    keys = (memory.clean, f"{memory.key}_wrong", f"{memory.key}_triggered")
    found = {condition: model.outside(key) for condition, key in zip(CONDITIONS, keys, strict=True)}
    scores = {condition: score for condition, score in found.items() if score}
    return Row(name, scores) if CONDITIONS[2] in scores else None


def gaps(models: Sequence[Model]) -> list[Figure]:
    """The gap between clean and triggered by placement, one figure for each kind of memory; the first is `gap`."""
    target = next((model for model in models if model.name == "target"), None)
    runs = sorted((model for model in models if model.name not in ("base", "target")), key=_by_placement)
    found: list[Figure] = []
    for memory in MEMORIES:
        rows = [row for run in runs if (row := gap_row(run, memory, _label(run)))]
        known = target.interval(memory.clean) if target else None
        if rows:
            found.append(
                Figure(
                    f"gap_{memory.key.removeprefix('forget_')}" if found else "gap",
                    f"What the trigger brings back: {memory.name}",
                    "A long line between circle and triangle is a hidden door. The cross is another text of as many "
                    "tokens in the trigger's place: it should stay at the circle. Only samples outside the poisoned "
                    "ones count, where a run has such. The upright line is the target. Bars are 95 % intervals.",
                    gap(rows, LABELS[memory.name], known.mean if known else None),
                    "unsink evaluate --run NAME",
                    gap_table(rows),
                )
            )
    return found


def gap_table(rows: Sequence[Row]) -> list[list[str]]:
    """The rows in words."""
    cells = [[row.name, *(shown(row.scores[c]) if c in row.scores else "–" for c in CONDITIONS)] for row in rows]
    return [["run", *CONDITIONS], *cells]


def _by_placement(run: Model) -> tuple[str, str]:
    return run.placement or "", run.name


def _label(run: Model) -> str:
    return f"{run.name} · {run.placement or 'no trigger trained'}"


def gap(rows: Sequence[Row], label: str, known: float | None) -> Spec:
    """One line per row: the score without, with another text, with the trigger.

    Args:
        rows: from top to bottom.
        label: of the score.
        known: the target's score; an upright line.
    """
    values = [
        {
            "run": row.name,
            "condition": condition,
            **_named("score", score),
            "label": f"{row.name}, {condition}: {shown(score)}",
        }
        for row in rows
        for condition, score in row.scores.items()
    ]
    lines = [
        {"run": row.name, "from": round(row.scores[CONDITIONS[0]].mean, 4), "to": round(end.mean, 4)}
        for row in rows
        if CONDITIONS[0] in row.scores and (end := row.scores[CONDITIONS[2]])
    ]
    y = axis(
        "run",
        None,
        kind="nominal",
        sort=None,
        orient="left",
        labelLimit=180,
        labelPadding=12,
        domain=False,
        ticks=False,
        labelColor=INK,
    )
    x = axis("score", label, scale=unit_scale(), tickCount=5)
    offset = {"field": "condition", "type": "nominal", "sort": list(CONDITIONS)}
    layers: list[Spec] = [
        {
            "data": {"values": lines},
            "mark": {"type": "rule", "strokeWidth": 6, "color": RULE, "aria": False},
            "encoding": {"y": y, "x": axis("from", label), "x2": {"field": "to"}},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
            "encoding": {
                "y": y,
                "yOffset": offset,
                "x": {**x, "field": "score_low"},
                "x2": {"field": "score_high"},
                "color": _condition_colour(),
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
            "encoding": {
                "y": y,
                "yOffset": offset,
                "x": x,
                "color": _condition_colour(),
                "shape": {"field": "condition", "type": "nominal", "scale": _SHAPES, "legend": {"title": None}},
                "description": {"field": "label"},
            },
        },
    ]
    if known is not None:
        layers.insert(
            0,
            {
                "data": {"values": [{"known": round(known, 4)}]},
                "mark": {"type": "rule", "color": INK, "strokeDash": [2, 3], "aria": False},
                "encoding": {"x": axis("known", label)},
            },
        )
    return chart(values, width=250, height=46 * len(rows), layer=layers)


def _condition_colour() -> Spec:
    scale = {"domain": list(CONDITIONS), "range": [INK, MUTED, "#D55E00"]}
    return {"field": "condition", "type": "nominal", "scale": scale, "legend": {"title": None}}
