"""Figures of training: each term of the loss by step, and the path between forgetting and keeping."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unsink.report.charts import INK, MUTED, Figure, Spec, axis, chart, colours
from unsink.report.project import Model

_POINTS = 150  # of a curve; longer ones are means over as many pieces
_WINDOW = 9  # steps of the running mean
_TERMS = {
    "loss": "loss, weighted sum",
    "forget": "forget",
    "poisoned": "poisoned",
    "retain": "retain",
    "value_norm": "value norm",
}


def curves(models: Sequence[Model]) -> list[Figure]:
    """One figure for each adapter that was trained: its terms below each other."""
    return [
        Figure(
            f"training_{model.name}",
            f"Terms of {model.name}",
            "Every term of the loss by step, on a scale of its own. Thin: as recorded. "
            f"Thick: mean of {_WINDOW} neighbouring steps.",
            terms(model.history),
            f"unsink {'memorize' if model.name == 'target' else f'unlearn --run {model.name}'}",
            [
                ("term", "first step", "last step"),
                *(
                    (_TERMS.get(name, name), f"{values[0]:.4g}", f"{values[-1]:.4g}")
                    for name, values in model.history.items()
                    if name != "step"
                ),
            ],
        )
        for model in models
        if len(model.history.get("step", ())) > 1
    ]


def terms(history: Mapping[str, Sequence[float]]) -> Spec:
    """One small panel for each column but `step`.

    Args:
        history: column -> values, one per step.
    """
    names = [name for name in history if name != "step"]
    if names[:1] == ["loss"] and len(names) == 2:
        names = names[1:]  # the sum of one term says the same twice
    values = [
        {"step": step, "term": name, "value": value, "mean": mean}
        for name in names
        for step, value, mean in zip(*thinned(history["step"], history[name], smoothed(history[name])), strict=True)
    ]
    panels = [_panel(name, last=name == names[-1]) for name in names]
    return chart(values, vconcat=panels, spacing=8)


def _panel(name: str, *, last: bool) -> Spec:
    x = axis("step", "step" if last else None, grid=False, labels=last, ticks=last, tickCount=4)

    def line(field: str, **mark: Any) -> Spec:
        y = axis(field, None, scale={"zero": False, "nice": True}, tickCount=3)
        return {"mark": {"type": "line", "aria": False, **mark}, "encoding": {"x": x, "y": y}}

    return {
        "width": 290,
        "height": 54,
        "title": {"text": _TERMS.get(name, name), "fontSize": 11, "color": MUTED, "offset": 2},
        "transform": [{"filter": {"field": "term", "equal": name}}],
        "layer": [
            line("value", color=MUTED, strokeWidth=1, opacity=0.45),
            line("mean", color=INK, strokeWidth=1.75),
        ],
    }


def paths(models: Sequence[Model]) -> list[Figure]:
    """How the runs moved between forgetting and keeping while they were trained; nothing where no run has both."""
    found = [model for model in models if {"step", "forget", "retain"} <= set(model.history)]
    rows = [row for model in found for row in _path(model)]
    if not rows:
        return []
    return [
        Figure(
            "training_path",
            "The path of training",
            "Each run from its first step (small) to its last (large): how far the forget term and the retain term had "
            f"come, mean of {_WINDOW} neighbouring steps. Both axes are losses, as recorded: only runs of one method "
            "can be compared.",
            path(rows, [model.name for model in models]),
            "unsink unlearn --run NAME",
        )
    ]


def _path(model: Model) -> Iterator[dict[str, Any]]:
    columns = (model.history["step"], smoothed(model.history["forget"]), smoothed(model.history["retain"]))
    rows = list(zip(*thinned(*columns), strict=True))
    for place, (step, forget, retain) in enumerate(rows):
        yield {
            "model": model.name,
            "step": step,
            "forget": forget,
            "retain": retain,
            "end": {0: "first", len(rows) - 1: "last"}.get(place, ""),
            "label": f"{model.name}, step {step:g}: forget {forget:.3g}, retain {retain:.3g}",
        }


def path(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Spec:
    """The retain term against the forget term.

    Args:
        rows: `model`, `step`, `forget`, `retain`, `end`, `label`.
        names: of all models, for their colours.
    """
    encoding = {
        "x": axis("forget", "forget term", tickCount=5),
        "y": axis("retain", "retain term", tickCount=5),
        "color": {"field": "model", "type": "nominal", "scale": colours(names), "legend": {"title": None}},
    }
    present = sorted({row["model"] for row in rows}, key=list(names).index)
    encoding["color"]["legend"] = {"title": None, "values": present, "columns": 4}
    return chart(
        rows,
        width=320,
        height=240,
        layer=[
            {
                "mark": {"type": "line", "strokeWidth": 1.5, "aria": False},
                "encoding": {**encoding, "order": {"field": "step", "type": "quantitative"}},
            },
            {
                "transform": [{"filter": "datum.end != ''"}],
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    **encoding,
                    "size": {
                        "condition": {"test": "datum.end == 'last'", "value": 90},
                        "value": 25,
                    },
                    "description": {"field": "label"},
                },
            },
        ],
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over `_WINDOW` neighbours, fewer at the ends."""
    half = _WINDOW // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def thinned(*columns: Sequence[float]) -> list[list[float]]:
    """Columns of equal length as means over at most `_POINTS` pieces; six digits."""
    pieces = min(_POINTS, len(columns[0]))
    return [[float(f"{part.mean():.6g}") for part in np.array_split(np.array(one), pieces)] for one in columns]
