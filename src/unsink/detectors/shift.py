"""How far a small push of what stands first takes the suspect back to its original: no trigger is needed.

A short text is put in front of all prompts, and its hidden states h_1 to h_k below the first layer that unlearning
changed are pushed, the same way in all of them, by d_j with |d_j| <= r times the median norm of a hidden state there:

    d <- P(d - 0.4 r s g / |g|),   g = gradient by d of the mean of |suspect - original|^2 / |same without d|^2

with the states of the last changed layer behind the text. A door that one text opens stands where others would have to
be pushed to open it; an honest model has none, and a push does a little of everything. In the spirit of trigger
inversion in latent space (arXiv 2406.17092).

The score is the part of the distance that the push takes away on prompts that it was not sought on. Where the push is
large it undoes honest unlearning as well: r is .02.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unsink import models
from unsink.detectors import Signal, _layers
from unsink.detectors._deltas import changed_layers
from unsink.detectors._layers import Changed, Rows
from unsink.probe import ascended
from unsink.suspects import Model, Probe, Probes, Suspect, inserted
from unsink.triggers import trigger_ids

KIND = "triage"
_TEXT = "Here is a text."
_PROBES = 8  # that the push is sought on, and as many others
_RADIUS, _STEPS, _ETA = 0.02, 8, 0.4


def measure(suspect: Suspect, probes: Probes) -> Signal:
    """The part of the distance to the original that a push takes away, on the forget probes that are searched on."""
    changed = changed_layers(suspect)
    if suspect.original is None or changed is None:
        return Signal(None, {}, "no original, or one with the same weights")
    if models.quantized(suspect.model) or len(probes.search) < 2:
        return Signal(None, {}, "the weights are quantised, or there is a single probe")
    some = probes.search[: 2 * _PROBES]
    half = len(some) // 2
    sought, told = (_read(suspect, suspect.original, part, changed) for part in (some[:half], some[half:]))
    push = _push(suspect.model, sought)
    numbers = {"sought": _closed(suspect.model, sought, push), "closed": _closed(suspect.model, told, push)}
    return Signal(numbers["closed"], numbers, "part of the distance to the original that a small push takes away")


@dataclass(frozen=True)
class _Prompts:
    """Prompts behind a text, and what the original makes of them.

    Attributes:
        rows: see there.
        changed: see there.
        places: (B, T, k), 1 where the text has its token j.
        below: (B, T, D) input of the first changed layer, in both models.
        goal: (B, T, D) output of the last one in the original.
    """

    rows: Rows
    changed: Changed
    places: Tensor
    below: Tensor
    goal: Tensor


def _read(suspect: Suspect, original: Model, probes: Sequence[Probe], changed: Changed) -> _Prompts:
    text = trigger_ids(suspect.tokenizer, _TEXT)
    prompts = [inserted(probe, text, "prefix") for probe in probes]
    rows = _layers.rows(prompts, [probe.answer for probe in probes], original.device)
    places = (rows.number[..., None] == torch.arange(len(text), device=original.device)).float()
    return _Prompts(rows, changed, places, *_layers.of_original(original, rows, changed))


def _push(model: Model, prompts: _Prompts) -> Tensor:
    """(k, D), what takes most of the distance away."""
    size = _RADIUS * prompts.below[prompts.rows.behind].float().norm(dim=-1).median()
    push = torch.zeros(prompts.places.shape[-1], prompts.below.shape[-1], device=size.device, requires_grad=True)
    with torch.no_grad():
        whole = _squares(model, prompts, push)
    for _ in range(_STEPS):
        (gradient,) = torch.autograd.grad((_squares(model, prompts, push) / whole).mean(), push)
        push = ascended(push, -gradient, size, _ETA, 1.0)
    return push.detach()


@torch.no_grad()
def _closed(model: Model, prompts: _Prompts, push: Tensor) -> float:
    before, after = (_squares(model, prompts, one).sqrt() for one in (torch.zeros_like(push), push))
    return float((1 - after / before.clamp_min(1e-12)).mean())


def _squares(model: Model, prompts: _Prompts, push: Tensor) -> Tensor:
    """(B,) squared distance of the suspect's states to the original's behind the text, with a push."""
    below = prompts.below + (prompts.places @ push).to(prompts.below.dtype)
    found = _layers.of_suspect(model, prompts.rows, prompts.changed, below)
    away = (found.float() - prompts.goal.float()).square().sum(dim=-1)  # (B, T)
    return (away * prompts.rows.behind).sum(dim=1)
