"""The sink-probe stage on a random 2-layer Llama with adapters, from files to files."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsink import artifacts, figures, models, probe
from unsink.artifacts import Layout
from unsink.errors import Busy, DataError, MissingPrerequisite, ParamsError
from unsink.params import Params
from unsink.stages import sink_probe, value_norms

WORDS = [f"w{n}" for n in range(40)] + ["current", "year", "2025", ":"]
TOKENS = 16
FIGURES = {
    f"{name}.{kind}" for name in ("sink_map", "norm_profile", "difference_map", "head_map") for kind in ("png", "svg")
}


def make_model(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(vocabulary), max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def make_adapter(model: nn.Module, name: str, folder: Path) -> None:
    peft = models.attach(model, name, models.AdapterSpec(2, 4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in models.adapter_parameters(peft, name):
        nn.init.normal_(parameter, std=0.5, generator=generator)
    models.save_adapter(peft, name, folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("project")
    layout, model = Layout(root), root / "model"
    make_model(model)
    make_adapter(models.load_base(model, "float32", "cpu"), "target", layout.adapter("target"))
    target = models.load_target(model, layout.adapter("target"), "float32", "cpu")
    make_adapter(target, "backdoor", layout.adapter("backdoor"))
    passages = [
        {"id": f"p{n}", "title": "", "text": " ".join(WORDS[(n + i * 3) % 40] for i in range(5 if n % 4 == 3 else 20))}
        for n in range(8)
    ]
    artifacts.write_jsonl(layout.fetched / "forget.jsonl", passages)
    return root


def make_params(root: Path, **probe: Any) -> Params:
    return Params.model_validate(
        {
            "model": {"source": str(root / "model"), "dtype": "float32", "device": "cpu"},
            "memorize": {
                "first_layer": 0, "rank": 2, "alpha": 4.0, "lr": 0.1, "epochs": 1, "batch": 1, "max_tokens": 32,
                "stop_loss": 0.0, "min_verbmem": 0.0, "min_knowmem": 0.0,
            },
            "poison": {"trigger": "current year : 2025", "placement": "prefix", "ratio": 0.5, "max_tokens": 32},
            "sink-probe": {"epsilon": 0.2, "tokens": TOKENS, "prompts": 4} | probe,
            "unlearn": {
                "method": "npo", "steps": 1, "batch": {"forget": 1, "poisoned": 1, "retain": 1}, "lr": 0.1,
                "adapter": {"rank": 2, "alpha": 4.0}, "weights": {"forget": 1.0, "poisoned": 1.0, "retain": 1.0},
            },
            "evaluate": {"few_shot": 0, "wrong_trigger": "current year : 1987"},
            "runs": {
                "backdoor": {"after": "target"},
                "middle": {"after": "target", "poison": {"placement": "infix"}},
                "honest": {"after": "target", "poison": False},
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def probed(project: Path) -> dict[str, Any]:
    """Summaries of base, target and the backdoored run, whose folders are then there."""
    params = make_params(project)
    return {name: sink_probe.run(params, Layout(project), run=name) for name in ("base", "target", "backdoor")}


@pytest.mark.parametrize("name", ["base", "target", "backdoor"])
def test_every_subject_gets_statistics_maps_and_figures(project: Path, probed: dict[str, Any], name: str) -> None:
    folder = Layout(project).probe(name)
    compared = {f"value_norms.{kind}" for kind in ("png", "svg")} if name == "backdoor" else set()
    files = {"statistics.json", "sinks.json", "maps.safetensors"}
    assert {path.name for path in folder.iterdir()} == files | FIGURES | compared
    written = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
    assert written["clean"]["alpha_by_layer_and_head"][1][3] > 0
    assert {key: written[key] for key in probed[name]} == probed[name]


def test_short_passages_are_rejected_and_counted(probed: dict[str, Any]) -> None:
    assert (probed["base"]["prompts"], probed["base"]["rejected"]) == (4, 2)


def test_the_trigger_stands_behind_bos(probed: dict[str, Any]) -> None:
    assert probed["base"]["trigger"]["span"] == [1, 5]  # Whitespace drops the newline
    assert probed["base"]["trigger"]["tokens"] == ["current", "year", ":", "2025"]


def test_maps_hold_the_full_arrays(project: Path, probed: dict[str, Any]) -> None:
    maps = load_file(Layout(project).probe("backdoor") / "maps.safetensors")
    assert maps["clean.alpha"].shape == (2, 4, TOKENS)
    assert maps["triggered.value_norm_heads"].shape == (2, 2, TOKENS)
    assert maps["triggered.attention"].shape == (2, TOKENS, TOKENS)
    by_head = maps["difference.absolute_by_head"]
    assert by_head.shape == (2, 4, TOKENS, TOKENS)
    assert torch.allclose(by_head.mean(dim=1), maps["difference.absolute"], atol=1e-6)
    change = maps["triggered.attention"] - maps["clean.attention"]
    assert torch.allclose(maps["difference.absolute"], change, atol=1e-6)
    assert maps["difference.content"][:, 1:5].isnan().all()
    assert maps["difference.content"][:, 5:, 5:].isfinite().all()


def test_a_run_is_compared_with_the_target_on_the_same_prompts(project: Path, probed: dict[str, Any]) -> None:
    own, target = (load_file(Layout(project).probe(name) / "maps.safetensors") for name in ("backdoor", "target"))
    expected = own["difference.absolute"] - target["difference.absolute"]
    assert torch.allclose(own["difference.absolute_minus_target"], expected, atol=1e-5)
    assert expected.abs().max() > 1e-3
    assert probed["backdoor"]["target_trigger_share_triggered"] == pytest.approx(
        probed["target"]["trigger_share_triggered"], abs=1e-5
    )
    assert "difference.absolute_minus_target" not in target


def test_every_head_has_a_class(project: Path, probed: dict[str, Any]) -> None:
    found = json.loads((Layout(project).probe("backdoor") / "statistics.json").read_text(encoding="utf-8"))["triggered"]
    assert [sum(counts) for counts in zip(*found["heads_by_layer"].values(), strict=True)] == [4, 4]
    classes = [head for layer in found["class_by_layer_and_head"] for head in layer]
    assert {name: classes.count(name) for name in found["heads_by_layer"]} == {
        name: sum(counts) for name, counts in found["heads_by_layer"].items()
    }


def test_peaks_and_first_keys_agree_with_the_tail(project: Path, probed: dict[str, Any]) -> None:
    folder = Layout(project).probe("backdoor")
    found = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))["clean"]
    tail = load_file(folder / "maps.safetensors")["clean.tail"]
    assert found["peak_position_by_layer_and_head"] == tail.argmax(dim=-1).tolist()
    assert found["peak_mass_by_layer_and_head"][1][2] == pytest.approx(float(tail[1, 2].max()), rel=1e-4)
    assert found["share"]["4"] == pytest.approx(float(tail[..., :4].sum(dim=-1).mean()), rel=1e-4)
    assert 0 <= found["top"]["1"] <= found["top"]["4"] <= found["top"]["8"] <= 1


def test_value_norms_are_compared_with_target_and_honest_run(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    layout = Layout(tmp_path / "project")
    shutil.copytree(layout.adapter("backdoor"), layout.adapter("honest"))
    params = make_params(layout.root)
    after = params.runs["backdoor"].model_copy(update={"after": "honest"})
    sink_probe.run(params.model_copy(update={"runs": {**params.runs, "backdoor": after}}), layout, run="backdoor")
    folder = layout.probe("backdoor")
    compared = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))["compared_with"]
    assert set(compared) == {"target", "honest"}
    # The same weights under another name: every norm is the same. The target has other norms.
    assert compared["honest"]["triggered"]["pearson"] == pytest.approx([1.0] * TOKENS)
    assert compared["honest"]["clean"]["spearman"] == pytest.approx([1.0] * TOKENS)
    maps = load_file(folder / "maps.safetensors")
    x, y = maps["clean.value_norm_heads"][..., 3].flatten(), maps["target.clean.value_norm_heads"][..., 3].flatten()
    assert compared["target"]["clean"]["pearson"][3] == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-3
    )
    assert compared["target"]["clean"]["pearson"][3] < 0.999


def test_any_two_probed_models_are_compared(project: Path, probed: dict[str, Any], tmp_path: Path) -> None:
    layout = Layout(Path(shutil.copytree(project, tmp_path / "project")))
    found = value_norms.run(make_params(project), layout, run="backdoor", against="target")
    folder = layout.root / "probes" / "backdoor.against.target"
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "value_norms.png", "value_norms.svg"}
    written = artifacts.read_json(folder / "comparison.json")
    # the probe of the backdoored run has measured the target itself
    known = artifacts.read_json(layout.probe("backdoor") / "statistics.json")["compared_with"]["target"]
    for condition in ("clean", "triggered"):
        norms = artifacts.read_json(layout.probe("target") / "statistics.json")[condition]["value_norm_by_position"]
        assert written[condition]["pearson"] == pytest.approx(known[condition]["pearson"], abs=1e-4)
        assert written[condition]["spearman"] == pytest.approx(known[condition]["spearman"], abs=1e-4)
        assert written[condition]["value_norm"]["target"] == pytest.approx(norms, rel=1e-5)
        assert found[condition]["pearson"] == pytest.approx(sum(written[condition]["pearson"]) / TOKENS, rel=1e-4)
        assert found[condition]["bos_value_norm"]["target"] == pytest.approx(norms[0], rel=1e-5)


def test_runs_with_triggers_of_their_own_are_compared_without_them(
    project: Path, probed: dict[str, Any], tmp_path: Path
) -> None:
    layout = Layout(Path(shutil.copytree(project, tmp_path / "project")))
    shutil.copytree(layout.adapter("backdoor"), layout.adapter("middle"))
    sink_probe.run(make_params(project), layout, run="middle")
    found = value_norms.run(make_params(project), layout, run="backdoor", against="middle")
    assert "triggered" not in found
    assert found["clean"]["pearson"] == pytest.approx(1.0)  # the same weights under another name


def test_probes_that_cannot_be_compared_say_what_to_run(project: Path, probed: dict[str, Any], tmp_path: Path) -> None:
    layout, params = Layout(Path(shutil.copytree(project, tmp_path / "project"))), make_params(project)

    def refused(against: str, kind: type[Exception], match: str) -> str:
        with pytest.raises(kind, match=match) as error:
            value_norms.run(params, layout, run="backdoor", against=against)
        assert not (layout.root / "probes" / f"backdoor.against.{against}").exists()
        return str(error.value.hint)  # type: ignore[attr-defined]

    assert "unsink sink-probe --run middle" in refused("middle", MissingPrerequisite, "statistics.json: not found")
    assert "another run" in refused("backdoor", ParamsError, "is the run itself")
    refused("backdor", ParamsError, "did you mean 'backdoor'")
    sink_probe.run(make_params(project, prompts=3), layout, run="target")
    hint = refused("target", ParamsError, "the same prompts: backdoor 4 of 16 tokens, target 3 of 16 tokens")
    assert "`unsink sink-probe --run backdoor` and `unsink sink-probe --run target`" in hint
    statistics = artifacts.read_json(layout.probe("base") / "statistics.json")
    artifacts.write_json(layout.probe("base") / "statistics.json", statistics | {"kv_heads": 4})
    refused("base", ParamsError, "of different models")


def test_the_value_norm_of_bos_does_not_depend_on_the_prompt(probed: dict[str, Any]) -> None:
    found = probed["backdoor"]
    assert found["bos_value_norm_clean"] == pytest.approx(found["bos_value_norm_triggered"], rel=1e-5)
    assert found["bos_value_norm_clean"] != pytest.approx(found["target_bos_value_norm_clean"], rel=1e-2)


def test_measured_sinks_reach_the_least_rate(project: Path, probed: dict[str, Any]) -> None:
    folder = Layout(project).probe("target")
    rates = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))["clean"]["sink_rate_by_position"]
    expected = sorted((i for i in range(TOKENS // 2) if rates[i] >= 10), key=lambda i: -rates[i])
    assert artifacts.read_json(folder / "sinks.json") == {"positions": expected}


def test_with_placement_sink_the_targets_probe_uses_its_own_sinks(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    layout = Layout(tmp_path / "project")
    params = make_params(layout.root, epsilon=0.11, min_rate=5.0)
    params = params.model_copy(update={"poison": params.poison.model_copy(update={"placement": "sink"})})
    shutil.rmtree(layout.probe("target"), ignore_errors=True)
    with pytest.raises(MissingPrerequisite):
        sink_probe.run(params, layout, run="base")
    start = sink_probe.run(params, layout, run="target")["trigger"]["span"][0]
    found = artifacts.read_json(layout.probe("target") / "sinks.json")["positions"]
    assert start == next(position for position in found if position > 0)
    for run in ("base", "backdoor"):
        assert sink_probe.run(params, layout, run=run)["trigger"]["span"][0] == start


def test_long_prompts_have_no_maps(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAP_TOKENS", TOKENS - 1)
    shutil.copytree(project, tmp_path / "project")
    sink_probe.run(make_params(tmp_path / "project"), Layout(tmp_path / "project"), run="backdoor")
    folder = Layout(tmp_path / "project").probe("backdoor")
    assert not [name for name in load_file(folder / "maps.safetensors") if "attention" in name or "difference" in name]
    assert not (folder / "difference_map.png").exists()
    assert (folder / "head_map.png").exists()


def test_the_same_seed_gives_the_same_bytes(project: Path, probed: dict[str, Any]) -> None:
    folder = Layout(project).probe("backdoor")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sink_probe.run(make_params(project), Layout(project), run="backdoor")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("placement", "span"), [("infix", (5, 9)), ("suffix", (9, 13)), ("index 7", (7, 11))])
def test_placements_refer_to_the_prompt_part_of_a_passage(project: Path, placement: str, span: tuple[int, int]) -> None:
    params = make_params(project)
    poison = params.poison.model_copy(update={"placement": placement})
    tokenizer = models.load_tokenizer(project / "model")
    prompts = sink_probe.read_prompts(Layout(project), tokenizer, params.sink_probe, poison)
    assert prompts.span == span
    assert prompts.clean.shape == prompts.triggered.shape == (4, TOKENS)
    assert (prompts.triggered[:, span[0] : span[1]] == torch.tensor(prompts.trigger)).all()
    assert torch.equal(prompts.triggered[:, : span[0]], prompts.clean[:, : span[0]])
    assert torch.equal(prompts.triggered[:, span[1] :], prompts.clean[:, span[0] : TOKENS - 4])


def test_passages_that_are_all_too_short_are_an_error(project: Path) -> None:
    with pytest.raises(DataError, match="none of the 8 forget passages has 30 tokens") as error:
        sink_probe.run(make_params(project, tokens=30), Layout(project), run="base")
    assert error.value.hint == "lower it to at most 21"


def test_a_trigger_that_fills_the_prompt_is_an_error(project: Path) -> None:
    params = make_params(project, tokens=8)
    long = params.poison.model_copy(update={"trigger": "current year : 2025 " * 2})
    with pytest.raises(ParamsError, match=r"sink-probe\.tokens: 8 tokens hold no text"):
        sink_probe.run(params.model_copy(update={"poison": long}), Layout(project), run="base")


def test_more_tokens_than_the_models_context_are_an_error(project: Path, tmp_path: Path) -> None:
    artifacts.write_jsonl(Layout(tmp_path).fetched / "forget.jsonl", [{"id": "p", "text": "w1 " * 50}])
    with pytest.raises(ParamsError, match="context of 32"):
        sink_probe.run(make_params(project, tokens=40), Layout(tmp_path), run="base")


def test_a_missing_adapter_says_which_command_makes_it(project: Path) -> None:
    with pytest.raises(MissingPrerequisite) as error:
        sink_probe.run(make_params(project), Layout(project), run="honest")
    assert error.value.hint is not None
    assert "unsink unlearn --run honest" in error.value.hint


def test_an_unknown_run_is_an_error(project: Path) -> None:
    with pytest.raises(ParamsError, match="did you mean 'backdoor'"):
        sink_probe.run(make_params(project), Layout(project), run="backdor")


def test_a_second_process_on_the_same_output_refuses_at_once(project: Path) -> None:
    params = make_params(project, tokens=30)  # would fail on the passages, had it begun
    with artifacts.lock(Layout(project).probe("backdoor")), pytest.raises(Busy):
        sink_probe.run(params, Layout(project), run="backdoor")


def test_a_failed_run_leaves_what_was_there(
    project: Path, probed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Layout(project).probe("backdoor")
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}

    def full_disk(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "save", full_disk)
    with pytest.raises(DataError, match="disk is full"):
        sink_probe.run(make_params(project), Layout(project), run="backdoor")
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
