"""What a decoder layer does besides products, in fewer passes over its activations than the library's own formulas.

Each gives the same up to rounding. Norms and rotations are made of some ten passes each, every one through memory, and
of as many again backward: on a processor 3 % of a step, on a GPU, which multiplies faster than it reads, a tenth.
There rotations and the gate of an MLP are one kernel each, of Liger where that library is installed (extra `gpu`).

Shapes: n tokens, D features, H heads, h head size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from subprocess import SubprocessError
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONE_KERNEL = ("cuda",)
"""Devices on which the library's RMS norm is one kernel; elsewhere it is as many as a decoder's own."""
_ROTATE = "apply_rotary_pos_emb"
_SILU = ("SiLU", "SiLUActivation")


def _kernels(x: Tensor) -> Any:
    """Liger's operations for a tensor, or None where there are none."""
    return _liger() if x.is_cuda else None


@cache
def _liger() -> Any:
    try:
        from liger_kernel import ops

        some = torch.ones(1, 64, device="cuda")
        ops.swiglu_forward(some, some)
    except (ImportError, RuntimeError, OSError, SubprocessError):  # not installed, or no compiler, or not its headers
        return None
    return ops


class Gated:
    """act(gate) * up, of tensors (..., i).

    Args:
        act: a module.
        keep: whether act(gate) is kept where it takes a pass to make it again.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], *, keep: bool) -> None:
        self._act, self._silu, self._keep = act, type(act).__name__ in _SILU, keep

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return it, with a graph if there is to be one."""
        return self._act(gate) * up

    def made(self, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return it without a graph, and what `again` is to be given."""
        kernels = _kernels(gate)
        if kernels and self._silu:
            return kernels.swiglu_forward(gate, up)[2], ()
        act = self._act(gate)
        return act * up, (act,) if self._keep and self._silu else ()

    def again(self, gate: Tensor, up: Tensor, *kept: Tensor) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        """Return it, and what makes the gradients of `gate` and `up` of its own; these may be written over both."""
        kernels = _kernels(gate)
        if kernels and self._silu:
            return self.made(gate, up)[0], lambda gradient: kernels.swiglu_backward(gate, up, gradient)
        if kept:
            (act,) = kept
            back = torch.ops.aten.silu_backward
            return act * up, lambda gradient: (back(gradient * up, gate), gradient * act)
        leaves = [some.detach().requires_grad_() for some in (gate, up)]
        with torch.enable_grad():
            found = self(*leaves)
        return found.detach(), lambda gradient: torch.autograd.grad(found, leaves, gradient)


def is_norm(module: nn.Module) -> bool:
    """Return whether it is the RMS norm of Llama and its relatives, x / sqrt(mean x² + eps) * weight."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def norm(module: Any, x: Tensor) -> Tensor:
    """Return what such a norm makes of x (..., D)."""
    weight, eps = module.weight, module.variance_epsilon
    if x.dtype != weight.dtype or module._forward_hooks:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    if x.device.type in _ONE_KERNEL:
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.requires_grad:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    found: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return found


class _Norm(torch.autograd.Function):
    """The gradient of x is (g w - x mean(g w x) / s²) / s, where s = sqrt(mean x² + eps); in float32 throughout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        inverse: Tensor = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x, read = gradient.float() * weight.float(), x.float()
        along = (of_x * read).mean(dim=-1, keepdim=True).mul_(inverse.square())
        return of_x.addcmul_(read, along, value=-1).mul_(inverse).to(x.dtype), None, None


def rotates(module: nn.Module) -> bool:
    """Return whether it is an attention whose rotary embedding is `rotate`: tried, not taken from its name."""
    forward = type(module).forward
    if _ROTATE not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    return _ROTATE in forward.__globals__ and _is_rotation(forward.__globals__[_ROTATE])


def _is_rotation(theirs: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    some = torch.linspace(-1, 1, 64)
    query, key = some[:48].view(1, 3, 2, 8), some[16:48].view(1, 2, 2, 8)
    cos, sin = some[:16].view(1, 2, 8), some[24:40].view(1, 2, 8)
    try:
        expected, found = theirs(query, key, cos, sin), rotate(query, key, cos, sin)
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, or is about other shapes
        return False


def rotating(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of an attention that `rotates`, with `rotate` in place of the library's function.

    The code stays the library's; only what that one name means is replaced, and for this module alone.
    """
    theirs = type(module).forward
    names = {**theirs.__globals__, _ROTATE: rotate}
    own = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    own.__kwdefaults__ = theirs.__kwdefaults__
    return MethodType(own, module)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys (..., h), turned: x cos + (-second half of x, first half of x) sin.

    Where cos and sin are narrower than a head, only as much of it is turned, as in GPT-NeoX. On a GPU the result may be
    written over `query` and `key`.

    Args:
        query: (B, H, T, h).
        key: (B, G, T, h).
        cos: (B, T, h) of the angle of each position.
        sin: (B, T, h).
        unsqueeze_dim: where the dimension of heads stands.
    """
    kernels = _kernels(query)
    if kernels and unsqueeze_dim == 1:
        turned: tuple[Tensor, Tensor] = kernels.LigerRopeFunction.apply(query, key, cos, sin)
        return turned
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    # OLMo 2 has its angles in float32 whatever the type of the rest.
    turned: Tensor = _Rotated.apply(x[..., :width], cos, sin).to(x.dtype)  # type: ignore[no-untyped-call]
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


class _Rotated(torch.autograd.Function):
    """A rotation; its gradient is turned the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(gradient, cos, -second, -first), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(a, b) -> (a cos - b first, b cos + a second), for the halves a and b of x."""
    (a, b), out = x.chunk(2, dim=-1), x * cos
    of_a, of_b = out.chunk(2, dim=-1)
    of_a.addcmul_(b, first, value=-1)
    of_b.addcmul_(a, second)
    return out
