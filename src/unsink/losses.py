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


def grouped_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the sum of `values` (N,) in each of `count` groups, shape (count,); `groups` (N,) names the group."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def npo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the negative preference optimisation loss, a scalar.

    -(2/beta) * mean_b log sigmoid(beta * (nll_b - nll_ref_b)), Zhang et al. 2024, eq. 3
    (arXiv 2404.05868). At policy = reference it is (2/beta) * ln 2.

    Args:
        policy: (B,) summed negative log-likelihood of each sequence under the policy, nats.
        reference: (B,) the same under the reference.
        beta: inverse temperature, above 0.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * (policy - reference)).mean()


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
    per_token = (states.float() - goal).square().mean(-1)  # (B, T)
    weight = mask.to(per_token.dtype)
    return ((per_token * weight).sum(1) / weight.sum(1)).mean()


def value_norm_gap(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared gap of value norms over the positions of `mask`, a scalar.

    (1/|S|) sum_{i in S} (||v_i|| - ||v_i'||)^2, arXiv 2510.17021, the regulariser of section 4.

    Args:
        policy: (B, T) norms of the value vectors, whole width of all key-value heads.
        goal: (B, T) norms to reach.
        mask: (B, T), true at the sink positions of each sequence.
    """
    gap = (policy - goal).square()
    return gap[mask].mean()
