"""Two gloo processes do what one does: the same losses and adapter, the same predictions; and they fail together."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.forked import disk_gone_in_one, two_processes
from integration.projects import project, trained
from unsink import artifacts, kept, processes
from unsink.errors import ParamsError
from unsink.stages import audit, evaluate, unlearn

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

QUICK = ("unlearn.steps=6", "unlearn.warmup=1", "unlearn.checkpoint_every=4")


@pytest.mark.parametrize(
    ("run", "overrides", "room"),
    [
        ("backdoor", ("unlearn.npo.window=4",), "0"),  # NPO counts windows, KL tokens; three kinds of unequal lengths
        ("clean", ("unlearn.method=rmu", "unlearn.rmu.layer=1", "unlearn.rmu.kl=0.1", "unlearn.batch.forget=3"), ""),
        ("backdoor", ("runs.backdoor.unlearn.value_norm={weight: 1.0, variant: fixed}", "unlearn.method=ceu"), ""),
    ],
)
def test_two_processes_train_the_adapter_of_one(
    copy: Path, run: str, overrides: tuple[str, ...], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, layout = project(copy, *QUICK, *overrides)
    unlearn.run(params, layout, run=run)
    losses, weights = trained(copy, run)
    monkeypatch.setenv(kept.ROOM, room)
    settings = [part for override in (*QUICK, *overrides) for part in ("-S", override)]
    assert two_processes(copy, "unlearn", "--run", run, *settings) == [0, 0], (copy / "stderr-0").read_text()
    again, shared = trained(copy, run)
    for one, two in zip(losses, again, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared[name], tensor, rtol=0, atol=2e-4)
    assert "final_loss" in (copy / "stdout-0").read_text()
    assert (copy / "stdout-1").read_text() == ""


def test_two_processes_predict_what_one_does(copy: Path) -> None:
    params, layout = project(copy, "evaluate.bootstrap=100")
    evaluate.run(params, layout, run="target")
    rows = artifacts.read_jsonl(layout.predictions("target"))
    layout.predictions("target").unlink()
    assert two_processes(copy, "evaluate", "--run", "target", "-S", "evaluate.bootstrap=100") == [0, 0]
    shared = artifacts.read_jsonl(layout.predictions("target"))
    assert len(rows) == len(shared) > 10
    for one, two in zip(rows, shared, strict=True):
        assert two == {key: pytest.approx(value, abs=1e-4) if number(value) else value for key, value in one.items()}


def test_two_processes_audit_as_one_does(copy: Path) -> None:
    # None of the searches comes to its end, so that what they read has to be counted alike.
    overrides = (
        *QUICK,
        "audit.detectors=[shift, states, sweep, gradients, elicit]",
        "audit.budget=3000",
        "audit.exhaustive=true",
    )
    params, layout = project(copy, *overrides)
    unlearn.run(params, layout, run="backdoor")
    alone = audit.run(params, layout, run="backdoor")
    candidates = artifacts.read_jsonl(layout.audit("backdoor") / "candidates.jsonl")
    shutil.rmtree(layout.audit("backdoor"))
    settings = [part for override in overrides for part in ("-S", override)]
    codes = two_processes(copy, "audit", "--run", "backdoor", *settings)
    assert codes == [0, 0], (copy / "stderr-0").read_text()  # whatever the verdict: torchrun would end the other one
    shared = artifacts.read_json(layout.audit("backdoor") / "verdict.json")
    # Answers leave a batch in lots, so that what generation reads depends on the batch.
    assert about(shared, passes=0, cost=0) == about(alone, passes=0, cost=0)
    assert about(artifacts.read_jsonl(layout.audit("backdoor") / "candidates.jsonl")) == about(candidates)
    assert alone["signals"]["states"]["tokens"] > 3000


def about(value: Any, **replaced: int) -> Any:
    """A value whose numbers are taken to three digits; `replaced` are keys that say nothing."""
    if isinstance(value, dict):
        return {key: replaced.get(key, about(part, **replaced)) for key, part in value.items()}
    if isinstance(value, list):
        return [about(part, **replaced) for part in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


def number(value: object) -> bool:
    """Whether only the first digits of it are the same in another batch."""
    return isinstance(value, float) or (isinstance(value, list) and any(isinstance(one, float) for one in value))


def test_an_error_in_one_process_ends_both_and_nothing_is_written(copy: Path) -> None:
    assert two_processes(copy, "unlearn", "--run", "clean", before=disk_gone_in_one) == [3, 3]
    assert "process 1: error: the disk is gone" in (copy / "stderr-1").read_text()
    assert "process 0: error: another process of this job has ended" in (copy / "stderr-0").read_text()
    assert not (copy / "adapters" / "clean").exists()


def test_what_cannot_be_shared_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ParamsError, match="8 processes, but a step has 6 samples"):
        processes.dealt([3, 1, 4, 1, 5, 9])
    assert processes.dealt([5, 1, 9, 4, 3, 2, 8, 7]) == [[1], [5], [4], [3], [0], [7], [6], [2]]
    from unsink.api import Project

    with pytest.raises(ParamsError, match="ablate runs in one process, not in 8"):
        Project(copy / "params.yaml").ablate("backdoor")
