"""Plug-ins found by folder scan."""

import sys
from pathlib import Path

import pytest

from unsink import registry
from unsink.errors import ParamsError


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with two plug-ins, one of which cannot be imported."""
    package = tmp_path / "some_plugins"
    package.mkdir()
    for name, text in {"__init__": "", "good": "VALUE = 1", "broken": "raise RuntimeError", "_private": ""}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_plugins", raising=False)
    return "some_plugins"


def test_names_are_the_files_of_the_folder_and_nothing_is_imported(plugins: str) -> None:
    assert registry.names(plugins) == ["broken", "good"]
    assert f"{plugins}.good" not in sys.modules


def test_a_package_that_does_not_exist_has_no_names() -> None:
    assert registry.names("no_such_package") == []


def test_load_imports_the_one_that_is_named(plugins: str) -> None:
    assert registry.load("thing", plugins, "good").VALUE == 1


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(plugins: str) -> None:
    with pytest.raises(ParamsError) as caught:
        registry.load("thing", plugins, "goood")
    assert caught.value.message == "unknown thing 'goood'; did you mean 'good'? (available: broken, good)"


def test_a_mistake_inside_a_plugin_is_not_hidden(plugins: str) -> None:
    with pytest.raises(RuntimeError):
        registry.load("thing", plugins, "broken")


def test_suggest_says_nothing_when_nothing_is_near() -> None:
    assert registry.suggest("xyz", ["forget", "retain"]) == ""
