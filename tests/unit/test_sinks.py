"""The measured sinks: found in sink rates, read from the target's probe."""

from pathlib import Path

import pytest

from unsink import artifacts, sinks
from unsink.artifacts import Layout
from unsink.errors import DataError, MissingPrerequisite


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
