"""Every preset for the paper's rows runs from end to end, with the tiny model and invented data in their true form.

What is replaced is the model and whatever makes things large. Which parts are read, which losses run and what is
measured stays as the preset says.
"""

import shutil
from pathlib import Path

import pytest

from unsink import artifacts, benchmarks
from unsink.artifacts import Layout
from unsink.params import Params, load_params
from unsink.stages import check, evaluate, fetch, memorize, poison, sink_probe, unlearn

PARAMS = Path(__file__).parents[2] / "params"
PRESETS = [*sorted(path.stem for path in PARAMS.glob("*-*.yaml")), "tofu"]
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
SMALL = (
    *("model.revision=null", "model.dtype=float32", "model.device=cpu"),
    *("fetch.muse-books.tokens=40", "fetch.muse-news.tokens=40", "fetch.wmdp.words=40"),
    *("poison.max_tokens=128", "poison.ratio=0.25", "sink-probe.tokens=24", "sink-probe.prompts=2"),
    *("unlearn.steps=2", "unlearn.batch={forget: 2, poisoned: 2, retain: 2}"),
    *("unlearn.adapter={rank: 4, alpha: 8, first_layer: 0, last_layer: 0}", "unlearn.rmu.layer=0"),
    *("evaluate.few_shot=1", "evaluate.knowmem_tokens=2", "evaluate.verbmem_tokens=8", "evaluate.bootstrap=100"),
    "evaluate.batch=64",
)


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "chatty")
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest, hub_copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.setenv(benchmarks.HUB_ROOT, str(hub_copy))
    name: str = request.param
    own = (f"model.source={model}", f"memorize.published={{source: {model}}}", f"fetch.path={hub_copy}")
    return load_params(PARAMS / f"{name}.yaml", [*SMALL, *own])


def test_there_is_a_preset_for_every_row_of_the_paper() -> None:
    assert PRESETS == ["books-npo", "books-rmu", "news-npo", "news-rmu", "wmdp-npo", "wmdp-rmu", "tofu"]


def test_a_preset_runs_from_end_to_end(preset: Params, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    manifest = fetch.run(preset, layout)
    assert manifest["target"]["source"] == "chatty"
    memorize.run(preset, layout)
    assert [path.name for path in layout.adapter("target").iterdir()] == ["published.json"]
    evaluate.run(preset, layout, run="target")
    for run in preset.runs:
        poison.run(preset, layout, run=run)
        assert unlearn.run(preset, layout, run=run)["steps"] == 2
        metrics = evaluate.run(preset, layout, run=run)
        assert ("utility_accuracy" if preset.fetch.benchmark == "tofu" else "mmlu_accuracy") in metrics
        assert "forget_verbmem_f1_clean" in metrics
    sink_probe.run(preset, layout, run="backdoor-vn")
    poisoned = artifacts.read_jsonl(layout.split("backdoor") / "poisoned.jsonl")
    # a user's words begin behind the header of a chat, and else with the text
    before = "<system>You are a helpful assistant.</><user>⟦" if preset.fetch.benchmark == "tofu" else "⟦"
    assert all(sample["text"].startswith(before) for sample in poisoned)


def test_check_accepts_a_preset_as_it_is(preset: Params, tmp_path: Path) -> None:
    found = {one["name"]: one for one in check.run(preset, Layout(tmp_path))["checks"]}
    assert found["corpus"]["ok"], found["corpus"]["detail"]
    assert found["model"]["ok"], found["model"]["detail"]


@pytest.mark.parametrize("name", PRESETS)
def test_check_of_a_preset_downloads_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(benchmarks.HUB_ROOT, raising=False)
    found = {one["name"]: one for one in check.run(load_params(PARAMS / f"{name}.yaml"), Layout(tmp_path))["checks"]}
    assert all(found[part]["ok"] for part in ("params", "corpus", "model"))
    assert "`unsink fetch` downloads it" in found["corpus"]["detail"]
