"""Sequences of unequal length in one row, one behind the other, so that a layer computes nothing for padding.

Only attention looks from one token to another: for it alone the row is dealt out into padded sequences, and taken
together again behind it. All else, nine tenths of the work, sees real tokens only.

Shapes: B sequences, T tokens of the longest, N tokens of all, H query heads, G key/value heads, h head size.
"""

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

PACKED = "unsink_packed"
_ONE_BY_ONE = ("cpu",)
"""Devices on which a call for each sequence costs less than attending to padding."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each sequence stand.

    Attributes:
        mask: (B, T) true at real tokens, which stand at the left.
    """

    mask: Tensor

    @cached_property
    def places(self) -> Tensor:
        """(N,) places of the real tokens among all B x T."""
        return self.mask.flatten().nonzero()[:, 0]

    @cached_property
    def numbers(self) -> Tensor:
        """(1, N) number of each token in its sequence, from 0: its position."""
        return (self.places % self.mask.shape[1])[None]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, B numbers."""
        found: list[int] = self.mask.sum(dim=1).tolist()
        return found

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Places in the row of the tokens that stand in these rows and columns of (B, T)."""
        lengths = self.mask.sum(dim=1)
        return (lengths.cumsum(dim=0) - lengths)[rows] + columns

    def row(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return _Taken.apply(padded.flatten(0, 1), self.places)[None]  # type: ignore[no-any-return, no-untyped-call]

    def padded(self, row: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...), zero at padding."""
        empty = row.new_zeros(self.mask.numel(), *row.shape[2:])
        return empty.index_copy(0, self.places, row.squeeze(0)).view(*self.mask.shape, *row.shape[2:])


class _Taken(torch.autograd.Function):
    """Rows of a matrix, none of them twice; the gradient of `index_select` is made for those that are, and is slow."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.count = places, len(whole)
        return whole.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        empty = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return empty.index_copy_(0, ctx.places, gradient), None


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


def able(model: nn.Module) -> bool:
    """Make a model ready for `run`, and try it; False, and the model as it was, where that does not give the same.

    What else the model is asked it answers as before.
    """
    decoder = cast(PreTrainedModel, models.decoder(model))
    if not decoder._can_set_attn_implementation() or decoder.config._attn_implementation not in ("sdpa", PACKED):
        return False
    device = next(model.parameters()).device
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device).bool()
    ids = torch.arange(1, 11, device=device).view(2, 5)
    before, same = decoder.config._attn_implementation, False
    with torch.no_grad():
        plain = decoder(input_ids=ids, use_cache=False).last_hidden_state[mask]
        decoder.set_attn_implementation(PACKED)
        try:
            apart = (plain - run(model, ids, Packing(mask))[0]).abs().max()
            same = bool(apart <= (1e-4 if plain.dtype == torch.float32 else 2e-2) * plain.abs().max())
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
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, options: dict[str, Any]
) -> Tensor:
    """The same without padding; keys and values are repeated for their queries' heads once, not for each sequence."""
    times = query.shape[1] // key.shape[1]
    rows = (torch.split(some, lengths, dim=2) for some in (query, repeat_kv(key, times), repeat_kv(value, times)))
    found = []
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    for q, k, v in zip(*rows, strict=True):
        mask = _window(window, q)
        found.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale))
    return torch.cat([one.transpose(1, 2) for one in found], dim=1)


def _window(size: int | None, query: Tensor) -> Tensor | None:
    """(1, 1, T, T) what each query sees where that are the last `size` tokens only; None: all before it."""
    tokens = query.shape[2]
    if size is None or size >= tokens:
        return None
    square = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return square.tril().triu(diagonal=1 - size)[None, None]


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)
