"""Models in the layout of other tools: one plain LoRA adapter for the base, or a whole checkpoint.

Here a run's adapter stands on the target, which is the base with an adapter of its own merged in. Other tools know one
base and one adapter. Two low-rank updates of the same matrix are one of the summed rank, s1 B1 A1 + s2 B2 A2 =
[s1 B1, s2 B2] [A1; A2], so both become one adapter for the base, and the sum stays as it was.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from unsink import artifacts
from unsink.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_A, _B = ".lora_A.weight", ".lora_B.weight"
_COPIED = ("added_tokens", "chat_template", "generation_config", "merges", "special_tokens_map", "tokenizer", "vocab")
"""First words of the files beside weights and config: tokenizer and defaults of generation, taken over as they are."""


class Lora(NamedTuple):
    """A LoRA adapter: its config, and its tensors named `<module>.lora_A.weight` (r, in) and `lora_B` (out, r)."""

    config: LoraConfig
    tensors: dict[str, Tensor]


def stacked(parts: Sequence[Lora]) -> Lora:
    """One adapter whose update of each module is the sum of the parts' updates.

    Its rank is the sum of the ranks, its scale 1. Where a part has no matrices on a module they are zeros: one rank on
    all modules is what other tools can read.
    """
    first = parts[0].config
    modules = sorted({name.removesuffix(_A) for part in parts for name in part.tensors if name.endswith(_A)})
    tensors: dict[str, Tensor] = {}
    for module in modules:
        down, up = zip(*(_matrices(part, module, parts) for part in parts))
        tensors |= {module + _A: torch.cat(down, dim=0), module + _B: torch.cat(up, dim=1)}
    rank = sum(part.config.r for part in parts)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({name for part in parts for name in part.config.target_modules or ()}),
        layers_to_transform=sorted({layer for part in parts for layer in _layers(part.config)}),
        layers_pattern=first.layers_pattern,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    return Lora(config, tensors)


def _matrices(part: Lora, module: str, parts: Sequence[Lora]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of a part, the scale multiplied into B; zeros if it leaves the module alone."""
    rank = part.config.r
    if module + _A in part.tensors:
        return part.tensors[module + _A].float(), part.tensors[module + _B].float() * (part.config.lora_alpha / rank)
    other = next(one.tensors for one in parts if module + _A in one.tensors)
    return torch.zeros(rank, other[module + _A].shape[1]), torch.zeros(other[module + _B].shape[0], rank)


def _layers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())


def write_adapter(adapter: Lora, base: str | None, dtype: str, folder: Path) -> None:
    """Write an adapter as PEFT reads it.

    Args:
        adapter: for a base that is not part of it.
        base: the hub's name of exactly that base; None where it is not on the hub.
        dtype: of the tensors, a key of `DTYPES`.
        folder: is there already.
    """
    keys = ("fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha", "r", "task_type")
    config: dict[str, Any] = {key: getattr(adapter.config, key) for key in keys}
    config |= {"base_model_name_or_path": base, "inference_mode": True, "peft_type": "LORA"}
    config["target_modules"] = sorted(adapter.config.target_modules or ())
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in adapter.tensors.items()}
    artifacts.write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    artifacts.write_json(folder / ADAPTER_CONFIG, config)


def write_model(model: PreTrainedModel, source: Path, dtype: str, folder: Path) -> None:
    """Write a whole model as transformers reads it, with the tokenizer of the model it was made of.

    Args:
        model: adapters merged; it is cast in place.
        source: folder of the base.
        dtype: of the weights, a key of `DTYPES`.
        folder: is there already.
    """
    cast(Any, model).to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    # Published defaults of generation may fail the library's own checks; they are copied below, as they are.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    for path in sorted(source.iterdir()):
        if path.name.startswith(_COPIED) and path.is_file():
            shutil.copyfile(path, folder / path.name)
