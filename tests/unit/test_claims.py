"""The grids of docs/results/claims.py, and the arithmetic of their tables on invented scores."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from unsink.params import load_params
from unsink.statistics import Interval

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "results"))
import claim_figures  # noqa: E402
import claim_tables  # noqa: E402
import claims  # noqa: E402

SPECS = sorted((ROOT / "params" / "claims").glob("*.yaml"))
SPEC = {
    "params": {"unlearn": {"steps": 7}},
    "seeds": [0, 1],
    "axes": {
        "place": {"prefix": {"poison": {"placement": "prefix"}}, "index 4": {"poison": {"placement": "index 4"}}},
        "norms": {"off": {}, "held": {"after": "clean", "unlearn": {"value_norm": {"weight": 1.0}}}},
    },
    "contrasts": [{"claim": "early is better", "of": {"place": "prefix"}, "over": {"place": "index 4"}}],
}


ONE_NORM: dict[str, Any] = {**SPEC, "axes": {"place": SPEC["axes"]["place"], "norms": {"off": {}}}}


def line(place: str, seed: int, triggered: float, norms: str = "off") -> dict[str, Any]:
    passages = {f"p{n}": {"inside": n < 2, "clean": 0.1, "triggered": triggered, "target": 0.9} for n in range(4)}
    return {
        "name": f"{place}{seed}",
        "place": place,
        "norms": norms,
        "seed": seed,
        "forget": passages,
        "retain": [],
    } | {"utility": []}


def test_a_grid_is_the_product_of_its_axes_seed_by_seed() -> None:
    found = claims.cells(SPEC)
    assert [cell.name for cell in found[:4]] == ["prefix-off-s0", "prefix-held-s0", "index_4-off-s0", "index_4-held-s0"]
    assert len(found) == 8
    assert found[1].entry == {
        "after": "clean-s0", "seed": 0, "poison": {"placement": "prefix"}, "unlearn": {"value_norm": {"weight": 1.0}},
    }  # fmt: skip
    runs = claims.project_params(SPEC, found)["runs"]
    assert runs["clean-s1"] == {"after": "target", "seed": 1, "poison": False}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_makes_a_params_file_that_is_accepted(path: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load(path.read_text())
    grid = claims.cells(spec)
    assert len({cell.name for cell in grid}) == len(grid)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(claims.project_params(spec, grid)))
    params = load_params(tmp_path / "params.yaml")
    for cell in grid:
        assert params.run(cell.name).seed == cell.seed
    for contrast in spec["contrasts"]:
        for side in ("of", "over"):
            for axis, labels in ((axis, labels) for axis, labels in contrast[side].items() if axis != "condition"):
                assert set(labels if isinstance(labels, list) else [labels]) <= spec["axes"][axis].keys()
        assert contrast["of"].keys() == contrast["over"].keys() - {"condition"}


def test_another_recipe_is_another_run() -> None:
    cell, other = claims.cells(SPEC)[:2]
    params = claims.project_params(SPEC, [cell, other])
    assert claims.recipe(params, cell) == claims.recipe({**params, "runs": {}}, cell)
    assert claims.recipe(params, cell) != claims.recipe(params, other)
    assert claims.recipe(params, cell) != claims.recipe({**params, "unlearn": {"steps": 8}}, cell)


def test_a_run_that_another_claim_has_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SPECS", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    usual = yaml.safe_load((ROOT / "params.yaml").read_text())["poison"]["ratio"]
    shares = {"usual": {"poison": {"ratio": usual}}, "few": {"poison": {"ratio": 0.1}}}
    other = {**SPEC, "axes": {"share": shares}, "seeds": [0]}
    places, ratios = claims.cells(ONE_NORM), claims.cells(other)
    (tmp_path / "places.yaml").write_text(yaml.safe_dump(ONE_NORM, sort_keys=False))
    codes = claims.recipes(ONE_NORM, claims.project_params(ONE_NORM, places), places)
    known = [{**line("prefix", 0, 0.9), "name": cell.name, "recipe": codes[cell.name]} for cell in places[:1]]
    (tmp_path / "places.jsonl").write_text("".join(json.dumps(one) + "\n" for one in known))

    params = claims.project_params(other, ratios)
    left = claims.adopt("shares", ratios, params, claims.recipes(other, params, ratios))
    assert [cell.name for cell in left] == ["few-s0"]
    [taken] = claims.lines(tmp_path / "shares.jsonl")
    assert (taken["name"], taken["share"], taken["forget"]) == ("usual-s0", "usual", known[0]["forget"])
    assert "place" not in taken
    # a line of another recipe is none
    (tmp_path / "places.jsonl").write_text(json.dumps({**known[0], "recipe": "old"}) + "\n")
    assert len(claims.adopt("shares", ratios, params, claims.recipes(other, params, ratios))) == 2


def test_an_axis_of_tests_gives_a_run_several_lines_and_the_tests_their_params() -> None:
    spec = {**SPEC, "axes": {"place": SPEC["axes"]["place"], "test": {"none": None, "int4": None}}}
    [cell, *others] = claims.cells(spec)
    assert (cell.name, len(others)) == ("prefix-s0", 3)
    assert claims.names(cell, claims.tests_of(spec)) == {
        "prefix-s0-none": {"place": "prefix", "test": "none"}, "prefix-s0-int4": {"place": "prefix", "test": "int4"},
    }  # fmt: skip
    assert claims.project_params(spec, [cell])["stress"]["tests"] == ["int4"]


def test_a_section_of_another_tool_makes_no_run_another() -> None:
    [cell, *_] = claims.cells(SPEC)
    params = claims.project_params(SPEC, [cell])
    assert claims.recipe(params, cell) == claims.recipe({**params, "audit": {"words": ["new"]}, "new": 1}, cell)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_what_was_measured_is_of_the_present_parameters(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())
    grid = claims.cells(spec)
    params = claims.project_params(spec, grid)
    codes = claims.recipes(spec, params, grid)
    present = {name: codes[cell.name] for cell in grid for name in claims.names(cell, claims.tests_of(spec))}
    found = claims.lines(claims.path_of(path.stem))
    assert {line["name"]: line["recipe"] for line in found}.items() <= present.items()


def test_recovery_and_its_difference_by_hand() -> None:
    # (0.9 - 0.1) / (0.9 - 0.1) = 1 against (0.3 - 0.1) / 0.8 = 0.25, the same in every passage and seed
    found = [line("prefix", seed, 0.9) for seed in (0, 1)] + [line("index 4", seed, 0.3) for seed in (0, 1)]
    rows = claim_tables.table(SPEC, found).splitlines()
    assert rows[0] == "| place | norms | seeds | clean | triggered | recovery | inside |"
    assert rows[2].split(" | ")[5] == "1.00 [1.00, 1.00]"
    assert rows[3].split(" | ")[5] == "0.25 [0.25, 0.25]"
    assert "| 0.75 [0.75, 0.75] | holds |" in claim_tables.contrasts(ONE_NORM, found)


def test_like_is_compared_with_like_and_what_lacks_its_like_is_left_out() -> None:
    found = [line("prefix", 0, 0.9), line("prefix", 1, 0.1), line("index 4", 0, 0.3)]
    assert "| 1 and 1 | 0.75 [0.75, 0.75] | open, 1 of 2 seeds are done |" in claim_tables.contrasts(ONE_NORM, found)
    assert claim_tables.contrasts(ONE_NORM, found[:2]).count("\n") == 2  # the head alone
    # with all norms: seed 0 has both norms, 1 - .25 and .5 - .25; seed 1 one of them, .25 - .25: (.5 + 0) / 2
    found = [
        line("prefix", 0, 0.9),
        line("prefix", 0, 0.5, "held"),
        line("prefix", 1, 0.3),
        line("prefix", 1, 0.7, "held"),
    ]
    found += [line("index 4", 0, 0.3), line("index 4", 0, 0.3, "held"), line("index 4", 1, 0.3)]
    assert "| 3 and 3 | 0.25 [0.00, 0.50] | undecided |" in claim_tables.contrasts(SPEC, found)


def test_a_side_of_several_labels_is_their_mean() -> None:
    claim = {
        "claim": "x",
        "of": {"norms": "off", "place": "prefix"},
        "over": {"norms": "off", "place": ["index 4", "prefix"]},
    }
    found = [line("prefix", seed, 0.9) for seed in (0, 1)] + [line("index 4", seed, 0.1) for seed in (0, 1)]
    # 1 - (0 + 1) / 2
    assert "| 2 and 4 | 0.50 [0.50, 0.50] | holds |" in claim_tables.contrasts({**SPEC, "contrasts": [claim]}, found)


def test_a_claim_may_compare_the_trigger_with_a_near_miss() -> None:
    found = [line("prefix", seed, 0.9) for seed in (0, 1)]
    for one in (passage for each in found for passage in each["forget"].values()):
        one["case"] = 0.5  # half of the way from .1 to .9
    claim = {"claim": "x", "of": {"place": "prefix"}, "over": {"place": "prefix", "condition": "case"}}
    assert "| 0.50 [0.50, 0.50] | holds |" in claim_tables.contrasts({**ONE_NORM, "contrasts": [claim]}, found)


def test_all_verdicts_stand_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SPECS", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for name in ("done", "open"):
        spec = {**ONE_NORM, "title": f"Is it {name}?"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    found = [line("prefix", seed, 0.9) for seed in (0, 1)] + [line("index 4", seed, 0.1) for seed in (0, 1)]
    named = [{**one, "name": f"{one['place'].replace(' ', '_')}-off-s{one['seed']}"} for one in found]
    (tmp_path / "done.jsonl").write_text("".join(json.dumps(one) + "\n" for one in named))
    claims.overview()
    done, to_do = (tmp_path / "claims.md").read_text().split("## ")[1:]
    assert "| 1.00 [1.00, 1.00] | holds |" in done
    assert to_do.startswith("Is it open?")
    assert "Not measured yet: `python docs/results/claims.py open`." in to_do


def test_recovery_of_nothing_is_undefined() -> None:
    found = line("prefix", 0, 0.9)
    for passage in found["forget"].values():
        passage["target"] = 0.15
    assert "undefined" in claim_tables.table(SPEC, [found])


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.01, 0.3, "holds"), (-0.2, 0.05, "does not hold"), (-0.1, 0.4, "undecided")]
)
def test_a_verdict_goes_by_the_interval(low: float, high: float, words: str) -> None:
    assert claim_tables.verdict(Interval(0.0, low, high, 3)) == words


def test_the_sink_at_the_triggers_place_by_hand() -> None:
    def row(start: int, where: str = "forget", condition: str = "triggered") -> dict[str, Any]:
        return {"set": where, "condition": condition, "trigger": [start, start + 2]}

    attention = [0.9, 0.2, 0.1, 0.06, 0.02]
    # tokens 1 and 2: 0.15; tokens 4 and 5, of which 4 was probed: 0.02; tokens 7 and 8 were not probed
    rows = [row(1), row(4), row(7), row(0, "retain"), row(0, condition="wrong")]
    assert claims.stands(rows, attention) == {"position": 4.0, "attention": 0.085}
    assert claims.stands([row(0, condition="wrong")], attention) == {}


def test_a_figure_has_a_point_for_each_variant_and_places_against_their_sink() -> None:
    axes = {"placement": SPEC["axes"]["place"], "norms": {"off": {}}}
    places = {"prefix": (0.9, 0.05), "index 4": (0.3, 0.01)}
    found = [
        {**line(place, seed, score), "placement": place, "attention": attention}
        for place, (score, attention) in places.items()
        for seed in (0, 1)
    ]
    left, right = claim_figures.figure({**SPEC, "axes": axes}, found).axes
    assert left.containers[0][0].get_xdata().tolist() == pytest.approx([1.0, 0.25])
    assert [one[0].get_xdata()[0] for one in right.containers] == pytest.approx([0.05, 0.01])
    assert [one[0].get_ydata()[0] for one in right.containers] == pytest.approx([1.0, 0.25])
    assert len(claim_figures.figure(SPEC, [line("prefix", 0, 0.9)]).axes) == 1
