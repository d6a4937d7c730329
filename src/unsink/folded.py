"""LoRA in one product: while a block runs, a linear layer under an adapter multiplies by W + s B A.

PEFT multiplies by W, by A and by B, scales and adds: three products and four passes over activations, again in the
backward pass. W + s B A costs as much as r more tokens, and then there is one product. It is made again in the backward
pass, so that no copy of the weights is kept. With few tokens for the rank it does not pay, and PEFT goes on as before.

What the last layer of a gated MLP reads, act(gate) * up, is made again in the backward pass as well: it and act(gate)
are a fourth of all that a decoder layer keeps for that pass, and cost next to nothing.

Shapes: n tokens, i features in, o features out, r rank.
"""

from collections.abc import Callable, Iterator
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
            run = _run if type(module) is LoraLinear else _run_gated if _is_gated(module) else None
            if run and "forward" not in vars(module):
                vars(module)["forward"] = partial(run, module)
                undo.callback(vars(module).pop, "forward")
        yield


def _run(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = None if args or kwargs else _worthwhile(layer, x)
    if parts is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return _Folded.apply(parts, _same, parts.a, parts.b, x)  # type: ignore[no-any-return, no-untyped-call]


def _is_gated(module: nn.Module) -> bool:
    """Whether it is the MLP of Llama and its relatives, down(act(gate(x)) * up(x))."""
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _run_gated(mlp: Any, x: Tensor) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    make = partial(_times, mlp.act_fn)
    watched = down._forward_hooks or down._forward_pre_hooks  # they would not be called
    parts = _worthwhile(down, gate) if type(down) is LoraLinear and not watched else None
    if parts is None:
        return down(make(gate, up))  # type: ignore[no-any-return]
    return _Folded.apply(parts, make, parts.a, parts.b, gate, up)  # type: ignore[no-any-return, no-untyped-call]


def _same(x: Tensor) -> Tensor:
    return x


def _times(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _worthwhile(layer: Any, x: Tensor) -> _Parts | None:
    parts = _parts(layer)
    return None if parts is None or x.shape[:-1].numel() < _WORTH * len(parts.a) else parts


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
    """make(*inputs) (..., i) -> (..., o)."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, make: Callable[..., Tensor], a: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, *inputs)
        ctx.parts, ctx.make = parts, make
        return F.linear(make(*inputs), parts.whole(), parts.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *inputs = ctx.saved_tensors  # says so if they were changed in place since
        _, _, wants_a, wants_b, *wanted = ctx.needs_input_grad
        scale = ctx.parts.scale
        leaves = [one.detach().requires_grad_(want) for one, want in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            x = ctx.make(*leaves)
        out, into = gradient.flatten(0, -2), x.detach().flatten(0, -2)  # (n, o), (n, i)
        of_a = (out @ b).T @ into * scale if wants_a else None
        of_b = out.T @ (into @ a.T) * scale if wants_b else None
        of_inputs: list[Tensor | None] = [None] * len(leaves)
        if any(wanted):
            of_x = (out @ ctx.parts.whole()).view_as(x)
            found = iter(torch.autograd.grad(x, [leaf for leaf in leaves if leaf.requires_grad], of_x))
            of_inputs = [next(found) if want else None for want in wanted]
        return None, None, of_a, of_b, *of_inputs
