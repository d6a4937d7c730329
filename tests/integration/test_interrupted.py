"""Ctrl-C in the middle of a long stage: what was asked is kept, and the end is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.projects import project
from unsink.stages import evaluate, stress
from unsink.tasks import generation, passages


def counted(calls: list[object], work: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return work(*arguments, **named)

    return call


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stopped_at_passages(params: Any, layout: Any, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stop an evaluation of the target at its passages; what is generated, now and later, adds to the list."""
    calls: list[object] = []
    monkeypatch.setattr(generation, "answer", counted(calls, generation.answer))
    with monkeypatch.context() as patch:
        patch.setattr(passages, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(params, layout, run="target")
    return calls


def test_an_interrupted_evaluation_goes_on_where_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = project(copy, "evaluate.bootstrap=100")
    files = [layout.predictions("target"), layout.metrics("target"), layout.settings("target")]
    evaluate.run(params, layout, run="target")
    whole = [path.read_bytes() for path in files]
    calls = stopped_at_passages(params, layout, monkeypatch)
    assert len(calls) == 1
    assert [path.read_bytes() for path in files] == whole
    evaluate.run(params, layout, run="target")
    assert len(calls) == 1
    assert [path.read_bytes() for path in files] == whole
    assert [*copy.glob("checkpoints/*")] == []


def test_what_is_kept_of_other_settings_is_not_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = project(copy, "evaluate.bootstrap=100")
    calls = stopped_at_passages(params, layout, monkeypatch)
    changed, _ = project(copy, "evaluate.bootstrap=100", "evaluate.verbmem_tokens=4")
    evaluate.run(changed, layout, run="target")
    assert len(calls) == 2


def test_an_interrupted_stress_test_loses_no_finished_test(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = project(copy, "evaluate.bootstrap=100", "stress.tests=[int8, int4]")
    loads: list[object] = []
    monkeypatch.setattr(stress, "load", counted(loads, stress.load))
    rounding = stress._after

    def second(test: str, *rest: Any) -> Any:
        return interrupted() if test == "int4" else rounding(test, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stress, "_after", second)
        with pytest.raises(KeyboardInterrupt):
            stress.run(params, layout, run="target")
    assert len(loads) == 3
    assert set(stress.run(params, layout, run="target")) == {"run", "none", "int8", "int4"}
    assert len(loads) == 4
