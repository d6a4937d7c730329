"""Every row of the table against a small random model of its kind."""

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from unsink import models, probe
from unsink.architectures import (
    ARCHITECTURES,
    architecture,
    attention,
    decoder,
    decoder_layers,
    kv_heads,
    value_projection,
)
from unsink.errors import ModelError
from unsink.sink_metrics import head_means

SHAPE = {"vocab_size": 50, "hidden_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
LLAMA = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXTRA = {
    "phi": {key: LLAMA[key] for key in LLAMA if key != "head_dim"},
    "phi3": {key: LLAMA[key] for key in LLAMA if key != "head_dim"},
    "gpt2": {"n_layer": 2, "n_head": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SHAPE, **EXTRA.get(request.param, LLAMA))
    made = AutoModelForCausalLM.from_config(config).eval()
    assert made.config.model_type == request.param
    return made


def test_decoder_and_layers_are_found_with_and_without_an_adapter(model):
    plain = decoder(model), list(decoder_layers(model))
    assert len(plain[1]) == 2
    peft = models.attach(model, "run", models.AdapterSpec(2, 4), seed=0)
    assert decoder(peft) is plain[0]
    assert list(decoder_layers(peft)) == plain[1]
    peft.base_model.unload()


def test_the_value_projection_gives_the_values_that_attention_uses(model):
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    outputs = []
    projections = [value_projection(layer, model.config) for layer in decoder_layers(model)]
    hooks = [p.module.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for p in projections]
    cached = model(ids, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    for layer, (projection, output) in enumerate(zip(projections, outputs, strict=True)):
        used = cached.layers[layer].values.transpose(1, 2).flatten(2)  # (B, heads, T, h) to (B, T, K)
        assert torch.allclose(projection.part(output).flatten(2), used, atol=1e-6)


def test_the_attention_module_holds_the_value_projection(model):
    layer = decoder_layers(model)[0]
    assert value_projection(layer, model.config).module in set(attention(layer, model.config).modules())


def test_an_adapter_covers_every_linear_module_of_its_layers_and_no_other(model):
    wanted = sum(isinstance(module, (torch.nn.Linear, Conv1D)) for module in decoder_layers(model)[1].modules())
    peft = models.attach(model, "run", models.AdapterSpec(2, 4, first_layer=1), seed=0)
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    peft.base_model.unload()
    assert len(names) == 2 * wanted
    assert all(f".{architecture(model.config).layers}.1." in name for name in names)


def test_without_lora_all_weights_of_the_layers_are_trained_and_no_other(model):
    wanted = {name for name, _ in decoder_layers(model)[1].named_parameters()}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    peft = models.attach(model, "run", models.AdapterSpec(None, first_layer=1), seed=0)
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    peft.base_model.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    path = f".{architecture(model.config).layers}.1."
    assert {name.partition(path)[2].replace("ln_tuning_layers.run.", "") for name in names} == wanted


# --- values, computed a second time from the weights

IDS = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(1))
KV_HEADS = {"gpt2": 4, "gpt_neo": 4, "gpt_neox": 4, "opt": 4}


def value_weights(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The rows (K, ·) of a projection's weight that make the values; hidden size 32, four query heads of 8."""
    match kind:
        case "gpt2":
            return weight.T[64:96]  # q, k, v one after the other, each 32 wide
        case "gpt_neox":
            return torch.cat([weight[24 * head + 16 : 24 * head + 24] for head in range(4)])  # q, k, v of each head
        case "phi3":
            return weight[48:64]  # 32 of q, 16 of k, 16 of v
    return weight


def by_hand(model, layer, weight, states):
    module = value_projection(decoder_layers(model)[layer], model.config).module
    bias = getattr(module, "bias", None)
    kind = model.config.model_type
    values = states @ value_weights(kind, weight).T
    # As a column, a bias has the shape that the rows are picked from.
    return (
        values
        if bias is None
        else values + value_weights(kind, bias[None] if kind == "gpt2" else bias[:, None]).view(-1)
    )


@contextmanager
def attention_inputs(model):
    """What each layer's attention is called with."""
    seen = {}

    def keep(index):
        def hook(_module, args, kwargs):
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    modules = [attention(layer, model.config) for layer in decoder_layers(model)]
    hooks = [module.register_forward_pre_hook(keep(i), with_kwargs=True) for i, module in enumerate(modules)]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_captured_values_are_the_weights_times_the_attentions_input(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    with attention_inputs(model) as states, probe.capture(model, values=[0, 1]) as seen:
        model(IDS)
    for layer in (0, 1):
        weight = value_projection(decoder_layers(model)[layer], model.config).module.weight
        assert torch.allclose(seen.values[layer], by_hand(model, layer, weight, states[layer]), atol=1e-5)
    heads = KV_HEADS.get(model.config.model_type, 2)
    assert kv_heads(model.config) == heads
    assert seen.values[0].shape == (3, 10, heads * 8)


@torch.no_grad()
def test_under_an_adapter_the_adapted_values_are_captured(model):
    plain = value_projection(decoder_layers(model)[1], model.config).module.weight.clone()
    peft = models.attach(model, "run", models.AdapterSpec(2, 4, first_layer=1), seed=0)
    for parameter in models.adapter_parameters(peft, "run"):
        torch.nn.init.normal_(parameter)
    module = value_projection(decoder_layers(peft)[1], model.config).module
    change = 2 * module.lora_B["run"].weight @ module.lora_A["run"].weight  # alpha / rank = 2
    merged = plain + (change.T if architecture(model.config).transposed else change)
    with attention_inputs(peft) as states, probe.capture(peft, values=[1]) as seen:
        peft(IDS)
    expected = by_hand(model, 1, merged, states[1])
    without = by_hand(model, 1, plain, states[1])
    peft.base_model.unload()
    assert torch.allclose(seen.values[1], expected, atol=1e-4)
    assert (seen.values[1] - without).abs().max() > 0.1


def test_the_penalty_has_no_gradient_where_values_do_not_depend_on_what_is_trained(model):
    peft = models.attach(model, "run", models.AdapterSpec(2, 4, last_layer=0), seed=0)
    inside = f".{architecture(model.config).attention}."
    adapter = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    for name, parameter in adapter.items():  # only what layer 0 does after its attention is trained
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(inside not in name)
    trained = [parameter for parameter in adapter.values() if parameter.requires_grad]
    with probe.capture(peft, values=[0, 1]) as seen:
        peft(IDS)
    below, above = (probe.value_norms(seen.values[layer]).square().mean() for layer in (0, 1))
    gradients = torch.autograd.grad(above, trained, allow_unused=True)
    peft.base_model.unload()
    assert trained
    assert not below.requires_grad
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@torch.no_grad()
def test_the_probe_sees_what_eager_attention_computes(model):
    for parameter in model.parameters():  # as they are made, weights give nearly even attention
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    eager = torch.stack(model(IDS, output_attentions=True, use_cache=False).attentions).double()
    if before != "eager":
        model.set_attn_implementation(before)
    found = probe.attention_statistics(model, IDS, batch=2)
    assert torch.allclose(found.alpha, torch.stack([head_means(layer).alpha for layer in eager]).mean(dim=1), atol=1e-5)
    assert eager.std() > 0.05


def test_an_unknown_architecture_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r"'mamba'.*llama") as error:
        architecture(AutoConfig.for_model("mamba"))
    assert "architectures.py" in error.value.hint
