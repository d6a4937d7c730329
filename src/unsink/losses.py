"""Formulas on tensors; no model enters here.

Shapes: B sequences, T tokens, V vocabulary, N labelled tokens of a whole batch, W windows, D hidden, K value width.
A label of -100 is no label. Losses are in nats unless they say otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) for every labelled token, in nats, shape (N,).

    Args:
        logits: (N, V), row n predicts `labels[n]`; the one-position shift is already done.
        labels: (N,) token ids, none of them masked.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def grouped_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Return the sum of `values` (N,) in each group, shape (W,); `groups` (N,) names the group, from 0 without gaps."""
    count = int(groups.max()) + 1
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
