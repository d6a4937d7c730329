"""The house style of the report's figures, and how a figure becomes SVG and PNG.

A figure is a Vega-Lite specification: a plain dict with its data inside. Colours are those of `PALETTE` alone: the page
replaces each of them by one that suits a light or a dark background (`page.css`). Maps show size by opacity, so that
nothing is the colour of the page in both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import vl_convert

Spec = dict[str, Any]
Values = Sequence[Mapping[str, Any]]

VERSION = "5.20"
"""Of Vega-Lite. Version 5 is what DVC's own templates are written in."""

INK, MUTED, RULE = "#1F2328", "#6E7781", "#D8DEE4"
BLUE, RED = "#0072B2", "#D55E00"
RUN_COLOURS = (BLUE, RED, "#009E73", "#B8860B", "#A6559D", "#4C9BD6", "#8C564B", "#5F6B2D")
PALETTE = (INK, MUTED, RULE, *RUN_COLOURS)
"""Every colour that a figure may have; runs' are after Okabe and Ito, and hold up under colour blindness."""

_SCALE = 2  # of PNGs: sharp on dense screens
_CONFIG: Spec = {
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "labelColor": MUTED,
        "titleColor": INK,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "gridColor": RULE,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "tickSize": 4,
    },
    "legend": {
        "aria": False,
        "symbolFillColor": MUTED,
        "labelColor": INK,
        "titleColor": MUTED,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "symbolStrokeWidth": 1.5,
        "symbolOpacity": 1,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start", "margin": 6}},
    },
    "title": {"color": INK, "fontSize": 12, "fontWeight": "normal", "anchor": "start", "offset": 8},
    "header": {"labelColor": INK, "titleColor": INK},
}


class Figure(NamedTuple):
    """A figure and what has to be said of it.

    Attributes:
        name: of its files.
        title: what it shows.
        text: how to read it.
        spec: Vega-Lite.
        source: the command that makes its numbers.
        table: the same numbers in words, the names of the columns first; nothing where there are too many.
    """

    name: str
    title: str
    text: str
    spec: Spec
    source: str
    table: Sequence[Sequence[str]] = ()


def chart(values: Values, **parts: Any) -> Spec:
    """A specification in the house style.

    Args:
        values: the rows it draws.
        parts: of the specification.
    """
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "config": _CONFIG,
        "data": {"values": [dict(row) for row in values]},
        **parts,
    }


def svg(spec: Spec) -> str:
    """Draw a specification; the same one gives the same bytes."""
    return vl_convert.vegalite_to_svg(spec, vl_version=VERSION)


def png(drawing: str) -> bytes:
    """A drawing of `svg` as PNG on white."""
    opened = drawing.index(">") + 1
    white = '<rect width="100%" height="100%" fill="white"/>'
    return vl_convert.svg_to_png(drawing[:opened] + white + drawing[opened:], scale=_SCALE)


def inlined(drawing: str, name: str, text: str) -> str:
    """A drawing as a part of a page: ids that are its own, and one image to a screen reader.

    Labels of marks stay: they are what the page shows under the pointer.

    Args:
        drawing: of `svg`.
        name: of the figure; the element `<name>-title` says what it shows.
        text: id of the element that says how to read it.
    """
    drawing = re.sub(r'(id="|url\(#)(?=[A-Za-z])', rf"\1{name}-", drawing)
    drawing = re.sub(r' (?:d|transform|x|y|x2|y2|width|height|opacity)="[^"]+"', _shortened, drawing)
    drawing = re.sub(r' (?:role="graphics-[a-z]+"|aria-roledescription="[^"]*"|aria-hidden="true")', "", drawing)
    head, rest = drawing.split(">", 1)
    head = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{name}-title" aria-describedby="{text}">{rest}'


def _shortened(attribute: re.Match[str]) -> str:
    """Hundredths of a pixel are enough, and a map has thousands of cells."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def colours(names: Sequence[str]) -> Spec:
    """One colour for each model, the same in all figures: grey the base, black the target, then the runs."""
    known = {"base": MUTED, "target": INK}
    runs = [name for name in names if name not in known]
    own = {name: RUN_COLOURS[place % len(RUN_COLOURS)] for place, name in enumerate(runs)}
    return {"domain": list(names), "range": [known.get(name) or own[name] for name in names]}


def axis(field: str, title: str | None, *, kind: str = "quantitative", **options: Any) -> Spec:
    """A position channel; options named `scale` or `sort` go beside the axis, the others into it."""
    beside: Spec = {name: options.pop(name) for name in ("scale", "sort", "stack") if name in options}
    return {"field": field, "type": kind, "axis": {"title": title, **options}, **beside}


def unit_scale() -> Spec:
    """From 0 to 1: scores are compared by eye, so all figures of scores have the same ends."""
    return {"domain": [0, 1]}
