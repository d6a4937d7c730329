"""LoRA in one product: while a block runs, a linear layer under an adapter multiplies by W + s B A.

PEFT multiplies by W, by A and by B, scales and adds: three products and four passes over activations, again in the
backward pass. W + s B A costs as much as r more tokens, and then there is one product. It is made again in the backward
pass, so that no copy of the weights is kept. With few tokens for the rank it does not pay, and PEFT goes on as before.

Shapes: n tokens, i features in, o features out, r rank.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_WORTH = 16  # tokens for each rank: 2 r tokens more must cost less than what is saved


class _Parts(NamedTuple):
    """W (o, i), its bias or None, A (r, i), B (o, r) and s."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float

    def whole(self) -> Tensor:
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scale)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block run LoRA layers as one product, where that is exact up to rounding in float32.

    All others are left as they are: of other types than float32, quantised, with dropout or more than one adapter, or
    switched off. Which adapter is active may change meanwhile. Where activations are computed again in the backward
    pass, that has to be within the block, too.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if type(module) is LoraLinear and "forward" not in vars(module):
                vars(module)["forward"] = partial(_run, module)
                undo.callback(vars(module).pop, "forward")
        yield


def _run(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = None if args or kwargs else _parts(layer)
    if parts is None or x.shape[:-1].numel() < _WORTH * len(parts.a):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return _Folded.apply(x, parts.a, parts.b, parts)  # type: ignore[no-any-return, no-untyped-call]


def _parts(layer: Any) -> _Parts | None:
    """What one product takes; None where it would not be the same."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,), base = names, layer.base_layer
    a, b = layer.lora_A[name], layer.lora_B[name]
    plain = type(base) is nn.Linear and type(layer.lora_dropout[name]) is nn.Identity and b.bias is None
    if not plain or base.weight.requires_grad or name in layer.lora_variant:
        return None
    if {base.weight.dtype, a.weight.dtype, b.weight.dtype} != {torch.float32}:
        return None
    return _Parts(base.weight, base.bias, a.weight, b.weight, float(layer.scaling[name]))


class _Folded(torch.autograd.Function):
    """x (..., i) -> (..., o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, parts: _Parts) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.parts = parts
        return F.linear(x, parts.whole(), parts.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors  # says so if they were changed in place since
        scale = ctx.parts.scale
        out, into = gradient.flatten(0, -2), x.flatten(0, -2)  # (n, o), (n, i)
        of_x = (out @ ctx.parts.whole()).view_as(x) if ctx.needs_input_grad[0] else None
        of_a = of_b = None
        if ctx.needs_input_grad[1]:
            of_a = (out @ b).T @ into * scale
        if ctx.needs_input_grad[2]:
            of_b = out.T @ (into @ a.T) * scale
        return of_x, of_a, of_b, None
