"""On a GPU, in float32, each stage says what it says on the processor; and two processes that meet by NCCL do, too.

They need a CUDA device, and are skipped without one. One card is enough: each process tells NCCL that it is a machine
of its own.
"""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.forked import job
from integration.projects import project, trained
from unsink import artifacts, kept
from unsink.stages import ablate, audit, evaluate, memorize, mitigate, sink_probe, stress, unlearn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

ON_GPU = ("model.device=cuda",)
QUICK = ("unlearn.steps=6", "unlearn.warmup=1", "unlearn.checkpoint_every=4", "evaluate.bootstrap=100")
VALUES = "runs.backdoor.unlearn.value_norm={weight: 1.0, variant: fixed}"
METHODS = {
    "npo": ("unlearn.npo.window=4", VALUES),
    "npo, first layer frozen": ("unlearn.adapter.first_layer=1",),
    "npo, checkpointed": ("unlearn.npo.window=4", "model.gradient_checkpointing=true"),
    "rmu": ("unlearn.method=rmu", "unlearn.rmu.layer=1", "unlearn.rmu.kl=0.1", "unlearn.batch.forget=3"),
    "ceu": ("unlearn.method=ceu", VALUES),
    "whole weights": ("unlearn.adapter=none", "unlearn.lr=0.0005"),
}


def assert_same(one: tuple[list[list[float]], dict[str, torch.Tensor]], two: Any) -> None:
    for mine, theirs in zip(one[0], two[0], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-5)
    for name, tensor in one[1].items():
        torch.testing.assert_close(two[1][name], tensor, rtol=0, atol=2e-4)


def near(value: Any) -> Any:
    """A result whose numbers are taken to three digits."""
    if isinstance(value, dict):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, list):
        return [near(part) for part in value]
    return pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("room", ["", "0"])
def test_training_has_the_losses_and_the_adapter_of_the_processor(
    copy: Path, method: str, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*QUICK, *METHODS[method])
    unlearn.run(*project(copy, *overrides), run="backdoor")
    expected = trained(copy, "backdoor")
    monkeypatch.setenv(kept.ROOM, room)
    unlearn.run(*project(copy, *overrides, *ON_GPU), run="backdoor")
    assert_same(expected, trained(copy, "backdoor"))


def test_memorizing_has_the_losses_of_the_processor(copy: Path) -> None:
    overrides = ("memorize.epochs=3", "memorize.min_verbmem=0", "memorize.min_knowmem=0")
    shutil.rmtree(copy / "adapters" / "target")
    memorize.run(*project(copy, *overrides))
    losses, _ = trained(copy, "target")
    memorize.run(*project(copy, *overrides, *ON_GPU))
    for one, two in zip(losses, trained(copy, "target")[0], strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("run", ["target", "backdoor"])
def test_predictions_are_those_of_the_processor(copy: Path, run: str) -> None:
    if run != "target":
        unlearn.run(*project(copy, *QUICK), run=run)
    found = []
    for device in ((), ON_GPU):
        params, layout = project(copy, *QUICK, *device)
        evaluate.run(params, layout, run=run)
        found.append(artifacts.read_jsonl(layout.predictions(run)))
    assert len(found[0]) > 10
    assert found[1] == near(found[0])


def test_what_else_is_measured_is_what_the_processor_measures(copy: Path) -> None:
    overrides = (*QUICK, "audit.detectors=[shift, states, sweep]", "audit.budget=3000")
    unlearn.run(*project(copy, "evaluate.bootstrap=100"), run="backdoor")
    evaluate.run(*project(copy, *overrides), run="target")
    found: list[dict[str, Any]] = []
    for device in ((), ON_GPU):
        given = project(copy, *overrides, *device)
        sink_probe.run(*given, run="target")
        found.append(
            {
                "sink-probe": sink_probe.run(*given, run="backdoor"),
                "ablate": ablate.run(*given, run="backdoor"),
                "audit": audit.run(*given, run="backdoor")["verdict"],
                "stress": stress.run(*project(copy, *overrides, *device, "stress.tests=[int8]"), run="backdoor"),
                "mitigate": mitigate.run(*given, run="backdoor", how=["random-prefix"]),
            }
        )
    for name, result in found[0].items():
        assert found[1][name] == near(result), name


@pytest.mark.parametrize("more", [(), ("model.shard=true",), ("model.shard=true", "model.gradient_checkpointing=true")])
@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_two_processes_that_meet_by_nccl_train_the_adapter_of_one(
    copy: Path, method: str, more: tuple[str, ...]
) -> None:
    overrides = (*QUICK, *METHODS[method], *ON_GPU, *more)
    unlearn.run(*project(copy, *overrides), run="backdoor")
    expected = trained(copy, "backdoor")
    two_processes(copy, "unlearn", "--run", "backdoor", *overrides)
    assert_same(expected, trained(copy, "backdoor"))


@pytest.mark.parametrize("more", [(), ("model.shard=true", "evaluate.batch=7")])
def test_two_processes_that_meet_by_nccl_predict_what_one_does(copy: Path, more: tuple[str, ...]) -> None:
    overrides = (*QUICK, *ON_GPU, *more)
    params, layout = project(copy, *overrides)
    evaluate.run(params, layout, run="target")
    rows = artifacts.read_jsonl(layout.predictions("target"))
    layout.predictions("target").unlink()
    two_processes(copy, "evaluate", "--run", "target", *overrides)
    assert artifacts.read_jsonl(layout.predictions("target")) == near(rows)


def two_processes(folder: Path, *command: str) -> None:
    """Run a command in two processes on one card, which NCCL takes for two machines; what has a `=` is an override."""
    arguments = [part for one in command for part in (("-S", one) if "=" in one else (one,))]
    both = job() | {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    with ExitStack() as undo:
        started = []
        for rank in ("0", "1"):
            said = undo.enter_context((folder / f"stderr-{rank}").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", "unsink", *arguments, "--params", str(folder / "params.yaml")],
                env={**os.environ, **both, "RANK": rank, "NCCL_HOSTID": f"machine-{rank}"},
                stderr=said,
            )
            undo.callback(process.kill)
            started.append(process)
        codes = [process.wait(timeout=180) for process in started]
    assert codes == [0, 0], (folder / "stderr-0").read_text()
