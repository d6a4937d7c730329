"""What unlearning has changed: differences of weights between a suspect and its original."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from unsink import models
from unsink.architectures import architecture, bare
from unsink.detectors._layers import Changed
from unsink.suspects import Model, Suspect


class Delta(NamedTuple):
    """One weight that moved.

    Attributes:
        name: dotted name of the parameter.
        layer: decoder layer, None outside of these.
        change: suspect − original, float32, as it is stored.
        size: Frobenius norm of the original's weight.
    """

    name: str
    layer: int | None
    change: Tensor
    size: float


@torch.no_grad()
def deltas(suspect: Suspect) -> Iterator[Delta]:
    """Every weight that differs from the original's, in the order of the model; nothing without an original.

    An adapter that is not merged is the difference itself. Rounded weights are packed, and none of them is compared.
    """
    if isinstance(suspect.model, PeftModel):
        yield from _adapter(suspect.model)
    elif suspect.original is not None:
        yield from _parameters(suspect.model, suspect.original)


def changed_layers(suspect: Suspect) -> Changed | None:
    """The first and the last decoder layer that moved; all where something below them did, None where nothing did."""
    found = _changed(suspect)
    if not found:
        return None
    last = len(models.decoder_layers(suspect.model)) - 1
    inside = [layer for layer in found if layer is not None]
    return Changed(min(inside), max(inside)) if len(inside) == len(found) else Changed(0, last)


def _changed(suspect: Suspect) -> list[int | None]:
    """The layer of each weight that moved."""
    if isinstance(suspect.model, PeftModel) or suspect.original is None:
        return [one.layer for one in deltas(suspect)]
    return [_layer(suspect.model, name) for name, _, _ in _moved(suspect.model, suspect.original)]


def _parameters(model: Model, original: Model) -> Iterator[Delta]:
    for name, weight, old in _moved(model, original):
        if weight.is_floating_point() and old.is_floating_point():
            change = weight.float() - old.float()
            yield Delta(name, _layer(model, name), change, float(old.float().norm()))


def _moved(model: Model, original: Model) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and original weight of what differs; of a rounded weight it is how it is held that does."""
    before = dict(original.named_parameters())
    for name, weight in model.named_parameters():
        old = before[name]
        if weight.data_ptr() != old.data_ptr() and not torch.equal(weight, old):
            yield name, weight, old


def _adapter(model: PeftModel) -> Iterator[Delta]:
    for name, module in bare(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            for adapter in module.active_adapters:
                lora = cast(Any, module)
                change, base = lora.get_delta_weight(adapter).float(), lora.get_base_layer().weight.float()
                yield Delta(f"{name}.weight", _layer(model, name), change, float(base.norm()))


def _layer(model: Model, name: str) -> int | None:
    found = re.search(rf"(?:^|\.){re.escape(architecture(bare(model).config).layers)}\.(\d+)\.", name)
    return int(found[1]) if found else None
