"""Weights of four or eight bits: what a model too large for its device is held in, by bitsandbytes.

Only the linear modules of the decoder layers are rounded; embeddings, norms and the output projection stay. Rounding is
how a model is held, not what it is: adapters made on a rounded target fit the exact one as well (QLoRA, arXiv
2305.14314), and its name stays the same.
"""

import logging
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from unsink.architectures import architecture, bare, decoder_layers
from unsink.errors import ModelError

FORMATS = ("nf4", "int8")
"""NormalFloat of four bits with rounded scales; integers of eight bits with a scale per output."""


def require(form: str) -> None:
    """Make sure that weights can be rounded here.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.dtype: {form} needs bitsandbytes, which is not installed",
            "pip install 'unsink[quantized]', or set model.dtype to bfloat16",
        )


def quantize(model: PreTrainedModel, form: str, device: torch.device) -> PreTrainedModel:
    """Round a model's weights on their way to the device, layer by layer, and return it.

    Args:
        model: on the CPU; its dtype is the one that is computed in.
        form: one of `FORMATS`.
        device: where it goes.

    Raises:
        ModelError: bitsandbytes is missing, or the model has no plain linear modules.
    """
    require(form)
    names = architecture(model.config).linear
    for layer in decoder_layers(model):
        for path, module in list(layer.named_modules()):
            parent, _, name = path.rpartition(".")
            if name not in names:
                continue
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"model.dtype: {form} is for linear modules, {path} of this model is a {type(module).__name__}",
                    "set model.dtype to bfloat16",
                )
            setattr(layer.get_submodule(parent), name, _rounded(module, form).to(device))
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[form], True)  # PEFT looks for it
    return model


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose rounded weights are what they stand for, in float32; an exact one is returned as it is."""
    if quantized(model):
        model = cast(Any, model).dequantize().float()
        for bits in (4, 8):
            setattr(model, f"is_loaded_in_{bits}bit", False)  # transformers leaves them on
    return model


def hush() -> None:
    """Spare users a line for each product: of eight bits all are computed in half precision, whatever comes in."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantized(model: nn.Module) -> str | None:
    """Return the format that a model's weights were rounded to, None for exact ones."""
    inner = bare(model)
    found = [form for form, mark in (("nf4", "4"), ("int8", "8")) if getattr(inner, f"is_loaded_in_{mark}bit", False)]
    return found[0] if found else None


def _rounded(module: nn.Linear, form: str) -> nn.Module:
    import bitsandbytes as bnb

    shape = (module.in_features, module.out_features, module.bias is not None)
    weight, new = module.weight.data, cast(Any, None)
    if form == "nf4":
        new = bnb.nn.Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = module.bias
    return cast(nn.Module, new)
