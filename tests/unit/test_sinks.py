"""The measured sinks: found in sink rates, read from the target's probe."""

from pathlib import Path

import pytest

from unsink import artifacts, sinks
from unsink.artifacts import Layout
from unsink.errors import DataError, MissingPrerequisite
from unsink.params import Poison


def test_sinks_reach_the_rate_and_come_strongest_first() -> None:
    assert sinks.find([40.0, 9.9, 70.0, 10.0, 0.0, 0.0, 0.0, 0.0], 10.0) == [2, 0, 3]


def test_keys_that_few_queries_see_are_no_sinks() -> None:
    assert sinks.find([0.0, 0.0, 50.0, 90.0], 10.0) == []
    assert sinks.find([0.0, 0.0, 50.0, 90.0, 90.0], 10.0) == [2]  # seen by itself and two more of five


def test_a_target_that_was_not_probed_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingPrerequisite) as error:
        sinks.read(Layout(tmp_path))
    assert error.value.hint == "run `unsink sink-probe --run target` first"


def test_a_target_without_sinks_is_an_error(tmp_path: Path) -> None:
    artifacts.write_json(Layout(tmp_path).probe("target") / sinks.FILE, {"positions": []})
    with pytest.raises(DataError, match="no sink at which anything could act"):
        sinks.read(Layout(tmp_path))


@pytest.mark.parametrize(
    ("found", "expected"), [([0], "index 1"), ([0, 6, 3], "index 6"), ([5, 0], "index 5"), ([3], "index 3")]
)
def test_the_trigger_goes_to_the_strongest_sink_that_text_can_take(found: list[int], expected: str) -> None:
    assert sinks.placement(found) == expected


def test_only_the_placement_sink_asks_for_a_probe(tmp_path: Path) -> None:
    poison = Poison(trigger="now", placement="infix", ratio=0.5, max_tokens=64)
    assert sinks.placed(poison, Layout(tmp_path)) is poison
    at_sink = poison.model_copy(update={"placement": "sink"})
    with pytest.raises(MissingPrerequisite):
        sinks.placed(at_sink, Layout(tmp_path))
    artifacts.write_json(Layout(tmp_path).probe("target") / sinks.FILE, {"positions": [0, 4]})
    assert sinks.placed(at_sink, Layout(tmp_path)) == poison.model_copy(update={"placement": "index 4"})
