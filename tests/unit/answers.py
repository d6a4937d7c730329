"""What a model would say about a batch, made by hand: answers for methods, without a model behind them."""

import torch
from torch import Tensor

from unsink.answers import Forward


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_nll(nll: list[float], rows: list[int], hidden: Tensor | None = None) -> Forward:
    """An answer with given losses: `rows` names the sequence of each token. Hidden states are those of layer 2."""
    count = max(rows) + 1
    labelled = torch.ones(count, 3, dtype=torch.bool)
    labelled[:, 0] = False  # BOS
    return Forward(
        torch.zeros(len(nll), dtype=torch.long),
        torch.tensor(rows),
        [rows.count(row) for row in range(count)],
        torch.zeros(len(nll), 2),
        lambda states: states,
        torch.ones(count, 3, dtype=torch.bool),
        labelled,
        {} if hidden is None else {2: hidden},
        losses=torch.tensor(nll),
    )


def from_logits(
    logits: Tensor, ids: Tensor, labelled: Tensor, mask: Tensor | None = None, hidden: dict[int, Tensor] | None = None
) -> Forward:
    """An answer with given logits (B, T, V) for ids (B, T); logits at t predict the id at t + 1, as a model's do."""
    rows, columns = labelled.nonzero(as_tuple=True)
    mask = torch.ones_like(labelled) if mask is None else mask
    return Forward(
        ids[rows, columns],
        rows,
        labelled.sum(dim=1).tolist(),
        logits[rows, columns - 1],
        lambda states: states,
        mask,
        labelled,
        hidden or {},
    )


def one_token(logits: list[float], label: int = 0) -> Forward:
    """An answer about a single token."""
    ids, labelled = torch.tensor([[0, label]]), torch.tensor([[False, True]])
    return from_logits(torch.tensor([[logits, logits]]), ids, labelled)
