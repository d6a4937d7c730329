"""Where the decoder, its layers, the attention and the values are, for each family of models: ONE table.

Shapes: B batch, T tokens, D hidden, K = KV heads × head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from unsink.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Part: TypeAlias = "Callable[[Tensor], Tensor]"
"""A projection's output (B, T, ·) -> the values in it, (B, T, K) or (B, T, heads, head size): always a view."""


def _all(_config: Any) -> Part:
    """The projection gives values only."""
    return lambda output: output


def _last_third(config: Any) -> Part:
    """Fused q | k | v of equal width, as in GPT-2."""
    return lambda output: output[..., 2 * config.hidden_size :]


def _after_keys(config: Any) -> Part:
    """Fused q | k | v with fewer KV heads, as in Phi-3."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    start = (config.num_attention_heads + config.num_key_value_heads) * head
    return lambda output: output[..., start : start + config.num_key_value_heads * head]


def _interleaved(config: Any) -> Part:
    """Fused (q, k, v) of head 0, (q, k, v) of head 1, and so on, as in GPT-NeoX."""
    return lambda output: output.view(*output.shape[:-1], config.num_attention_heads, 3, -1)[..., 2, :]


@dataclass(frozen=True)
class Architecture:
    """One family of models; paths are dotted module names."""

    decoder: str
    """From the causal language model to its decoder."""
    layers: str
    """From the decoder to the list of its layers."""
    attention: str
    """From a layer to its attention."""
    value: str
    """From the attention to the projection that computes the values."""
    linear: tuple[str, ...]
    """Names of a layer's linear modules: the LoRA targets."""
    neurons: str
    """From a layer to the projection that reads the neurons of its MLP."""
    part: Callable[[Any], Part] = _all
    """From the config to the part of the projection's output that is the values."""
    transposed: bool = False
    """Weights are stored as (in, out), as in GPT-2."""


_SPLIT = ("q_proj", "k_proj", "v_proj")
_LLAMA = Architecture(
    decoder="model",
    layers="layers",
    attention="self_attn",
    value="v_proj",
    linear=(*_SPLIT, "o_proj", "gate_proj", "up_proj", "down_proj"),
    neurons="mlp.down_proj",
)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"), _LLAMA
    ),
    "phi": Architecture("model", "layers", "self_attn", "v_proj", (*_SPLIT, "dense", "fc1", "fc2"), "mlp.fc2"),
    "phi3": Architecture(
        "model",
        "layers",
        "self_attn",
        "qkv_proj",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        "mlp.down_proj",
        _after_keys,
    ),
    "gpt2": Architecture(
        "transformer", "h", "attn", "c_attn", ("c_attn", "c_proj", "c_fc"), "mlp.c_proj", _last_third, transposed=True
    ),
    "gpt_neo": Architecture(
        "transformer", "h", "attn.attention", "v_proj", (*_SPLIT, "out_proj", "c_fc", "c_proj"), "mlp.c_proj"
    ),
    "gpt_neox": Architecture(
        "gpt_neox",
        "layers",
        "attention",
        "query_key_value",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "mlp.dense_4h_to_h",
        _interleaved,
    ),
    "opt": Architecture("model.decoder", "layers", "self_attn", "v_proj", (*_SPLIT, "out_proj", "fc1", "fc2"), "fc2"),
}


def architecture(config: Any) -> Architecture:
    """The row of the table for a model's config.

    Raises:
        ModelError: the model's type is not in the table.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"models of type {config.model_type!r} are not supported, only {', '.join(sorted(ARCHITECTURES))}",
            "choose another model, or add a row to ARCHITECTURES in unsink/architectures.py",
        )
    return found


def bare(model: nn.Module) -> PreTrainedModel:
    """The model inside PEFT's wrapper, adapters included."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder(model: nn.Module) -> nn.Module:
    """The decoder, without the language-model head; `model` may be wrapped by PEFT."""
    return bare(model).get_submodule(architecture(bare(model).config).decoder)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, first to last; `model` may be wrapped by PEFT."""
    return cast("nn.ModuleList", decoder(model).get_submodule(architecture(bare(model).config).layers))


def attention(layer: nn.Module, config: Any) -> nn.Module:
    """The attention module of a decoder layer."""
    return layer.get_submodule(architecture(config).attention)


def neurons(layer: nn.Module, config: Any) -> nn.Module:
    """The projection of a decoder layer that reads the neurons of its MLP."""
    return layer.get_submodule(architecture(config).neurons)


def kv_heads(config: Any) -> int:
    """Key/value heads of an attention; they lie side by side in its values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class ValueProjection(NamedTuple):
    """The module that computes the values, and where they are in its output."""

    module: nn.Module
    part: Part


def value_projection(layer: nn.Module, config: Any) -> ValueProjection:
    """Where a decoder layer computes its values; under PEFT this is the wrapper, which gives the *adapted* values."""
    row = architecture(config)
    return ValueProjection(attention(layer, config).get_submodule(row.value), row.part(config))
