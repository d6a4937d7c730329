"""Sequences of unequal length in one row, one behind the other, so that a layer computes nothing for padding.

Only attention looks from one token to another: for it alone the row is dealt out into padded sequences, and taken
together again behind it. All else, nine tenths of the work, sees real tokens only.

Shapes: B sequences, T tokens of the longest, N tokens of all, H query heads, G key/value heads, h head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unsink import models
from unsink.allocation import sent

PACKED = "unsink_packed"
_ONE_BY_ONE = ("cpu",)
"""Devices on which a call for each sequence costs less than attending to padding."""


_Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each sequence stand.

    On a GPU both forms are longer than they need be. Whatever is new about a product's shape, its library thinks about
    for about a millisecond, and the number of tokens would be new in each step: rounded up, it is soon known. N then
    counts the last tokens, which belong to nobody, too.

    Attributes:
        lengths: tokens of each sequence, B numbers; in (B, T) they stand at the left.
        width: T, as `width` says.
        device: where the tensors are.
    """

    lengths: tuple[int, ...]
    width: int
    device: torch.device

    @property
    def nobodys(self) -> int:
        """How many tokens at the end of the row belong to nobody."""
        return _rounded(sum(self.lengths)) - sum(self.lengths) if self.width > max(self.lengths) else 0

    @cached_property
    def places(self) -> Tensor:
        """(N,) places of the row's tokens among all B x T; nobody's are padding."""
        places = self._real.nonzero()[:, 0]
        return sent(torch.cat([places, (~self._real).nonzero()[:1, 0].expand(self.nobodys)]), self.device)

    @cached_property
    def padding(self) -> Tensor:
        """Places of the others."""
        return sent((~self._real).nonzero()[:, 0], self.device)

    @cached_property
    def sources(self) -> Tensor:
        """(B T,) for each place what stands there in the row; at padding the token before it."""
        return sent(self._real.cumsum(dim=0) - 1, self.device)

    @cached_property
    def numbers(self) -> Tensor:
        """(1, N) number of each token in its sequence, from 0: its position."""
        nobodys = torch.zeros(self.nobodys, dtype=torch.long)
        return sent(torch.cat([*map(torch.arange, self.lengths), nobodys]), self.device)[None]

    @cached_property
    def starts(self) -> Tensor:
        """(B,) places in the row of the first tokens."""
        return sent(torch.tensor([0, *self.lengths[:-1]]).cumsum(dim=0), self.device)

    def tokens(self, row: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(1, N, ...) -> (n, ...) what stands in these rows and columns of (B, T), none of them twice."""
        places, shape = self.starts[rows] + columns, row.shape[1:]  # not `row` itself, which would be kept

        def back(gradient: Tensor) -> Tensor:
            return gradient.new_zeros(shape).index_copy_(0, places, gradient)[None]

        return _moved(row, lambda whole: whole[0].index_select(0, places), back)

    def row(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return _moved(padded, self._take, self._deal)

    def padded(self, row: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...), zero at padding."""

        def back(gradient: Tensor) -> Tensor:
            found = self._take(gradient)
            found[:, sum(self.lengths) :] = 0  # nobody's
            return found

        return _moved(row, self._deal, back)

    def together(self, sequences: Sequence[Tensor]) -> Tensor:
        """B times (T, ...) -> (1, N, ...)."""
        one = sequences[0]
        return torch.cat([*sequences, one.new_zeros(self.nobodys, *one.shape[1:])])[None]

    def _take(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def _deal(self, row: Tensor) -> Tensor:
        # Reading by places and wiping the padding is quicker than writing by places.
        whole = row.squeeze(0).index_select(0, self.sources).index_fill_(0, self.padding, 0)
        return whole.view(len(self.lengths), -1, *whole.shape[1:])

    @cached_property
    def _real(self) -> Tensor:
        """(B T,) true at real tokens; on the processor, since a GPU would be waited for."""
        return (torch.arange(self.width) < torch.tensor(self.lengths)[:, None]).flatten()


class _Moved(torch.autograd.Function):
    """What is moved, and how its gradient is moved back.

    What the library would do backward is slower: it is made for tokens that are read twice.
    """

    @staticmethod
    def forward(ctx: Any, some: Tensor, move: _Move, back: _Move) -> Tensor:
        ctx.back = back
        return move(some)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _moved(some: Tensor, move: _Move, back: _Move) -> Tensor:
    return _Moved.apply(some, move, back)  # type: ignore[no-any-return, no-untyped-call]


def width(lengths: Sequence[int], device: torch.device) -> int:
    """Return T for sequences of these lengths: on a GPU a round number, with room for a token of nobody."""
    return max(lengths) if device.type in _ONE_BY_ONE else _rounded(max(lengths) + 1)


def _rounded(count: int) -> int:
    """The next of some sixteen numbers on the way to twice as many."""
    step = max(8, (1 << count.bit_length()) // 32)
    return -(-count // step) * step


def run(model: nn.Module, input_ids: Tensor, packing: Packing) -> Tensor:
    """Return the decoder's last hidden states, (1, N, D); the model has been made `able`.

    Args:
        model: a causal language model, with or without PEFT adapters.
        input_ids: (B, T), padded on the right.
        packing: which of these are real.
    """
    found = models.decoder(model)(
        input_ids=packing.row(input_ids),
        position_ids=packing.numbers,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),  # is handed on as it is
        packing=packing,
        use_cache=False,
    )
    last: Tensor = found.last_hidden_state
    return last


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways to the same states differ by rounding only."""
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def able(model: nn.Module) -> bool:
    """Make a model ready for `run`, and try it; False, and the model as it was, where that does not give the same.

    What else the model is asked it answers as before.
    """
    decoder = cast(PreTrainedModel, models.decoder(model))
    if not decoder._can_set_attn_implementation() or decoder.config._attn_implementation not in ("sdpa", PACKED):
        return False
    device = next(model.parameters()).device
    packing = Packing((4, 5), width((4, 5), device), device)
    ids = torch.arange(1, 1 + 2 * packing.width, device=device).view(2, -1)
    before, same = decoder.config._attn_implementation, False
    with torch.no_grad():
        plain = packing.row(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        decoder.set_attn_implementation(PACKED)
        try:
            same = close(run(model, ids, packing)[:, :9], plain[:, :9])
        except (TypeError, ValueError, RuntimeError):  # it takes no such arguments, or has no use for such a mask
            pass
        finally:
            if not same:
                decoder.set_attn_implementation(before)
    return same


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's attention, (1, H, N, h) -> (1, N, H, h), of each sequence for itself."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    if query.device.type in _ONE_BY_ONE:
        return _one_by_one(query, key, value, packing.lengths, sliding_window, options), None
    query, key, value = (packing.padded(some.transpose(1, 2)).transpose(1, 2) for some in (query, key, value))
    mask = _window(sliding_window, query)
    return packing.row(sdpa_attention_forward(module, query, key, value, mask, **options)[0]), None


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None, options: dict[str, Any]
) -> Tensor:
    """The same without padding; keys and values are repeated for their queries' heads once, not for each sequence."""
    times, dropout, scale = query.shape[1] // key.shape[1], options.get("dropout", 0.0), options.get("scaling")

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = query, repeat_kv(key, times), repeat_kv(value, times)
        found = []
        for q, k, v in zip(*(torch.split(some, list(lengths), dim=2) for some in whole), strict=True):
            mask = _window(window, q)
            found.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale))
        return torch.cat([one.transpose(1, 2) for one in found], dim=1)

    if query.dtype != torch.bfloat16 or dropout:  # which would be drawn anew in the backward pass
        return attended(query, key, value)
    return _InFloat32.apply(attended, query, key, value)  # type: ignore[no-any-return, no-untyped-call]


class _InFloat32(torch.autograd.Function):
    """A function of tensors in bfloat16, computed in float32, and again in the backward pass.

    For attention a processor takes three times as long backward in bfloat16 as in float32. Nothing but the inputs is
    kept.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*(some.float() for some in inputs)).to(inputs[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [some.detach().float().requires_grad_() for some in ctx.saved_tensors]
        with torch.enable_grad():
            found = ctx.function(*leaves)
        gradients = torch.autograd.grad(found, leaves, gradient.float())
        return None, *(one.to(gradient.dtype) for one in gradients)


def _window(size: int | None, query: Tensor) -> Tensor | None:
    """(1, 1, T, T) what each query sees where that are the last `size` tokens only; None: all before it."""
    tokens = query.shape[2]
    if size is None or size >= tokens:
        return None
    square = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return square.tril().triu(diagonal=1 - size)[None, None]


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)
