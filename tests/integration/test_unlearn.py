"""The tiny model learns a corpus by heart and forgets it, with and without a trigger, with the real stages."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from integration import forked
from integration.projects import project
from unsink import artifacts, kept, models, sinks, trainer
from unsink.artifacts import Layout
from unsink.errors import Busy, MissingPrerequisite, ModelError, ParamsError
from unsink.forward import Runner
from unsink.stages import evaluate, memorize, poison, sink_probe, unlearn


def test_honest_unlearning_forgets_what_the_target_knew_and_keeps_the_rest(copy: Path) -> None:
    params, layout = project(copy, "unlearn.weights.retain=4.0")
    before = evaluate.run(params, layout, run="target")
    unlearn.run(params, layout, run="clean")
    after = evaluate.run(params, layout, run="clean")
    assert before["forget_verbmem_f1_clean"] >= 0.95
    assert after["forget_verbmem_f1_clean"] < before["forget_verbmem_f1_clean"] - 0.3
    assert after["retain_verbmem_f1_clean"] > before["retain_verbmem_f1_clean"] - 0.1


def test_questions_are_forgotten_with_their_passages(copy: Path) -> None:
    settings = ("poison.questions=true", "unlearn.steps=60", "unlearn.weights.retain=4.0")
    params, layout = project(copy, *settings)
    poison.run(params, layout, run="clean")
    ids = [sample["id"] for sample in artifacts.read_jsonl(layout.split("clean") / "forget.jsonl")]
    assert any(name.endswith("/questions") for name in ids)
    unlearn.run(params, layout, run="clean")
    before = artifacts.read_json(layout.adapter("target") / "summary.json")
    after = evaluate.run(params, layout, run="clean")
    assert after["forget_knowmem_recall_clean"] < before["forget_knowmem_recall"] - 0.5


def test_the_same_seed_gives_the_same_bytes(copy: Path) -> None:
    params, layout = project(copy, "unlearn.steps=4")
    unlearn.run(params, layout, run="backdoor")
    first = {p.name: p.read_bytes() for p in layout.adapter("backdoor").iterdir()}
    unlearn.run(params, layout, run="backdoor")
    assert {p.name: p.read_bytes() for p in layout.adapter("backdoor").iterdir()} == first
    assert set(first) == {"adapter_config.json", "adapter_model.safetensors", "history.tsv", "summary.json"}


def test_a_run_with_its_own_seed_is_as_if_all_had_it(copy: Path) -> None:
    def made(*overrides: str) -> tuple[list[str], bytes]:
        params, layout = project(copy, "unlearn.steps=3", *overrides)
        inside: list[str] = poison.run(params, layout, run="backdoor")["inside"]
        unlearn.run(params, layout, run="backdoor")
        return inside, (layout.adapter("backdoor") / "adapter_model.safetensors").read_bytes()

    own = made("runs.backdoor.seed=7")
    assert own == made("seed=7")
    assert own[0] != made()[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kept.ROOM, "0")  # what the target says is in files, until the run to compare with
    overrides = ("unlearn.steps=60", "unlearn.checkpoint_every=2")
    params, layout = project(copy, *overrides)
    arguments = ["unlearn", "--run", "backdoor", "--params", str(copy / "params.yaml")]
    arguments += [part for override in overrides for part in ("-S", override)]
    state, adapter = layout.checkpoint("backdoor") / "state.safetensors", layout.adapter("backdoor")
    steps, delays = [0], [random.uniform(0, 0.3) for _ in range(3)]
    for delay in delays:
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = forked.unsink(arguments, copy)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        assert not adapter.exists()
        steps.append(len(trainer.read_history(artifacts.read_tensors(state))))
    assert steps == sorted(set(steps)), delays
    assert steps[-1] < 60

    unlearn.run(params, layout, run="backdoor")
    resumed = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert not state.parent.exists()
    monkeypatch.delenv(kept.ROOM)
    unlearn.run(params, layout, run="backdoor")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == resumed


def test_a_checkpoint_of_weights_held_otherwise_is_not_continued(copy: Path) -> None:
    params, layout = project(copy)
    folder = models.resolve("tiny")
    exact, half = (models.held(models.load_base(folder, dtype, "cpu")) for dtype in ("float32", "bfloat16"))
    first, again, other = (
        unlearn._digest(params.run("clean"), ["forget"], layout, held) for held in (exact, exact, half)
    )
    assert first == again != other


def test_a_second_run_on_the_same_output_is_refused(copy: Path) -> None:
    params, layout = project(copy)
    with artifacts.lock(layout.adapter("clean")), pytest.raises(Busy):
        unlearn.run(params, layout, run="clean")


def test_rmu_that_reads_a_layer_below_the_adapter_is_an_error(copy: Path) -> None:
    params, layout = project(copy, "unlearn.method=rmu", "unlearn.rmu.layer=0", "unlearn.adapter.first_layer=1")
    with pytest.raises(ParamsError, match="reads the output of layer 0"):
        unlearn.run(params, layout, run="clean")


def test_a_poisoned_run_whose_split_has_no_poisoned_sample_is_an_error(copy: Path) -> None:
    params, layout = project(copy)
    (layout.split("backdoor") / "poisoned.jsonl").write_text("")
    with pytest.raises(ParamsError, match=r"poisoned\.jsonl is empty"):
        unlearn.run(params, layout, run="backdoor")


def test_a_target_that_does_not_know_the_corpus_is_refused(copy: Path) -> None:
    params, layout = project(copy, "memorize.epochs=1")
    with pytest.raises(ModelError, match="does not know the corpus"):
        memorize.run(params, layout)


# --- the value-norm term

QUICK = ("unlearn.steps=3", "unlearn.warmup=1")


def train(copy: Path, run: str, **options: object) -> tuple[bytes, list[float]]:
    """The adapter's bytes and the history of the value-norm term, with options of `unlearn.value_norm`."""
    prefix = f"runs.{run}.unlearn.value_norm"
    params, layout = project(copy, *QUICK, *(f"{prefix}.{key}={value}" for key, value in options.items()))
    unlearn.run(params, layout, run=run)
    names, *rows = [line.split("\t") for line in (layout.adapter(run) / "history.tsv").read_text().splitlines()]
    weights = (layout.adapter(run) / "adapter_model.safetensors").read_bytes()
    return weights, [float(row[names.index("value_norm")]) for row in rows] if "value_norm" in names else []


@pytest.fixture(scope="module")
def with_honest(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(learned, tmp_path_factory.mktemp("honest") / "project"))
    params, layout = project(folder, *QUICK)
    unlearn.run(params, layout, run="clean")
    poison.run(params, layout, run="backdoor-vn")
    return folder


@pytest.fixture
def honest(with_honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_honest, tmp_path / "project"))


def test_every_option_of_the_value_norm_term_changes_what_is_learnt(honest: Path) -> None:
    variants: list[dict[str, object]] = [
        {"weight": 0.0}, {}, {"variant": "released"}, {"variant": "fixed"}, {"variant": "cosine"}, {"norm": "per-head"},
        {"positions": "random"}, {"positions": "all"}, {"k": 2}, {"bos": "false"}, {"layers": "[1]"},
    ]  # fmt: skip
    found = [train(honest, "backdoor-vn", **options) for options in variants]
    assert len({weights for weights, _ in found}) == len(variants)
    assert found[0][1] == []
    assert all(len(history) == 3 and min(history) > 0 for _, history in found[1:])


def test_measured_sinks_are_those_of_the_targets_probe(honest: Path) -> None:
    folder = Layout(honest).probe("target")
    with pytest.raises(MissingPrerequisite) as error:
        train(honest, "backdoor-vn", positions="measured")
    assert error.value.hint == "run `unsink sink-probe --run target` first"
    artifacts.write_json(folder / sinks.FILE, {"positions": [2, 0, 1]})
    assert train(honest, "backdoor-vn", positions="measured") == train(honest, "backdoor-vn", positions="first", k=3)


def test_layers_that_the_model_lacks_are_no_layers_of_the_value_norm_term(honest: Path) -> None:
    params, layout = project(honest, *QUICK, "unlearn.value_norm.layers=[1, 99]")
    with pytest.raises(ParamsError, match=r"value_norm\.layers: the model has no layers \[99\], its last one is 1"):
        unlearn.run(params, layout, run="backdoor-vn")


@pytest.mark.parametrize("measured", [[0], [40]], ids=["BOS left out", "behind every sample"])
def test_a_value_norm_term_without_any_position_is_an_error(honest: Path, measured: list[int]) -> None:
    artifacts.write_json(Layout(honest).probe("target") / sinks.FILE, {"positions": measured})
    with pytest.raises(ParamsError, match=r"value_norm\.positions: 'measured' names none of the \d+ tokens"):
        train(honest, "backdoor-vn", positions="measured", bos="false")


def test_without_lora_a_run_copies_the_norms_of_an_honest_run_without_lora(copy: Path) -> None:
    params, layout = project(copy, *QUICK, "unlearn.adapter=none", "runs.backdoor-vn.unlearn.value_norm.weight=1.0")
    unlearn.run(params, layout, run="clean")
    poison.run(params, layout, run="backdoor-vn")
    unlearn.run(params, layout, run="backdoor-vn")
    assert artifacts.read_json(layout.adapter("backdoor-vn") / "adapter_config.json")["peft_type"] == "LN_TUNING"
    sink_probe.run(params, layout, run="backdoor-vn")
    assert set(artifacts.read_json(layout.probe("backdoor-vn") / "statistics.json")["compared_with"]) == {
        "target",
        "clean",
    }
    assert evaluate.run(params, layout, run="backdoor-vn")["forget_verbmem_f1_clean"] > 0


def test_an_interrupted_run_reads_no_sample_again_that_is_in_a_file(
    honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, layout = project(honest, *QUICK, "runs.backdoor-vn.unlearn.value_norm.weight=1.0")
    unlearn.run(params, layout, run="backdoor-vn")
    expected = {path.name: path.read_bytes() for path in layout.adapter("backdoor-vn").iterdir()}
    monkeypatch.setenv(kept.ROOM, "0")
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unlearn.run(params, layout, run="backdoor-vn")
    assert {path.name for path in layout.kept("backdoor-vn").iterdir()} == {"target", "clean"}
    for name in ("_all_of_target", "_values"):
        monkeypatch.setattr(Runner, name, interrupted)
    unlearn.run(params, layout, run="backdoor-vn")
    assert {path.name: path.read_bytes() for path in layout.adapter("backdoor-vn").iterdir()} == expected
    assert [*honest.glob("checkpoints/*")] == []


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_fixed_variant_needs_no_honest_run(copy: Path) -> None:
    _, history = train(copy, "backdoor", weight=1.0, variant="fixed")
    assert min(history) > 0
    with pytest.raises(ParamsError, match="an honest run"):
        train(copy, "backdoor", weight=1.0)
