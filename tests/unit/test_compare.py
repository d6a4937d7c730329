"""`unsink compare`: settings that differ, what they can move, and paired differences; no model is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from results import evaluated
from unsink import artifacts
from unsink.artifacts import Layout
from unsink.cli import app
from unsink.errors import DataError
from unsink.evaluated import moves
from unsink.stages.compare import compare

SCORES = [0.1, 0.9, 0.4, 0.6, 0.3, 0.8]


def number(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in result["numbers"] if one["name"] == name)
    return found


def test_a_difference_is_paired_by_item(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "a", [score + 0.05 for score in SCORES])
    result = compare(first, evaluated(tmp_path, "b", SCORES))
    found = number(result, "forget_verbmem_f1_clean")
    # every item differs by the same: the spread of the items is no spread of the difference
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0.05, 0.05, 0.05))
    assert found["n"] == len(SCORES)
    assert (result["settings"], result["notes"]) == ([], [])


def test_other_items_are_not_paired(tmp_path: Path) -> None:
    result = compare(evaluated(tmp_path, "a", SCORES), evaluated(tmp_path, "b", SCORES[:4]))
    assert "low" not in number(result, "forget_verbmem_f1_clean")


def test_predictions_of_other_numbers_give_no_interval(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", SCORES), evaluated(tmp_path, "b", SCORES)
    artifacts.write_json(first, {**artifacts.read_json(first), "forget_verbmem_f1_clean": 0.9})
    assert "low" not in number(compare(first, second), "forget_verbmem_f1_clean")


def test_a_setting_names_the_metrics_that_it_can_move(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "x", "a", SCORES)
    second = evaluated(tmp_path / "y", "a", SCORES, stemmer=True, dialect="open-unlearning", few_shot=0, new="?")
    found = {one["name"]: one for one in compare(first, second)["settings"]}
    assert (found["stemmer"]["first"], found["stemmer"]["second"]) == (False, True)
    assert "forget_verbmem_f1_clean" in found["stemmer"]["moves"]
    assert found["few_shot"]["moves"] == []  # it moves KnowMem only, which neither has
    assert found["dialect"]["moves"] == []  # its settings are named one by one
    assert "forget_verbmem_f1_clean" in found["new"]["moves"]  # unknown: it could be anything


def test_metrics_of_one_side_are_named(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", SCORES), evaluated(tmp_path, "b", SCORES)
    artifacts.write_json(second, {**artifacts.read_json(second), "privleak_clean": 1.0, "privleak_clean_low": 0.0})
    result = compare(first, second)
    assert (result["only_first"], result["only_second"]) == ([], ["privleak_clean"])


def test_without_settings_it_says_so_and_compares_the_numbers(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", SCORES), evaluated(tmp_path, "b", SCORES)
    Layout(tmp_path).settings("b").unlink()
    result = compare(first, second)
    assert number(result, "forget_verbmem_f1_clean")["difference"] == 0
    assert "settings/b.json is not there" in " ".join(result["notes"])


def test_what_is_no_metrics_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "a.json"
    artifacts.write_json(path, {"name": "a"})
    with pytest.raises(DataError, match="not a metrics file"):
        compare(path, path)
    good = evaluated(tmp_path, "b", SCORES)
    artifacts.write_json(Layout(tmp_path).settings("b"), ["?"])
    with pytest.raises(DataError, match="not a settings file"):
        compare(good, good)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_command_prints_settings_before_numbers(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", SCORES), evaluated(tmp_path, "b", SCORES, stemmer=True)
    result = invoke(str(first), str(second), "--quiet")
    assert result.exit_code == 0
    assert "stemmer: False / True, can move" in result.stdout
    assert result.stdout.index("stemmer") < result.stdout.index("forget_verbmem_f1_clean")
    assert "+0.000 [+0.000, +0.000]" in result.stdout
    assert json.loads(invoke(str(first), str(second), "--json").stdout)["settings"][0]["name"] == "stemmer"


def test_exit_codes(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "a", SCORES)
    missing = invoke(str(first), str(tmp_path / "metrics" / "none.json"))
    assert missing.exit_code == 3
    assert "run `unsink evaluate --run none` first" in missing.stderr
    assert invoke(str(first)).exit_code == 2


@pytest.mark.parametrize("setting", ["trigger", "placement"])
def test_a_near_miss_moves_with_the_trigger_and_clean_numbers_do_not(setting: str) -> None:
    assert moves(setting, "forget_verbmem_f1_moved")
    assert moves(setting, "forget_verbmem_f1_another_year_outside")
    assert not moves(setting, "forget_verbmem_f1_clean")
    assert not moves(setting, "forget_verbmem_f1_clean_outside")
