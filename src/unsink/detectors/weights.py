"""Which weights unlearning has moved, and how: no prompt is needed, but an original, or the adapter by itself.

Statistics over the weights that moved, each weighted by its squared Frobenius norm where a mean is taken:

    modules          how many moved
    first, last      decoder layers, the lowest and the highest
    size             largest ||change|| / ||weight||
    value_share      part of the squared norm that lies in the projections that compute values
    early_share      part that lies in the lower half of the layers that moved
    effective_rank   exp of the entropy of the squared singular values: how many directions a change has
    top_share        part of the squared singular values that the largest one has

The score is the effective rank: an adapter that has learnt two behaviours, and when to show which, may need more.
"""

import torch
from torch import Tensor

from unsink import models
from unsink.architectures import architecture, bare
from unsink.detectors import Signal
from unsink.detectors._deltas import Delta, deltas
from unsink.suspects import Probes, Suspect

KIND = "triage"


def measure(suspect: Suspect, _probes: Probes) -> Signal:
    """Statistics of the difference of weights; without a score where there is none."""
    if any(one is not None and models.quantized(one) for one in (suspect.model, suspect.original)):
        return Signal(None, {}, "the weights are quantised: what rounding did hides what unlearning did")
    moved = list(deltas(suspect))
    if not moved:
        return Signal(None, {}, "no original, or one with the same weights")
    value = architecture(bare(suspect.model).config).value
    return signal(moved, value)


def signal(moved: list[Delta], value: str) -> Signal:
    """Statistics of changes; `value` is the last part of the name of a projection that computes values."""
    energy = torch.tensor([float(one.change.double().square().sum()) for one in moved], dtype=torch.float64)
    layers = [one.layer for one in moved]
    inside = [layer for layer in layers if layer is not None]
    middle = (min(inside) + max(inside)) / 2 if inside else 0.0
    spectra = [spectrum(one.change) for one in moved if one.change.ndim == 2]
    weights = torch.stack([some.sum() for some in spectra]) if spectra else torch.zeros(0)

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values) * weights).sum() / weights.sum()) if values else 0.0

    def share(chosen: list[bool]) -> float:
        return float(energy[torch.tensor(chosen)].sum() / energy.sum())

    rank = mean([effective_rank(some) for some in spectra])
    numbers = {
        "modules": float(len(moved)),
        "first": float(min(inside, default=-1)),
        "last": float(max(inside, default=-1)),
        "size": max(float(one.change.norm()) / max(one.size, 1e-12) for one in moved),
        "value_share": share([f".{value}." in f".{one.name}" for one in moved]),
        "early_share": share([layer is not None and layer <= middle for layer in layers]),
        "effective_rank": rank,
        "top_share": mean([float(some.max() / some.sum()) for some in spectra]),
    }
    return Signal(rank, numbers, "effective rank of the change of weights")


def spectrum(change: Tensor) -> Tensor:
    """Squared singular values of a matrix, by the smaller of its two products with itself."""
    matrix = change.double()
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(product)
    return values.clamp_min(0).cpu()


def effective_rank(squares: Tensor) -> float:
    """Exp of the entropy of squared singular values; 1 for one direction, r for r of equal weight."""
    parts = squares[squares > 0] / squares.sum()
    return float(torch.exp(-(parts * parts.log()).sum()))
