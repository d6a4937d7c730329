"""Formulas on tensors; no model enters here.

Shapes: B sequences, T tokens, V vocabulary, N labelled tokens of a whole batch, W windows, D hidden, K value width.
Losses are in nats unless they say otherwise; tokens without a label never come here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""From last hidden states (N, D) to logits (N, V), row by row. The logits are overwritten before the backward pass,
which may not need them, as that of a product does not."""


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) for every labelled token, in nats, shape (N,).

    Args:
        logits: (N, V), row n predicts `labels[n]`; the one-position shift is already done.
        labels: (N,) token ids, none of them masked.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def grouped_sum(values: Tensor, groups: Tensor, count: int | None = None) -> Tensor:
    """Return the sum of `values` (N,) in each group, shape (W,); `groups` (N,) names the group, from 0 without gaps.

    A GPU is waited for where their `count` W is not given.
    """
    count = int(groups.max()) + 1 if count is None else count
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def grouped_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of `values` (N,) in each group, shape (W,); see `grouped_sum`."""
    return grouped_sum(values, groups) / groups.bincount()


def rank(groups: Tensor) -> Tensor:
    """Return (N,) the place of each element in its group, from 0; `groups` (N,) is ascending, from 0 without gaps."""
    counts = groups.bincount()
    starts = counts.cumsum(0) - counts
    return torch.arange(len(groups), device=groups.device) - starts[groups]


def preference(margin: Tensor, beta: float) -> Tensor:
    """Return -(2/beta) * mean log sigmoid(beta * margin), a scalar; (2/beta) * ln 2 where all margins are 0.

    The form that NPO (Zhang et al. 2024, eq. 3, arXiv 2404.05868), SimNPO and DPO share. Margins in nats, any shape:
    how far the policy is on the wanted side. `beta` is an inverse temperature above 0.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * margin).mean()


def kl_divergence(reference: Tensor, policy: Tensor) -> Tensor:
    """Return KL(reference || policy), mean over the N rows given, in nats per token; both are logits (N, V)."""
    log_policy = F.log_softmax(policy.float(), dim=-1)
    log_reference = F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(log_policy, log_reference, reduction="sum", log_target=True) / len(policy)


# --- the same from hidden states, a few rows at a time: (N, V) numbers never exist, nor does a graph through them


def head_nll(states: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Return `token_nll` of the logits `head(states)`, shape (N,).

    Args:
        states: (N, D), row n predicts `labels[n]`.
        labels: (N,) token ids, none of them masked.
        head: the output projection.
    """
    if _trains(head, states):
        return token_nll(head(states), labels)

    def formula(
        rows: slice, wanted: tuple[bool, ...], dtype: torch.dtype, logs: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        own = labels[rows, None]
        nll = -logs.gather(1, own)[:, 0]
        if not wanted[0]:
            return nll, (None,)
        slopes = torch.exp(logs, out=_room_for(logs, dtype))
        return nll, (slopes.scatter_(1, own, torch.expm1(-nll).to(slopes.dtype)[:, None]),)

    return _by_rows(formula, head, states)


def head_kl(reference: Tensor, policy: Tensor, head: Head) -> Tensor:
    """Return `kl_divergence` of the logits that `head` makes of two lots of states (N, D), a scalar."""
    if _trains(head, policy):
        return kl_divergence(head(reference), head(policy))

    def formula(
        _: slice, wanted: tuple[bool, ...], dtype: torch.dtype, first: Tensor, second: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        chances = first.exp()
        gap = first.sub_(second)
        of_policy = torch.sub(second.exp_(), chances, out=_room_for(second, dtype)) if wanted[1] else None
        if not wanted[0]:
            return chances.mul_(gap).sum(dim=-1), (None, of_policy)
        kl = torch.einsum("nv,nv->n", chances, gap)
        return kl, (gap.sub_(kl[:, None]).mul_(chances), of_policy)

    return _by_rows(formula, head, reference, policy).mean()


def nll_slopes(states: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return `head_nll`, shape (N,), and its gradient by the states, (N, D), for `kl_of_nll`."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        nll = head_nll(states, labels, head)
        (slopes,) = torch.autograd.grad(nll.sum(), states)
    return nll.detach(), slopes


def kl_of_nll(reference: Tensor, policy: Tensor, slopes: Tensor, step: Tensor) -> Tensor:
    """Return KL(reference || policy), mean over the N rows given, in nats per token, from losses alone.

    Under a linear head the loss of a label is convex in the states h, and KL is its Bregman divergence:

        KL(h' || h) = nll(h) - nll(h') - g (h - h'),   g the gradient of nll at h'

    whatever the label: what it adds to both losses is linear. So the reference's logits are needed once, for g.

    Args:
        reference: (N,) losses of the reference.
        policy: (N,) losses of the policy for the same labels.
        slopes: (N, D) gradient of `reference` by the reference's states.
        step: (N, D) states of the policy − those of the reference.
    """
    return (policy - reference - (slopes * step).sum(dim=-1)).mean()


_Formula = Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
"""From rows, what gradients are wanted and the head's type, and log-probabilities (n, V) in float32, which it may
overwrite, to values (n,) and their gradients by the logits."""
_ROOM = 2**27
"""Bytes of the logits that are made at a time; with fewer rows reading the head's weights would take longer than using
them. On two cores a row of 49,152 costs 1.9 ms with a fourth of the room, 1.5 with half of it and 1.3 with this."""
_ALIKE = ("cuda",)
"""Devices on which rows are better read twice than in runs of new lengths."""


def _trains(head: Head, states: Tensor) -> bool:
    """Whether the head itself has something to learn, which only a graph through all logits can tell it."""
    return torch.is_grad_enabled() and head(states[:0].detach()).requires_grad


def _by_rows(formula: _Formula, head: Head, *states: Tensor) -> Tensor:
    return _ByRows.apply(formula, head, *states)  # type: ignore[no-any-return, no-untyped-call]


class _ByRows(torch.autograd.Function):
    """Values (N,) that depend on one row of states each.

    Their gradients are made in the forward pass, where the logits are at hand; the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, formula: _Formula, head: Head, *states: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        gradients = [torch.empty_like(some) if want else None for some, want in zip(states, wanted)]
        values = []
        for rows, known in _rows(head, states[0]):
            some = [part[rows].detach().requires_grad_(want) for part, want in zip(states, wanted)]
            logits: list[Tensor | None] = []
            logs = []
            for part, want in zip(some, wanted):
                with torch.enable_grad():
                    made = head(part)
                logs.append(_log_softmax(made.detach(), part))
                logits.append(made if want else None)
            dtype = made.dtype
            del made
            found, slopes = formula(rows, wanted, dtype, *logs)
            values.append(found[known:])
            for part, kept, slope, gradient in zip(some, logits, slopes, gradients):
                if kept is not None and slope is not None and gradient is not None:
                    (gradient[rows],) = torch.autograd.grad(kept, part, slope.to(kept.dtype))
        ctx.gradients = gradients
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if some is None else some * upstream[:, None].to(some.dtype) for some in ctx.gradients]
        return None, None, *scaled


def _room_for(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a result of the same shape is written: over its float32 input, or on a GPU at once in another type."""
    return torch.empty_like(result, dtype=dtype) if result.is_cuda and result.dtype != dtype else result


def _log_softmax(logits: Tensor, states: Tensor) -> Tensor:
    """(n, V) in float32: in the logits' own memory, unless they are of another type, or the states themselves."""
    plain = logits.float()
    own = plain.untyped_storage().data_ptr() != states.untyped_storage().data_ptr()
    return torch.log_softmax(plain, dim=-1, out=plain if own else None)


def _rows(head: Head, states: Tensor) -> Iterator[tuple[slice, int]]:
    """Runs of rows, and how many of a run's rows were in the one before."""
    with torch.no_grad():
        width = head(states[:0]).shape[-1]
    total, bytes_ = len(states), 4 * width
    if states.device.type not in _ALIKE:
        count = max(1, -(-total * bytes_ // _ROOM))  # runs of nearly equal length
        yield from ((slice(n * total // count, (n + 1) * total // count), 0) for n in range(count))
        return
    # Runs of the same few lengths in each step, whose products a GPU's library knows: the last one begins earlier,
    # unless it is the only one.
    quarter = max(1, _ROOM // bytes_ // 4)
    for start in range(0, max(1, total), 4 * quarter):
        stop = min(total, start + 4 * quarter)
        first = max(0, stop - -(-(stop - start) // quarter) * quarter)
        yield slice(first, stop), start - first


def masked_mse(states: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared difference per hidden unit, over real tokens of a sequence, then over sequences.

    Args:
        states: (B, T, D) hidden states of the policy.
        goal: (B, T, D) or broadcastable to it.
        mask: (B, T), true at real tokens.
    """
    return _mean_of_sequences((states.float() - goal).square().mean(-1), mask)


def _mean_of_sequences(per_token: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked tokens of a sequence, then over sequences: (B, T) -> scalar."""
    weight = mask.to(per_token.dtype)
    return ((per_token * weight).sum(1) / weight.sum(1)).mean()


# --- the value-norm term: a mean over heads, over positions of a sequence, then over sequences; none may lack them


def squared_norm_gap(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared gap of value norms, a scalar.

    (1/|S|) sum_{i in S} (||v_i|| - ||v_i'||)^2, arXiv 2510.17021, the regulariser of section 4.

    Args:
        policy: (B, T, G) norms of the value vectors; G = 1 where the heads count as one vector.
        goal: norms to reach, broadcastable to (B, T, G).
        mask: (B, T), true at the positions S of each sequence.
    """
    return _mean_of_sequences((policy - goal).square().mean(-1), mask)


def absolute_norm_gap(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute gap of value norms, a scalar; arguments as in `squared_norm_gap`.

    What the code released with arXiv 2510.17021 computes in place of the square. With a goal of 0 it is the mean norm.
    """
    return _mean_of_sequences((policy - goal).abs().mean(-1), mask)


def value_angle(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between value vectors, a scalar.

    Args:
        policy: (B, T, G, h) value vectors.
        goal: (B, T, G, h) vectors whose direction to take.
        mask: (B, T), true at the positions of each sequence.
    """
    return _mean_of_sequences((1 - F.cosine_similarity(policy, goal, dim=-1)).mean(-1), mask)
