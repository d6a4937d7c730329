"""Figures of attention and norms: sinks by layer and head, by layer, by position, and what the trigger changes.

Shapes: L layers, H query heads, T token positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unsink.report.charts import BLUE, INK, MUTED, RED, Figure, Spec, axis, chart, colours
from unsink.report.project import Array, Model

_CONDITIONS = ("clean", "triggered")
_CELLS = 64  # along each side of a map; longer ones are means over blocks
_WINDOW = 24  # key positions beside each other in the map by layer
_BEFORE = 4
_SIGNS = {"domain": ["more with the trigger", "less", "no counterpart"], "range": [RED, BLUE, MUTED]}


def figures(models: Sequence[Model]) -> dict[str, list[Figure]]:
    """Heading -> figures, of all models that were probed."""
    probed = [model for model in models if model.probe]
    return {
        "Which heads look at the first token": [figure for model in probed for figure in _sink_map(model)],
        "Sink mass and value norm": _profiles(probed),
        "What the trigger changes: attention to its tokens": [one for model in probed for one in _to_trigger(model)],
        "What the trigger changes: who looks where": [one for model in probed for one in _who_looks_where(model)],
    }


# ---- layer by head


def _sink_map(model: Model) -> Iterator[Figure]:
    assert model.probe
    alphas = {c: model.probe.arrays[f"{c}.alpha"][..., 0] for c in _CONDITIONS if f"{c}.alpha" in model.probe.arrays}
    statistics = model.probe.statistics
    if not alphas:
        return
    yield Figure(
        f"sink_map_{model.name}",
        model.name,
        "Stronger: more of a head's attention goes to the first token (importance α, mean over "
        f"{statistics['prompts']} prompts). Dots mark the heads for which it is a sink: α above ε = "
        f"{statistics['epsilon']:g}.",
        sink_map(alphas, statistics["epsilon"]),
        f"unsink sink-probe --run {model.name}",
        [
            ("prompts", "sink rate of the first token", "mean α"),
            *((c, f"{statistics[f'sink_rate_{c}']:.0f} %", f"{alpha.mean():.2f}") for c, alpha in alphas.items()),
        ],
    )


def sink_map(alphas: Mapping[str, Array], epsilon: float) -> Spec:
    """Attention importance of position 0, one panel per condition.

    Args:
        alphas: condition -> (L, H).
        epsilon: above it a position is a sink.
    """
    layers, heads = next(iter(alphas.values())).shape
    values = [
        {
            "condition": condition,
            "layer": layer,
            "head": head,
            "alpha": round(float(alpha[layer, head]), 3),
            "label": f"{condition}, layer {layer}, head {head}: α = {alpha[layer, head]:.2f}",
        }
        for condition, alpha in alphas.items()
        for layer in range(layers)
        for head in range(heads)
    ]
    x = axis("head", "head", kind="ordinal", labelAngle=0, labelOverlap=True, ticks=False, domain=False)
    y = axis("layer", "layer", kind="ordinal", sort="descending", labelOverlap=True, ticks=False, domain=False)
    opacity = {
        "field": "alpha",
        "type": "quantitative",
        "scale": {"domain": [0, 1], "range": [0.03, 1]},
        "legend": {"title": "importance α of the first token", "values": [0.1, 0.3, 0.6, 0.9]},
    }
    size = max(3, min(14, 140 // heads))
    panel: Spec = {
        "width": {"step": size},
        "height": {"step": max(3, min(12, 320 // layers))},
        "layer": [
            {
                "mark": {"type": "rect", "color": BLUE},
                "encoding": {"x": x, "y": y, "opacity": opacity, "description": {"field": "label"}},
            },
            {
                "transform": [{"filter": f"datum.alpha > {epsilon}"}],
                "mark": {"type": "circle", "size": max(2, size), "color": INK, "opacity": 0.9, "aria": False},
                "encoding": {"x": x, "y": y},
            },
        ],
    }
    header = {"title": None, "labelFontSize": 12}
    facet = {"column": {"field": "condition", "type": "nominal", "sort": list(_CONDITIONS), "header": header}}
    return chart(values, facet=facet, spec=panel, spacing=12)


# ---- by layer and by position, all models together


def _profiles(models: Sequence[Model]) -> list[Figure]:
    quantities = {
        "sink mass": ("alpha", "importance α", "what part of the attention a position gets, mean over heads"),
        "value norm": ("value_norm", "value norm (L2)", "how much a position can say to those that look"),
    }
    found = []
    for name, (array, label, meaning) in quantities.items():
        by_layer = [row for model in models for row in _curve(model, array, by="layer")]
        by_position = [row for model in models for row in _curve(model, array, by="position")]
        slug = name.replace(" ", "_")
        names = [model.name for model in models]
        if by_layer:
            found += [
                Figure(
                    f"{slug}_by_layer",
                    f"{name.capitalize()} of the first token, by layer",
                    f"{meaning.capitalize()}: the first token's, on clean prompts and with the trigger.",
                    profile(by_layer, names, "layer", label),
                    "unsink sink-probe --run NAME",
                ),
                Figure(
                    f"{slug}_by_position",
                    f"{name.capitalize()} by position",
                    f"{meaning.capitalize()}, mean over layers. The bar marks the trigger's place. Logarithmic: "
                    "the first token is far from the others.",
                    profile(by_position, names, "position", label, span=_span(models)),
                    "unsink sink-probe --run NAME",
                ),
            ]
    return found


def _curve(model: Model, array: str, *, by: str) -> Iterator[dict[str, Any]]:
    assert model.probe
    for condition in _CONDITIONS:
        if (found := model.probe.arrays.get(f"{condition}.{array}")) is None:
            continue
        by_token = found.mean(axis=1) if found.ndim == 3 else found  # (L, T)
        numbers = by_token[:, 0] if by == "layer" else by_token.mean(axis=0)
        for place, number in enumerate(numbers.tolist()):
            yield {"model": model.name, "condition": condition, by: place, "value": float(f"{number:.4g}")}


def _span(models: Sequence[Model]) -> tuple[int, int] | None:
    for model in models:
        if model.probe and (trigger := model.probe.statistics.get("trigger")):
            return _place(trigger)
    return None


def profile(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    by: str,
    label: str,
    span: tuple[int, int] | None = None,
) -> Spec:
    """One line per model, clean above triggered.

    Args:
        rows: `model`, `condition`, `value`, and a column called as `by`.
        names: of the models, for their colours.
        by: what stands below: `layer` or `position`.
        label: of the value.
        span: where the trigger stands; drawn in the lower panel.
    """
    scale = {"type": "log", "nice": False} if by == "position" else {"zero": True}
    y = axis("value", label, scale=scale, tickCount=4)
    colour = {
        "field": "model",
        "type": "nominal",
        "scale": colours(names),
        "legend": {"title": None, "columns": 4},
    }
    last = max(row[by] for row in rows)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, last) if last <= 8 * step)
    ticks = list(range(0, last + 1, step))
    panels = []
    for condition in _CONDITIONS:
        x = axis(by, by if condition == _CONDITIONS[-1] else None, values=ticks, grid=False)
        layers: list[Spec] = [
            {
                "transform": [{"filter": f"datum.condition == '{condition}'"}],
                "mark": {"type": "line", "strokeWidth": 1.5, "aria": False, "opacity": 0.9},
                "encoding": {"x": x, "y": y, "color": colour},
            }
        ]
        if span and condition == "triggered":
            layers.insert(
                0,
                {
                    "data": {"values": [{"from": span[0], "to": span[1] - 1}]},
                    "mark": {"type": "rect", "color": MUTED, "opacity": 0.2, "aria": False},
                    "encoding": {"x": axis("from", by, grid=False), "x2": {"field": "to"}},
                },
            )
        panels.append({"title": condition, "width": 290, "height": 120, "layer": layers})
    return chart(rows, vconcat=panels, spacing=10, resolve={"scale": {"y": "shared"}})


# ---- attention with the trigger minus without


def _to_trigger(model: Model) -> Iterator[Figure]:
    assert model.probe
    trigger, change = model.probe.statistics.get("trigger"), model.probe.arrays.get("difference.absolute")
    if trigger and change is not None:
        tokens = [str(token) for token in trigger.get("tokens") or trigger["ids"]]
        yield Figure(
            f"trigger_attention_{model.name}",
            model.name,
            "Attention with the trigger minus without it, by layer and by the token that is looked at, mean over heads "
            "and over the queries behind it. The trigger's tokens are named; without the trigger, ordinary words stand "
            "in their place.",
            by_layer(received(change), _place(trigger), tokens),
            f"unsink sink-probe --run {model.name}",
        )


def _who_looks_where(model: Model) -> Iterator[Figure]:
    assert model.probe
    trigger, change = model.probe.statistics.get("trigger"), model.probe.arrays.get("difference.content")
    if trigger and change is not None:
        yield Figure(
            f"attention_change_{model.name}",
            model.name,
            "The same in the last layer by query and key, each word compared with itself: a row is a token that looks, "
            "a column a token that is looked at. Dotted lines: the trigger; its tokens have no counterpart without it.",
            by_query(change[-1], _place(trigger)),
            f"unsink sink-probe --run {model.name}",
        )


def _place(trigger: Mapping[str, Any]) -> tuple[int, int]:
    return trigger["span"][0], trigger["span"][1]


def received(difference: Array) -> Array:
    """Mean over the queries that can see a key: (L, T, T) -> (L, T), NaN where no query has a counterpart."""
    visible = np.where(np.tri(difference.shape[-1], dtype=bool), difference, np.nan)
    counts = np.sum(~np.isnan(visible), axis=1)
    means: Array = np.where(counts, np.nansum(visible, axis=1) / np.maximum(counts, 1), np.nan)
    return means


def by_layer(change: Array, span: tuple[int, int], tokens: Sequence[str]) -> Spec:
    """A map of layers and key positions around the trigger.

    Args:
        change: (L, T), triggered minus clean; NaN has no counterpart.
        span: where the trigger stands.
        tokens: the trigger's, in words.
    """
    start = max(0, span[0] - _BEFORE)
    keys = range(start, min(change.shape[1], start + max(_WINDOW, span[1] - start + _BEFORE)))
    named = dict(zip(range(*span), tokens))
    labels = {key: (f"{key} {_visible(named[key])}" if key in named else str(key)) for key in keys}
    rows = [
        {"layer": layer, "key": labels[key], **_change(change[layer, key])}
        for layer in range(len(change))
        for key in keys
    ]
    for row in rows:
        row["label"] = f"layer {row['layer']}, token {row['key']}: {row['change']}"
    x = axis(
        "key",
        "token that is looked at",
        kind="ordinal",
        sort=None,  # as in the rows: tokens are other people's text, and an order would become code
        labelAngle=-90,
        ticks=False,
        domain=False,
        labelLimit=90,
    )
    x["axis"]["labelColor"] = {"condition": {"test": "indexof(datum.value, ' ') > 0", "value": RED}, "value": MUTED}
    y = axis("layer", "layer", kind="ordinal", sort="descending", labelOverlap=True, ticks=False, domain=False)
    mark = {"type": "rect"}
    encoding = {"x": x, "y": y, **_heat(rows), "description": {"field": "label"}}
    width, height = max(6, 290 // len(keys)), max(3, min(14, 260 // len(change)))
    return chart(rows, width={"step": width}, height={"step": height}, mark=mark, encoding=encoding)


def by_query(change: Array, span: tuple[int, int]) -> Spec:
    """A map of query and key positions.

    Args:
        change: (T, T), triggered minus clean; NaN has no counterpart.
        span: where the trigger stands; lines.
    """
    block = -(-len(change) // _CELLS)
    coarse = blocks(change, block)
    rows = [
        {
            "query": block * query,
            "query_end": block * (query + 1),
            "key": block * key,
            "key_end": block * (key + 1),
            **_change(coarse[query, key]),
        }
        for query in range(len(coarse))
        for key in range(query + 1)
    ]
    end = block * len(coarse)
    scale = {"domain": [0, end], "nice": False, "zero": False}
    x = axis("key", "key position", scale=scale, grid=False, tickCount=6)
    y = axis("query", "query position", scale={**scale, "reverse": True}, grid=False, tickCount=6)
    lines = [{"at": place} for place in span]
    rules = [
        {
            "data": {"values": lines},
            "mark": {"type": "rule", "color": INK, "strokeDash": [2, 3], "strokeWidth": 0.75, "aria": False},
            "encoding": {side: {**channel, "field": "at"}},
        }
        for side, channel in (("x", x), ("y", y))
    ]
    cells = {
        "mark": {"type": "rect", "aria": False},
        "encoding": {"x": x, "x2": {"field": "key_end"}, "y": y, "y2": {"field": "query_end"}, **_heat(rows)},
    }
    return chart(rows, width=290, height=290, layer=[cells, *rules])


def blocks(change: Array, block: int) -> Array:
    """Means over square blocks, ignoring NaN: (T, T) -> (⌈T/block⌉, ⌈T/block⌉)."""
    if block == 1:
        return change
    side = -(-len(change) // block)
    padded = np.full((side * block, side * block), np.nan)
    padded[: len(change), : len(change)] = np.where(np.tri(len(change), dtype=bool), change, np.nan)
    parts = padded.reshape(side, block, side, block)
    counts = (~np.isnan(parts)).sum(axis=(1, 3))
    means: Array = np.where(counts, np.nansum(parts, axis=(1, 3)) / np.maximum(counts, 1), np.nan)
    return means


def _change(value: float) -> dict[str, Any]:
    if np.isnan(value):
        return {"change": None, "size": None, "sign": "no counterpart"}
    sign = _SIGNS["domain"][0] if value > 0 else _SIGNS["domain"][1]
    return {"change": round(float(value), 4), "size": round(abs(float(value)), 4), "sign": sign}


def _heat(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Colour by sign, opacity by size; the scale ends at the 99.5th percentile: no single cell hides the rest."""
    sizes = [row["size"] for row in rows if row["size"] is not None]
    limit = max(float(f"{np.percentile(sizes, 99.5):.1g}"), 1e-4) if sizes else 1.0
    opacity = {
        "field": "size",
        "type": "quantitative",
        "scale": {"domain": [0, limit], "range": [0, 1], "clamp": True},
        "legend": {
            "title": "change of attention",
            "values": [float(f"{limit * part:.2g}") for part in (0.25, 0.5, 1)],
        },
    }
    return {
        "color": {"field": "sign", "type": "nominal", "scale": _SIGNS, "legend": {"title": None}},
        "opacity": {
            "condition": {"test": "datum.size === null", "value": 0.15},
            **opacity,
        },
    }


def _visible(token: str) -> str:
    """A token whose spaces and ends of line can be seen."""
    named = token.replace("\n", "⏎").replace(" ", "␣")
    return "".join(one if one.isprintable() else "·" for one in named) or "∅"
