"""Models that would not fit: rounded weights, activations computed again, and what to try when memory runs out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from integration.projects import project
from unsink import artifacts, memory, models, processes
from unsink.api import Project
from unsink.errors import ModelError, ParamsError
from unsink.stages import evaluate, unlearn

NF4 = ("model.dtype=nf4", "unlearn.steps=3", "unlearn.warmup=1", "evaluate.bootstrap=100")


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.6), ("int8", 8.6)])
def test_rounded_weights_are_near_and_small(tiny_folder: Path, form: str, bits: float) -> None:
    exact, rounded = models.load_base(tiny_folder, "float32"), models.load_base(tiny_folder, form)
    assert models.quantized(rounded) == form
    assert models.quantized(exact) is None
    assert models.identity(rounded) == models.identity(exact)
    layer, same = models.decoder_layers(rounded)[0].mlp.up_proj, models.decoder_layers(exact)[0].mlp.up_proj
    assert layer.weight.nbytes * 8 <= bits * same.weight.numel()
    inputs = torch.randn(64, same.in_features, generator=torch.Generator().manual_seed(0), dtype=rounded.dtype)
    error = (layer(inputs).float() - same(inputs.float())).norm() / same(inputs.float()).norm()
    assert float(error) < (0.15 if form == "nf4" else 0.02)


def test_a_run_is_unlearned_and_evaluated_on_a_rounded_target(copy: Path) -> None:
    params, layout = project(copy, *NF4)
    unlearn.run(params, layout, run="clean")
    evaluate.run(params, layout, run="clean")
    assert artifacts.read_json(layout.settings("clean"))["settings"]["dtype"] == "nf4"
    tensors = artifacts.read_tensors(layout.adapter("clean") / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) > 0 for name, tensor in tensors.items() if "lora_B" in name)
    exact, _ = project(copy, *NF4, "model.dtype=float32")
    evaluate.run(exact, layout, run="clean")  # an adapter made on rounded weights fits the exact ones


def test_what_rounded_weights_cannot_do_is_an_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = project(copy, *NF4, "unlearn.adapter=none")
    with pytest.raises(ParamsError, match="none trains the weights themselves"):
        unlearn.run(params, layout, run="clean")
    params, layout = project(copy, *NF4, "evaluate.metrics=[passage, gradnorm]")
    with pytest.raises(ParamsError, match="gradnorm takes the gradient of all weights"):
        evaluate.run(params, layout, run="target")
    monkeypatch.setattr("unsink.quantization.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs bitsandbytes, which is not installed"):
        unlearn.run(project(copy, *NF4)[0], layout, run="clean")


def test_layers_that_drop_out_by_themselves_do_not_when_they_are_computed_again() -> None:
    size = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    model = OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=2, dropout=0.5, **size)).eval()
    ids = torch.arange(4, 20)[None]

    def gradient(on: bool) -> Tensor:
        model.zero_grad()
        with models.gradient_checkpointing(model, on=on):
            model(input_ids=ids, labels=ids).loss.backward()
        found = models.decoder_layers(model)[0].fc1.weight.grad
        assert isinstance(found, Tensor)
        return found.clone()

    torch.testing.assert_close(gradient(on=True), gradient(on=False))
    assert {layer.dropout for layer in models.decoder_layers(model)} == {0.5}


def test_activations_computed_again_give_the_same_bytes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = LlamaAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)

    def made(*overrides: str) -> tuple[bytes, int]:
        calls.clear()
        params, layout = project(copy, "unlearn.steps=3", "unlearn.warmup=1", *overrides)
        unlearn.run(params, layout, run="backdoor")
        return (layout.adapter("backdoor") / "adapter_model.safetensors").read_bytes(), len(calls)

    kept, again = made(), made("model.gradient_checkpointing=true")
    assert again[0] == kept[0]
    assert again[1] >= kept[1] + 3 * 2  # each of two layers once more in each of three steps


def test_out_of_memory_names_the_next_smaller_setting(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    def hint(command: str, *overrides: str) -> str | None:
        with pytest.raises(ModelError, match=rf"{command}: out of memory: CUDA out of memory\. Tried") as caught:
            Project(copy / "params.yaml", overrides).run(command, run="backdoor")
        return caught.value.hint

    monkeypatch.setattr(unlearn, "run", full)
    monkeypatch.setattr(evaluate, "run", full)
    assert hint("evaluate") == "try it with -S evaluate.batch=32"
    settings: list[str] = []
    while (said := hint("unlearn", *settings)) and said.startswith("try it with -S "):
        settings.append(said.removeprefix("try it with -S "))
    assert settings[:3] == ["model.gradient_checkpointing=true", "model.dtype=bfloat16", "unlearn.batch.forget=2"]
    assert settings[-1] == "model.dtype=nf4"
    assert said == "take a device with more memory, or a smaller model"
    assert memory.ran_out(
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    )
    assert not memory.ran_out(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        # They stay in float32 whatever model.dtype says.
        ("unlearn", "unlearn.adapter=none", ["unlearn.batch.forget=2", "unlearn.batch.poisoned=2"]),
        ("mitigate", "evaluate.batch=1", ["model.dtype=bfloat16", "unlearn.batch.forget=2"]),
        ("sink-probe", "sink-probe.tokens=200", ["model.dtype=bfloat16", "sink-probe.tokens=100"]),
    ],
)
def test_a_setting_that_would_change_nothing_is_not_advised(
    copy: Path, command: str, override: str, expected: list[str]
) -> None:
    settings = [override]
    while said := memory.smaller(project(copy, *settings)[0], command, "backdoor"):
        settings.append(said)
    found = [one for one in settings[1:] if "checkpointing" not in one]
    assert found[:2] == expected
    assert ("model.dtype=nf4" in found) == (command != "unlearn")


def test_what_a_metric_refuses_is_not_advised(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    small = ("evaluate.batch=1", "evaluate.passage_tokens=100", "model.dtype=bfloat16")
    gradients = "evaluate.metrics=[passage, gradnorm]"
    assert memory.smaller(project(copy, *small)[0], "evaluate") == "model.shard=true"
    assert memory.smaller(project(copy, *small, gradients)[0], "evaluate") == "evaluate.passage_tokens=64"
    assert memory.smaller(project(copy, *small, gradients, "evaluate.passage_tokens=64")[0], "evaluate") is None


def test_sharding_is_not_advised_where_weights_of_the_honest_run_are_copied(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    own = ("model.gradient_checkpointing=true", "unlearn.adapter=none")
    assert memory.smaller(project(copy, *own)[0], "unlearn", "backdoor") == "model.shard=true"
    assert memory.smaller(project(copy, *own)[0], "unlearn", "backdoor-vn") == "unlearn.batch.forget=2"
