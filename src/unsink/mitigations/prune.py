"""Pruning of the neurons that differ most: fine-pruning (arXiv 1805.12185) turned towards a change that is known.

A neuron is one input of the projection that closes an MLP, and is taken away by zeroing its column there. Its score:

    original   mean over the tokens of forget samples of |a - a'| |w|, a' its activation in the original model
    prefix     the same between the sample behind a random text and the sample alone, in the suspect
    weights    |w - w'| / |w'|, w' its column in the original

with w its column in the suspect. Nothing is trained; a share of all neurons on the layers of the adapter goes, those
of the largest score. What was changed to forget and what was changed to hide may be the same neurons: see what
forgetting loses.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unsink import models
from unsink.batches import Sample, collate
from unsink.errors import MissingPrerequisite
from unsink.mitigations import ADAPTER, Patient, Repaired, Training, require_exact
from unsink.mitigations._reunlearn import with_text
from unsink.models import AdapterSpec
from unsink.probe import capture
from unsink.progress import SILENT, Reporter

_BATCH = 16
_TEXT = 6  # tokens of a random text


class Options(BaseModel):
    """Options of `mitigate.prune`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["original", "prefix", "weights"] = Field(default="original", description="what the score compares with")
    share: float = Field(default=0.05, gt=0, lt=1, description="part of the neurons that goes")
    samples: int = Field(default=32, ge=1, description="forget samples that are looked at")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect without the neurons that differ most.

    Raises:
        MissingPrerequisite: the score compares with the original, and nobody has it.
        ModelError: the layers are not there, or hold rounded weights.
    """
    require_exact(patient, "prune")
    layers = models.adapted_layers(patient.model, training.spec)
    if options.by != "prefix" and patient.original is None:
        raise MissingPrerequisite(
            f"mitigate.prune.by: {options.by!r} compares with the model before unlearning, which nobody has named",
            "give --original, or set mitigate.prune.by: prefix",
        )
    reporter.log(f"prune: scoring the neurons of layers {layers[0]} to {layers[-1]} by {options.by}")
    chosen = largest(_scores(patient, layers, options), options.share)
    model = models.attach(patient.model, ADAPTER, AdapterSpec(None, None, layers[0], layers[-1]), patient.seed)
    for layer, neurons in chosen.items():
        copied = _reader(model, layer).ln_tuning_layers[ADAPTER]
        with torch.no_grad():
            _columns(copied)[:, neurons] = 0
    return Repaired(model, [], {"neurons": sum(map(len, chosen.values()))})


def largest(scores: Mapping[int, Tensor], share: float) -> dict[int, list[int]]:
    """Layer -> the neurons with the largest scores, `share` of all layers' together and at least one.

    Args:
        scores: layer -> (I,).
        share: part of all neurons.
    """
    places = [(layer, neuron) for layer, found in scores.items() for neuron in range(len(found))]
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    chosen: dict[int, list[int]] = {}
    for place in order[: max(1, round(share * len(places)))].tolist():
        layer, neuron = places[place]
        chosen.setdefault(layer, []).append(neuron)
    return {layer: sorted(neurons) for layer, neurons in sorted(chosen.items())}


def _scores(patient: Patient, layers: range, options: Options) -> dict[int, Tensor]:
    own = {layer: _columns(_reader(patient.model, layer)).float() for layer in layers}  # (D, I)
    if options.by == "weights":
        before = {layer: _columns(_reader(cast(nn.Module, patient.original), layer)).float() for layer in layers}
        return {layer: (own[layer] - before[layer]).norm(dim=0) / before[layer].norm(dim=0) for layer in layers}
    samples = patient.forget[: options.samples]
    pairs = (_original_and_own if options.by == "original" else _alone_and_behind)(patient, samples, layers)
    gaps = {layer: (pairs[1][layer] - pairs[0][layer]).abs().mean(dim=0) for layer in layers}
    return {layer: gaps[layer] * own[layer].norm(dim=0) for layer in layers}


Activations = dict[int, Tensor]
"""Layer -> (N, I) of N tokens."""


def _original_and_own(patient: Patient, samples: Sequence[Sample], layers: range) -> tuple[Activations, Activations]:
    original = cast(nn.Module, patient.original)
    return _neurons(original, samples, layers, patient.pad), _neurons(patient.model, samples, layers, patient.pad)


def _alone_and_behind(patient: Patient, samples: Sequence[Sample], layers: range) -> tuple[Activations, Activations]:
    """Of the tokens behind BOS; all samples stand behind texts of the same length."""
    plain = patient.plain_ids
    chance = random.Random(f"mitigate/{patient.seed}/prune")
    texts = [chance.choices(plain, k=_TEXT) for _ in samples]
    behind = [  # right behind BOS, in a chat too: all tokens are compared, those of its header among them
        with_text(one, text, "prefix", range(1, len(one.ids)), "text") for one, text in zip(samples, texts, strict=True)
    ]
    return (
        _neurons(patient.model, samples, layers, patient.pad, 1),
        _neurons(patient.model, behind, layers, patient.pad, 1 + _TEXT),
    )


@torch.no_grad()
def _neurons(model: nn.Module, samples: Sequence[Sample], layers: range, pad: int, start: int = 0) -> Activations:
    """Activations of all tokens from `start` on, sample by sample."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for first in range(0, len(samples), _BATCH):
        some = samples[first : first + _BATCH]
        batch = collate(some, pad, models.bare(model).device)
        with capture(model, neurons=layers) as seen:
            models.decoder(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for row, one in enumerate(some):
            for layer in layers:
                found[layer].append(seen.neurons[layer][row, start : len(one.ids)].float())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _reader(model: nn.Module, layer: int) -> Any:
    return models.neurons(models.decoder_layers(model)[layer], models.bare(model).config)


def _columns(projection: Any) -> Tensor:
    """Weights (D, I) of a projection, a column for each neuron; a view."""
    weight: Tensor = projection.weight
    return weight.T if isinstance(projection, Conv1D) else weight
