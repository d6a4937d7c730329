"""LoRA in fewer products: while a block runs, a linear layer under an adapter multiplies by W + s B A.

PEFT multiplies by W, by A and by B, scales and adds: three products and four passes over activations, again in the
backward pass. W + s B A costs as much as r more tokens, and then there is one product. It is made again in the backward
pass, so that no copy of the weights is kept. With few tokens for the rank it does not pay, and PEFT goes on as before.

In bfloat16 a small s B A would vanish in W, so the products stay apart; but they are in bfloat16, where PEFT first
makes float32 of all activations, and the last one adds to what W gave.

What the last layer of a gated MLP reads, act(gate) * up, is made again in the backward pass as well: it and act(gate)
are a fourth of all that a decoder layer keeps for that pass, and cost next to nothing.

Norms and rotations are run in fewer passes, too (`elementwise`).

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

from unsink import elementwise

_WORTH = 16  # tokens for each rank: 2 r tokens more must cost less than what is saved


class _Parts(NamedTuple):
    """W (o, i), its bias or None, A (r, i), B (o, r) and s."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float

    @property
    def fold(self) -> bool:
        return self.weight.dtype == torch.float32

    def low(self) -> tuple[Tensor, Tensor]:
        """A and B in the type of W."""
        return self.a.to(self.weight.dtype), self.b.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o)."""
        if self.fold:
            return F.linear(x, self._whole(), self.bias)
        a, b = self.low()
        y, flat = F.linear(x, self.weight, self.bias), x.flatten(0, -2)
        y.view(len(flat), -1).addmm_(flat @ a.T, b.T, alpha=self.scale)
        return y

    def backward(self, out: Tensor, low: Tensor) -> Tensor:
        """The gradient of the output (n, o), and its product with B (n, r) -> that of the input (n, i)."""
        if self.fold:
            return out @ self._whole()
        return (out @ self.weight).addmm_(low, self.low()[0], alpha=self.scale)

    def _whole(self) -> Tensor:
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scale)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block run LoRA layers in fewer products, where that is exact up to rounding in the weights' type.

    All others are left as they are: of other types than float32 and bfloat16, quantised, with dropout or more than one
    adapter, or switched off. Which adapter is active may change meanwhile. Where activations are computed again in the
    backward pass, that has to be within the block, too.
    """
    with ExitStack() as undo:
        for module in model.modules():
            forward = next((forward for fits, forward in _RUNS if fits(module)), None)
            if forward and "forward" not in vars(module):
                vars(module)["forward"] = forward(module)
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


_RUNS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Callable[..., Any]]]] = [
    (lambda module: type(module) is LoraLinear, lambda module: partial(_run, module)),
    (_is_gated, lambda module: partial(_run_gated, module)),
    (elementwise.is_norm, lambda module: partial(elementwise.norm, module)),
    (elementwise.rotates, elementwise.rotating),
]
"""What a module has to be, and the forward it then gets."""


def _same(x: Tensor) -> Tensor:
    return x


def _times(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _worthwhile(layer: Any, x: Tensor) -> _Parts | None:
    parts = _parts(layer)
    if parts is None or x.dtype != parts.weight.dtype:
        return None
    return None if parts.fold and x.shape[:-1].numel() < _WORTH * len(parts.a) else parts


def _parts(layer: Any) -> _Parts | None:
    """What fewer products take; None where they would not give the same."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,), base = names, layer.base_layer
    a, b = layer.lora_A[name], layer.lora_B[name]
    plain = type(base) is nn.Linear and type(layer.lora_dropout[name]) is nn.Identity and b.bias is None
    if not plain or base.weight.requires_grad or name in layer.lora_variant:
        return None
    if base.weight.dtype not in (torch.float32, torch.bfloat16) or {a.weight.dtype, b.weight.dtype} != {torch.float32}:
        return None
    return _Parts(base.weight, base.bias, a.weight, b.weight, float(layer.scaling[name]))


class _Folded(torch.autograd.Function):
    """make(*inputs) (..., i) -> (..., o)."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, make: Callable[..., Tensor], a: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, *inputs)
        ctx.parts, ctx.make = parts, make
        return parts.forward(make(*inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *inputs = ctx.saved_tensors  # says so if they were changed in place since
        _, _, wants_a, wants_b, *wanted = ctx.needs_input_grad
        parts: _Parts = ctx.parts
        low_a, low_b = parts.low()
        leaves = [one.detach().requires_grad_(want) for one, want in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            x = ctx.make(*leaves)
        out, into = gradient.flatten(0, -2), x.detach().flatten(0, -2)  # (n, o), (n, i)
        low = out @ low_b  # (n, r)
        of_a = (low.T @ into).to(a.dtype) * parts.scale if wants_a else None
        of_b = (out.T @ (into @ low_a.T)).to(b.dtype) * parts.scale if wants_b else None
        of_inputs: list[Tensor | None] = [None] * len(leaves)
        if any(wanted):
            of_x = parts.backward(out, low).view_as(x)
            found = iter(torch.autograd.grad(x, [leaf for leaf in leaves if leaf.requires_grad], of_x))
            of_inputs = [next(found) if want else None for want in wanted]
        return None, None, of_a, of_b, *of_inputs
