"""Every row of the table against a small random model of its kind."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from unsink import models
from unsink.architectures import ARCHITECTURES, architecture, attention, decoder, decoder_layers, value_projection
from unsink.errors import ModelError

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
        assert torch.allclose(output[..., projection.rows], used, atol=1e-6)


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


def test_an_unknown_architecture_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r"'mamba'.*llama") as error:
        architecture(AutoConfig.for_model("mamba"))
    assert "architectures.py" in error.value.hint
