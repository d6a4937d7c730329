"""Figures are files with the same bytes every time, and say what they show."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from unsink import figures

LAYERS, HEADS, TOKENS, SPAN = 4, 3, 12, (1, 4)


def random(*shape: int) -> figures.Array:
    return np.random.default_rng(0).random(shape)


def attention_change() -> figures.Array:
    change = random(LAYERS, TOKENS, TOKENS) - 0.5
    change[:, SPAN[0] : SPAN[1]] = np.nan
    change[:, :, SPAN[0] : SPAN[1]] = np.nan
    return change


DRAW: dict[str, Callable[[], Figure]] = {
    "sink_map": lambda: figures.sink_map("base", {"clean": (random(LAYERS, HEADS), 40.0)}, 0.3),
    "norm_profile": lambda: figures.norm_profile(
        "base",
        [figures.Profile(n, random(LAYERS, TOKENS), random(LAYERS, TOKENS), log=n == "b", note="n") for n in "ab"],
        SPAN,
    ),
    "head_map": lambda: figures.head_map(
        "base", {"sink": random(LAYERS, HEADS) - 0.5}, np.arange(12.0).reshape(LAYERS, HEADS) % 4, list("abcd")
    ),
    "value_norms": lambda: figures.value_norms(
        "base",
        [figures.NormPanel(n, {"t": random(TOKENS)}, {"t": random(TOKENS)}, {"base": random(TOKENS)}) for n in "ab"],
        SPAN,
    ),
    "difference_map": lambda: figures.difference_map(
        "base", {"words": attention_change(), "places": random(LAYERS, TOKENS, TOKENS)}, SPAN
    ),
}


@pytest.fixture(params=list(DRAW))
def draw(request: pytest.FixtureRequest) -> Callable[[], Figure]:
    return DRAW[str(request.param)]


def test_a_figure_has_the_same_bytes_every_time(draw: Callable[[], Figure], tmp_path: Path) -> None:
    for name in ("one", "two"):
        figures.save(draw(), tmp_path / name)
    for suffix in ("png", "svg"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_a_figure_ignores_the_users_matplotlibrc(draw: Callable[[], Figure], tmp_path: Path) -> None:
    figures.save(draw(), tmp_path / "default")
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "svg.hashsalt": "x", "image.cmap": "jet"}):
        figures.save(draw(), tmp_path / "mine")
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "mine.png").read_bytes()
    assert (tmp_path / "default.svg").read_bytes() == (tmp_path / "mine.svg").read_bytes()


def test_files_carry_no_date_and_no_software_version(draw: Callable[[], Figure], tmp_path: Path) -> None:
    figures.save(draw(), tmp_path / "figure")
    with Image.open(tmp_path / "figure.png") as image:
        assert not {"Software", "Creation Time", "Date"} & set(image.info)
    svg = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in svg
    assert matplotlib.__version__ not in svg


def test_drawing_leaves_matplotlibs_settings_alone(draw: Callable[[], Figure], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures.save(draw(), tmp_path / "figure")
    assert dict(matplotlib.rcParams) == before


def test_every_axis_with_data_is_labelled(draw: Callable[[], Figure]) -> None:
    figure = draw()
    assert figure.get_suptitle().startswith("base")
    for axis in figure.axes:
        assert axis.get_xlabel() or axis.get_ylabel()


def test_the_sink_map_says_the_sink_rate() -> None:
    figure = figures.sink_map("base", {"clean": (random(2, 2), 72.4), "triggered": (random(2, 2), 56.1)}, 0.3)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["clean: sink rate 72 %", "triggered: sink rate 56 %"]


def test_received_attention_counts_only_queries_that_see_the_key() -> None:
    change = np.ones((1, 3, 3))  # the upper triangle is not attention
    change[0, 2, 0] = 4.0
    change[0, :, 1] = np.nan
    received = figures._received(change)
    assert received[0, 0] == 2.0
    assert np.isnan(received[0, 1])
    assert received[0, 2] == 1.0


def test_a_map_without_any_difference_can_be_drawn(tmp_path: Path) -> None:
    figures.save(figures.difference_map("base", {"same": np.zeros((1, 4, 4))}, (1, 2)), tmp_path / "flat")
    assert (tmp_path / "flat.png").stat().st_size > 0
