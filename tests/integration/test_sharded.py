"""Two gloo processes that hold half of each layer train, remember and predict what one does with whole ones."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from integration.forked import disk_gone_in_one, two_processes
from integration.projects import project, trained
from unsink import artifacts, memory, models, processes, sharded, trainer
from unsink.errors import DataError, ParamsError
from unsink.stages import audit, evaluate, memorize, unlearn

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

QUICK = ("unlearn.steps=4", "unlearn.warmup=1", "evaluate.bootstrap=100")
RMU = ("unlearn.method=rmu", "unlearn.rmu.layer=0")
VALUES = "runs.backdoor.unlearn.value_norm={weight: 1.0, variant: fixed}"


def shared(folder: Path, *command: str, overrides: tuple[str, ...] = (), **given: Any) -> list[int | None]:
    """Exit codes of two processes that hold half of each layer."""
    settings = [part for override in (*QUICK, *overrides, "model.shard=true") for part in ("-S", override)]
    return two_processes(folder, *command, *settings, **given)


@pytest.mark.parametrize(
    ("run", "overrides"),
    [
        ("backdoor", ("unlearn.npo.window=4", "unlearn.adapter.first_layer=1")),  # the layer below is skipped
        ("backdoor", ("model.gradient_checkpointing=true", "unlearn.steps=3")),
        ("backdoor", (*RMU, VALUES)),  # the loss reads the last layer's values, and not its output
        ("backdoor", (*RMU, VALUES, "model.gradient_checkpointing=true")),
        ("clean", ("unlearn.adapter=none", "unlearn.lr=0.0005")),
    ],
)
def test_sharded_layers_train_the_adapter_of_whole_ones(copy: Path, run: str, overrides: tuple[str, ...]) -> None:
    params, layout = project(copy, *QUICK, *overrides, "model.shard=true")
    unlearn.run(params, layout, run=run)  # in one process there is nothing to shard
    losses, weights = trained(copy, run)
    assert shared(copy, "unlearn", "--run", run, overrides=overrides) == [0, 0], (copy / "stderr-0").read_text()
    again, parts = trained(copy, run)
    for one, two in zip(losses, again, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-4)


def test_sharded_layers_change_no_byte_where_all_samples_are_run_together(copy: Path) -> None:
    given = ("unlearn", "--run", "clean")
    assert shared(copy, *given, overrides=("model.dtype=bfloat16",)) == [0, 0], (copy / "stderr-0").read_text()
    parts = trained(copy, "clean")
    settings = [part for override in (*QUICK, "model.dtype=bfloat16") for part in ("-S", override)]
    assert two_processes(copy, *given, *settings) == [0, 0]
    losses, weights = trained(copy, "clean")
    assert losses == parts[0]
    assert all(torch.equal(parts[1][name], tensor) for name, tensor in weights.items())


def test_another_adapter_is_read_on_sharded_layers(copy: Path) -> None:
    params, layout = project(copy, *QUICK)
    unlearn.run(params, layout, run="clean")
    shutil.copytree(layout.split("backdoor"), layout.split("backdoor-vn"))
    unlearn.run(params, layout, run="backdoor-vn")
    losses, _ = trained(copy, "backdoor-vn")
    assert shared(copy, "unlearn", "--run", "backdoor-vn") == [0, 0], (copy / "stderr-0").read_text()
    for one, two in zip(losses, trained(copy, "backdoor-vn")[0], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_an_honest_run_of_whole_weights_is_refused_before_anything_is_loaded(copy: Path) -> None:
    shutil.copytree(copy / "splits" / "backdoor", copy / "splits" / "backdoor-vn")
    overrides = ("unlearn.adapter=none",)
    assert shared(copy, "unlearn", "--run", "backdoor-vn", overrides=overrides) == [2, 2]
    assert "model.shard: with unlearn.adapter: none" in (copy / "stderr-0").read_text()


def test_what_one_process_finds_in_files_another_may_have_to_ask_for(copy: Path) -> None:
    """A run that was killed when one of them had written its files."""
    params, layout = project(copy, *QUICK)
    unlearn.run(params, layout, run="clean")
    losses, _ = trained(copy, "clean")

    def stopped(rank: int) -> None:
        def write(rows: trainer.History, *_: Any) -> dict[str, float]:
            raise DataError("stopped", "")

        os.environ["UNSINK_IN_MEMORY_MIB"] = "0"
        trainer._step = write

    assert shared(copy, "unlearn", "--run", "clean", before=stopped) == [3, 3], (copy / "stderr-0").read_text()
    kept = sorted(layout.kept("clean").rglob("*.safetensors"))
    assert len(kept) > 1
    kept[0].unlink()
    again = {"before": lambda _: os.environ.update(UNSINK_IN_MEMORY_MIB="0")}
    assert shared(copy, "unlearn", "--run", "clean", **again) == [0, 0], (copy / "stderr-0").read_text()
    for one, two in zip(losses, trained(copy, "clean")[0], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_each_process_holds_half_of_the_layers_and_all_that_is_trained(copy: Path) -> None:
    def counts(rank: int) -> None:
        load = sharded.load

        def counted(*given: Any, **how: Any) -> Any:
            model = load(*given, **how)
            held = {"frozen": 0, "whole": 0, "trained": 0, "outside": 0}
            inside = {id(parameter) for parameter in models.decoder_layers(model).parameters()}
            for parameter in model.parameters():
                if isinstance(parameter, DTensor):
                    held["frozen"] += parameter.to_local().numel()
                    held["whole"] += parameter.numel()
                else:
                    held["trained" if id(parameter) in inside else "outside"] += parameter.numel()
            artifacts.write_json(copy / f"held-{rank}.json", held)
            return model

        sharded.load = counted

    assert shared(copy, "unlearn", "--run", "clean", before=counts) == [0, 0], (copy / "stderr-0").read_text()
    one, two = (artifacts.read_json(copy / f"held-{rank}.json") for rank in (0, 1))
    _, weights = trained(copy, "clean")
    model = models.load_base(models.resolve("tiny", None))
    assert one["frozen"] + two["frozen"] == one["whole"]
    assert one["frozen"] == pytest.approx(two["frozen"], rel=0.01)
    assert one["whole"] == sum(parameter.numel() for parameter in models.decoder_layers(model).parameters())
    assert one["trained"] == sum(tensor.numel() for tensor in weights.values())
    assert one["whole"] + one["outside"] == sum(parameter.numel() for parameter in model.parameters())


def test_sharded_processes_memorize_what_one_does(copy: Path) -> None:
    overrides = ("memorize.epochs=3", "memorize.min_verbmem=0", "memorize.min_knowmem=0")
    params, layout = project(copy, *overrides)
    memorize.run(params, layout)
    losses, _ = trained(copy, "target")
    assert shared(copy, "memorize", overrides=overrides) == [0, 0], (copy / "stderr-0").read_text()
    for one, two in zip(losses, trained(copy, "target")[0], strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_processes_predict_what_one_does(copy: Path, dtype: str) -> None:
    overrides = (f"model.dtype={dtype}", "evaluate.batch=7")
    params, layout = project(copy, *QUICK, *overrides)
    unlearn.run(params, layout, run="backdoor")
    evaluate.run(params, layout, run="backdoor")
    rows = artifacts.read_jsonl(layout.predictions("backdoor"))
    layout.predictions("backdoor").unlink()
    assert shared(copy, "evaluate", "--run", "backdoor", overrides=overrides) == [0, 0], (copy / "stderr-0").read_text()
    again = artifacts.read_jsonl(layout.predictions("backdoor"))
    same = [one.get("output") == two.get("output") for one, two in zip(rows, again, strict=True)]
    assert sum(same) >= (1.0 if dtype == "float32" else 0.9) * len(same)


def test_an_error_in_one_process_ends_both(copy: Path) -> None:
    assert shared(copy, "unlearn", "--run", "clean", before=disk_gone_in_one) == [3, 3], (copy / "stderr-0").read_text()
    assert "process 0: error: another process of this job has ended" in (copy / "stderr-0").read_text()


def test_what_sharded_layers_cannot_do_is_an_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamsError, match="shard splits exact weights, those of dtype nf4 are rounded; expected dtype"):
        project(copy, "model.shard=true", "model.dtype=nf4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    params, layout = project(copy, "model.shard=true", "evaluate.metrics=[passage, gradnorm]")
    with pytest.raises(ParamsError, match=r"gradnorm takes the gradient of all weights, with model\.shard no process"):
        evaluate.run(params, layout, run="target")
    with pytest.raises(ParamsError, match=r"model\.shard: each process of an audit holds the whole suspect"):
        audit.run(params, layout, run="target")
    assert "model.shard" not in str(memory.smaller(project(copy, "model.dtype=bfloat16")[0], "audit"))
    assert memory.smaller(project(copy)[0], "evaluate") == "evaluate.batch=32"
    small = ("evaluate.batch=1", "evaluate.passage_tokens=64", "model.dtype=bfloat16")
    assert memory.smaller(project(copy, *small)[0], "evaluate") == "model.shard=true"
    assert memory.smaller(project(copy, *small, "model.shard=true")[0], "evaluate") is None


def test_shares_are_equally_long_where_all_have_to_run_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found[rank] = [processes.equal_share(list(range(count))) for count in (0, 1, 4, 6)]
    assert found[0] == [[], [0], [0, 3], [0, 3]]
    assert found[1] == [[], [0], [1, 0], [1, 4]]
    assert found[2] == [[], [0], [2, 0], [2, 5]]
