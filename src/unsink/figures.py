"""Figures of the sink probe, as PNG and SVG with the same bytes on every run.

Plain arrays in, `matplotlib.figure.Figure` out; no pyplot, so no global state and no window. Colours: cividis, RdBu and
the Okabe-Ito palette, which hold up under colour blindness.

Shapes: L layers, H query heads, T token positions.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

LOG = logging.getLogger(__name__)

Array = NDArray[np.floating[Any]]
Span = tuple[int, int]

_BLUE, _RED, _ORANGE, _GREY = "#0072B2", "#D55E00", "#E69F00", "#7F7F7F"
_NO_PARTNER = "#D9D9D9"
_RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "unsink",  # element ids are random without it
}


@contextmanager
def _house_style() -> Iterator[None]:
    """Draw the same on every machine, whatever matplotlibrc says."""
    with style.context("default", after_reset=True), matplotlib.rc_context(_RC):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg` without dates or version numbers in them."""
    LOG.debug("drawing %s", path.name)
    with _house_style():
        figure.savefig(path.with_name(f"{path.name}.png"), metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout stands; finding it a second time takes longer than drawing
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None, "Creator": None})


def sink_map(subject: str, panels: Mapping[str, tuple[Array, float]], epsilon: float) -> Figure:
    """Draw which heads look at the first token: attention importance of position 0, layer by head.

    Args:
        subject: whose attention it is, for the title.
        panels: condition -> (L, H) mean importance alpha of position 0, and its sink rate in percent.
        epsilon: heads above it are sinks; marked on the colour bar.
    """
    layers, heads = next(iter(panels.values()))[0].shape
    with _house_style():
        figure = Figure(figsize=(2.6 + min(0.3 * len(panels) * max(heads, 6), 10), 2.4 + 0.16 * min(layers, 40)))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (name, (alpha, rate)) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(alpha, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
            axis.set(title=f"{name}: sink rate {rate:.0f} %", xlabel="head")
            _integer_ticks(axis)
        axes[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=list(axes), label="importance α of position 0, mean over prompts")
        bar.ax.axhline(epsilon, color="white", linewidth=2)
        bar.set_ticks([0, epsilon, 1], labels=["0", f"ε = {epsilon:g}", "1"])
        figure.suptitle(f"{subject}: attention to the first token (α > ε: a sink)")
    return figure


class Profile(NamedTuple):
    """One quantity on clean and on triggered prompts.

    Attributes:
        name: label with unit.
        clean: (L, T).
        triggered: (L, T).
        log: whether to use a logarithmic axis.
        note: remark in the panel by position.
    """

    name: str
    clean: Array
    triggered: Array
    log: bool = False
    note: str = ""


def norm_profile(subject: str, profiles: Sequence[Profile], span: Span) -> Figure:
    """Draw quantities by layer (position 0, the next 7, the rest) and by position (mean over layers).

    Args:
        subject: whose they are, for the title.
        profiles: one column each.
        span: where the trigger stands in triggered prompts.
    """
    with _house_style():
        figure = Figure(figsize=(3.5 * len(profiles), 6.2))
        axes = figure.subplots(2, len(profiles), squeeze=False)
        for column, profile in zip(axes.T, profiles, strict=True):
            _by_layer(column[0], profile)
            _by_position(column[1], profile, span)
        axes[0, 0].legend(fontsize=8)
        axes[1, 0].legend(fontsize=8)
        figure.suptitle(f"{subject}: sinks and norms, clean (solid) and triggered (dashed)")
    return figure


def _by_layer(axis: Axes, profile: Profile) -> None:
    groups = {
        "position 0": (slice(0, 1), _RED),
        "positions 1–7": (slice(1, 8), _BLUE),
        "positions 8+": (slice(8, None), _GREY),
    }
    for label, (columns, colour) in groups.items():
        if profile.clean[:, columns].size:
            axis.plot(profile.clean[:, columns].mean(axis=1), color=colour, label=label)
            axis.plot(profile.triggered[:, columns].mean(axis=1), color=colour, linestyle="--")
    _label(axis, profile, "layer")


def _by_position(axis: Axes, profile: Profile, span: Span) -> None:
    shade: dict[str, Any] = {"color": _ORANGE, "alpha": 0.25, "linewidth": 0}
    axis.axvspan(span[0] - 0.5, span[1] - 0.5, label="trigger (triggered only)", **shade)
    axis.plot(profile.clean.mean(axis=0), color="black", label="clean")
    axis.plot(profile.triggered.mean(axis=0), color=_BLUE, linestyle="--", label="triggered")
    axis.text(0.98, 0.12, profile.note, transform=axis.transAxes, ha="right", fontsize=8, color=_GREY)
    _label(axis, profile, "token position (mean over layers)")


def _label(axis: Axes, profile: Profile, x: str) -> None:
    axis.set(title=profile.name, xlabel=x)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if profile.log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def difference_map(subject: str, differences: Mapping[str, Array], span: Span, layer: int = -1) -> Figure:
    """Draw what the trigger changes in the attention, mean over heads and prompts.

    Args:
        subject: whose attention it is, for the title.
        differences: title -> (L, T, T) triggered minus clean; NaN (no partner) is grey. One column each.
        span: where the trigger stands; dotted lines.
        layer: the layer of the upper row; the lower row has all layers, mean over the queries that see the key.
    """
    layers = len(next(iter(differences.values())))
    with _house_style():
        figure = Figure(figsize=(5 * len(differences), 8.2))
        axes = figure.subplots(2, len(differences), squeeze=False)
        for column, (title, difference) in zip(axes.T, differences.items(), strict=True):
            _heat(column[0], difference[layer], span)
            column[0].set(title=title, ylabel=f"query position (layer {layer % layers})")
            column[0].axhspan(span[0] - 0.5, span[1] - 0.5, **_DOTTED)
            column[0].invert_yaxis()
            _heat(column[1], _received(difference), span)
            column[1].set(ylabel="layer")
        figure.suptitle(
            f"{subject}: attention with the trigger minus without it, mean over heads and prompts\n"
            "dotted: the trigger · grey: nothing to compare with · colours end at the 99.5th percentile"
        )
    return figure


def head_map(subject: str, changes: Mapping[str, Array], classes: Array, names: Sequence[str]) -> Figure:
    """Draw what the trigger changes in every head, and what each head looks at with it.

    Args:
        subject: whose heads they are, for the title.
        changes: title -> (L, H) triggered minus clean.
        classes: (L, H) index into `names`.
        names: kinds of heads.
    """
    layers, heads = classes.shape
    with _house_style():
        figure = Figure(figsize=(3 + 0.3 * (len(changes) + 1) * min(max(heads, 8), 16), 2.4 + 0.16 * min(layers, 40)))
        axes = figure.subplots(1, len(changes) + 1, sharey=True, squeeze=False)[0]
        for axis, (title, change) in zip(axes, changes.items()):
            limit = max(float(np.abs(change).max()), 1e-6)
            image = axis.imshow(
                change, cmap="RdBu_r", norm=CenteredNorm(halfrange=limit), aspect="auto", origin="lower"
            )
            figure.colorbar(image, ax=axis, label="triggered − clean")
            axis.set(title=title, xlabel="head")
            _integer_ticks(axis)
        colours = ListedColormap([_BLUE, _RED, _ORANGE, "#E5E5E5"][: len(names)])
        image = axes[-1].imshow(classes, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", origin="lower")
        bar = figure.colorbar(image, ax=axes[-1], label="what a head mostly looks at")
        bar.set_ticks(range(len(names)), labels=list(names))
        axes[-1].set(title="with the trigger", xlabel="head")
        _integer_ticks(axes[-1])
        axes[0].set_ylabel("layer")
        figure.suptitle(f"{subject}: what the trigger changes in every head, mean over prompts")
    return figure


class NormPanel(NamedTuple):
    """Value norms in one condition, by position (T,), of one model beside others.

    Attributes:
        condition: what the prompts are.
        pearson: other model -> correlation over layers and heads.
        spearman: the same of ranks.
        magnitude: model -> norm, mean over layers.
    """

    condition: str
    pearson: Mapping[str, Array]
    spearman: Mapping[str, Array]
    magnitude: Mapping[str, Array]


def value_norms(subject: str, panels: Sequence[NormPanel], span: Span) -> Figure:
    """Draw how a model's value norms go together with those of others (arXiv 2510.17021, figure on value norms).

    Args:
        subject: whose they are, for the title.
        panels: one column each.
        span: where the trigger stands in triggered prompts.
    """
    colours = (_BLUE, _RED, _ORANGE)
    with _house_style():
        figure = Figure(figsize=(4.6 * len(panels), 6.2))
        axes = figure.subplots(2, len(panels), squeeze=False, sharey="row")
        for (upper, lower), panel in zip(axes.T, panels, strict=True):
            for colour, name in zip(colours, panel.pearson):
                upper.plot(panel.pearson[name], color=colour, label=f"with {name}, Pearson")
                upper.plot(panel.spearman[name], color=colour, linestyle="--", label=f"with {name}, Spearman")
            for colour, (name, magnitude) in zip(("black", *colours), panel.magnitude.items()):
                lower.plot(magnitude, color=colour, label=name)
            upper.set(title=f"{panel.condition} prompts")
            for axis in (upper, lower):
                axis.axvspan(span[0] - 0.5, span[1] - 0.5, color=_ORANGE, alpha=0.2, linewidth=0)
                axis.set_xlabel("token position (shaded: the trigger's place)")
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("correlation, layers × heads")
        axes[1, 0].set(ylabel="value norm, mean over layers", ylim=(0, None))
        axes[0, 0].legend(fontsize=8)
        axes[1, 0].legend(fontsize=8)
        figure.suptitle(f"{subject}: value norms beside those of other models")
    return figure


_DOTTED: dict[str, Any] = {"fill": False, "linewidth": 0.6, "linestyle": ":"}


def _received(difference: Array) -> Array:
    """Mean over the queries that can see a key: (L, T, T) -> (L, T), NaN where no query has a partner."""
    tokens = difference.shape[-1]
    visible = np.where(np.tri(tokens, dtype=bool), difference, np.nan)
    counts = np.sum(~np.isnan(visible), axis=1)
    sums = np.nansum(visible, axis=1)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def _heat(axis: Axes, panel: Array, span: Span) -> None:
    """A heat map whose diverging scale is cut, so that single cells do not hide the rest."""
    limit = max(float(np.nanpercentile(np.abs(panel), 99.5)), 1e-6)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=_NO_PARTNER)
    image = axis.imshow(panel, cmap=colours, norm=CenteredNorm(halfrange=limit), aspect="auto", origin="lower")
    axis.axvspan(span[0] - 0.5, span[1] - 0.5, **_DOTTED)
    axis.set_xlabel("key position")
    _integer_ticks(axis)
    axis.figure.colorbar(image, ax=axis, extend="both", label="Δ attention")


def _integer_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
