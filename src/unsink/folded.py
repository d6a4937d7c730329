"""LoRA in fewer products: while a block runs, a linear layer under an adapter multiplies by W + s B A.

PEFT multiplies by W, by A and by B, scales and adds: three products and four passes over activations, again in the
backward pass. W + s B A costs as much as r more tokens, and then there is one product. It is made again in the backward
pass, so that no copy of the weights is kept, unless all copies together are small, as where RMU adapts few layers. With
few tokens for the rank it does not pay, and PEFT goes on as before.

In bfloat16 a small s B A would vanish in W, so the products stay apart; but they are in bfloat16, where PEFT first
makes float32 of all activations, and that with W adds to what A and B gave.

What the last layer of a gated MLP reads, act(gate) * up, is made again in the backward pass as well: it and act(gate)
are a fourth of all that a decoder layer keeps for that pass, and cost next to nothing. Where copies of weights are
kept, so is act(gate).

Norms and rotations are run in fewer passes, too (`elementwise`).

Shapes: n tokens, i features in, o features out, r rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unsink import elementwise

_WORTH = 16  # tokens for each rank: 2 r tokens more must cost less than what is saved
_SMALL = 2**27
"""Bytes of weights under adapters, up to which their copies are kept, and act(gate), which is not counted: then an RMU
step of the default model takes some 3 % less time."""


class _Parts(NamedTuple):
    """W (o, i), its bias or None, A (r, i), B (o, r) and s; whether W + s B A is kept for the backward pass."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    keep: bool

    @property
    def fold(self) -> bool:
        return self.weight.dtype == torch.float32

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(..., i) -> (..., o), and what `backward` is to be given again."""
        if self.fold:
            whole = self._whole()
            return F.linear(x, whole, self.bias), (whole,) if self.keep else ()
        rows = x.flatten(0, -2)
        a, b = self.a.to(x.dtype), (self.scale * self.b).to(x.dtype)
        low = rows @ a.T  # (n, r)
        # The product with W adds to the adapter's, not the other way round: its kernel has the time to read that.
        found = x.new_empty(*x.shape[:-1], len(self.weight))
        y = found.view(len(rows), len(self.weight))
        torch.mm(low, b.T, out=y) if self.bias is None else torch.addmm(self.bias, low, b.T, out=y)
        y.addmm_(rows, self.weight.T)
        return found, (a, b, low)

    def backward(
        self, out: Tensor, x: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of the output (n, o) -> those of x (n, i), A and B, where they are wanted."""
        a, b, low = (self.a, self.scale * self.b, x @ self.a.T) if self.fold else kept
        upstream = out @ b  # (n, r)
        of_x = None
        if wanted[0]:
            whole = (kept[0] if kept else self._whole()) if self.fold else None
            of_x = (upstream @ a).addmm_(out, self.weight) if whole is None else out @ whole
        of_a = (upstream.T @ x).to(self.a.dtype) if wanted[1] else None
        of_b = (out.T @ low).to(self.b.dtype) * self.scale if wanted[2] else None
        return of_x, of_a, of_b

    def _whole(self) -> Tensor:
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scale)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block run LoRA layers in fewer products, where that is exact up to rounding in the weights' type.

    All others are left as they are: of other types than float32 and bfloat16, quantised, with dropout or more than one
    adapter, or switched off. Which adapter is active may change meanwhile. Where activations are computed again in the
    backward pass, that has to be within the block, too.
    """
    keep = _bytes_under_adapters(model) <= _SMALL
    with ExitStack() as undo:
        for module in model.modules():
            forward = next((forward for fits, forward in _RUNS if fits(module)), None)
            if forward and "forward" not in vars(module):
                vars(module)["forward"] = forward(module, keep)
                undo.callback(vars(module).pop, "forward")
        yield


def _bytes_under_adapters(model: nn.Module) -> int:
    weights: list[Tensor] = [
        cast(Any, layer).base_layer.weight for layer in model.modules() if type(layer) is LoraLinear
    ]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _run(layer: Any, keep: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = None if args or kwargs else _worthwhile(layer, x, keep)
    if parts is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return _Folded.apply(parts, _Same(), parts.a, parts.b, x)  # type: ignore[no-any-return, no-untyped-call]


def _is_gated(module: nn.Module) -> bool:
    """Whether it is the MLP of Llama and its relatives, down(act(gate(x)) * up(x))."""
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _run_gated(mlp: Any, keep: bool, x: Tensor) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    make = elementwise.Gated(mlp.act_fn, keep=keep)
    watched = down._forward_hooks or down._forward_pre_hooks  # they would not be called
    parts = _worthwhile(down, gate, keep) if type(down) is LoraLinear and not watched else None
    if parts is None:
        return down(make(gate, up))  # type: ignore[no-any-return]
    return _Folded.apply(parts, make, parts.a, parts.b, gate, up)  # type: ignore[no-any-return, no-untyped-call]


_RUNS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, bool], Callable[..., Any]]]] = [
    (lambda module: type(module) is LoraLinear, lambda module, keep: partial(_run, module, keep)),
    (_is_gated, lambda module, keep: partial(_run_gated, module, keep)),
    (elementwise.is_norm, lambda module, _: partial(elementwise.norm, module)),
    (elementwise.rotates, lambda module, _: elementwise.rotating(module)),
]
"""What a module has to be, and the forward it then gets, given whether copies are kept."""


class _Same:
    """What a layer reads is what it is given."""

    def made(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x, ()

    def again(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        return x, lambda gradient: (gradient,)


_Make = _Same | elementwise.Gated
"""How what a layer reads is made of the inputs, and made again in the backward pass."""


def _worthwhile(layer: Any, x: Tensor, keep: bool) -> _Parts | None:
    parts = _parts(layer, keep)
    if parts is None or x.dtype != parts.weight.dtype:
        return None
    return None if parts.fold and x.shape[:-1].numel() < _WORTH * len(parts.a) else parts


def _parts(layer: Any, keep: bool) -> _Parts | None:
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
    return _Parts(base.weight, base.bias, a.weight, b.weight, float(layer.scaling[name]), keep)


class _Folded(torch.autograd.Function):
    """What is made of the inputs, (..., i) -> (..., o)."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, make: _Make, a: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:
        x, made_of = make.made(*inputs)
        found, kept = parts.forward(x)
        ctx.save_for_backward(a, b, *inputs, *made_of, *kept)
        ctx.parts, ctx.make, ctx.inputs, ctx.read = parts, make, len(inputs), len(inputs) + len(made_of)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *saved = ctx.saved_tensors  # says so if A or B were changed in place since
        inputs, kept = saved[: ctx.inputs], saved[ctx.read :]
        _, _, wants_a, wants_b, *wanted = ctx.needs_input_grad
        x, back = ctx.make.again(*saved[: ctx.read])
        out, into = gradient.flatten(0, -2), x.flatten(0, -2)  # (n, o), (n, i)
        of_x, of_a, of_b = ctx.parts.backward(out, into, kept, (any(wanted), wants_a, wants_b))
        of_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        if of_x is not None:
            of_inputs = [one if want else None for one, want in zip(back(of_x.view_as(x)), wanted, strict=True)]
        return None, None, of_a, of_b, *of_inputs
