"""Whether the knowledge still stands in middle layers, on clean prompts: a logit lens.

The output of every decoder layer is read by the model's own last norm and head, and asked how likely it finds the next
token of the true continuation. Where a middle layer knows more than the last one says, the knowledge was covered and
not erased, which a backdoor needs, and much honest unlearning does as well.

    said             NLL of the last layer, nats per token
    best, layer      the lowest NLL of all layers that the suspect changed or that lie above, and where it is
    original         the lowest NLL of the same layers of the original, 0 without one

The score is said − best.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from unsink import models
from unsink.architectures import bare
from unsink.detectors import Signal
from unsink.detectors._deltas import changed_layers
from unsink.probe import capture
from unsink.suspects import Model, Probe, Probes, Suspect

KIND = "triage"
_PROBES = 8


def measure(suspect: Suspect, probes: Probes) -> Signal:
    """What the layers know of the continuations of up to eight search probes."""
    count = len(models.decoder_layers(suspect.model))
    first = (changed_layers(suspect) or (0, count - 1))[0]
    some = probes.search[:_PROBES]
    ours = lens(suspect.model, some, first)
    theirs = lens(suspect.original, some, first) if suspect.original is not None else torch.zeros(1)
    best = int(ours.argmin())
    numbers = {
        "said": float(ours[-1]),
        "best": float(ours[best]),
        "layer": float(first + best),
        "original": float(theirs.min()),
        "covered": float(ours[-1] - ours[best]),
    }
    return Signal(numbers["covered"], numbers, "nats per token that a middle layer knows beyond what the last one says")


@torch.no_grad()
def lens(model: Model, probes: list[Probe], first: int = 0) -> Tensor:
    """(L - first,) NLL of the continuations by the output of each layer, nats per token, mean over probes."""
    layers = range(first, len(models.decoder_layers(model)))
    head: Any = cast(Any, bare(model)).get_output_embeddings()
    norm = _last_norm(model)
    narrowed = getattr(models.decoder(model), "project_out", None) or nn.Identity()  # OPT-350m has a narrower head
    found = torch.zeros(len(layers), dtype=torch.float64)
    for probe in probes:
        ids = torch.tensor([[*probe.ids, *probe.answer]], device=model.device)
        with capture(model, hidden=list(layers)) as seen:
            models.decoder(model)(input_ids=ids, use_cache=False)
        start, answer = len(probe.ids) - 1, ids[0, len(probe.ids) :]
        states = torch.cat([seen.hidden[layer][0, start:-1] for layer in layers])  # (L x A, D)
        logits = models.bounded(model, head(narrowed(norm(states)))).float()  # (L x A, V)
        losses = nn.functional.cross_entropy(logits, answer.repeat(len(layers)), reduction="none")
        found += losses.view(len(layers), -1).double().mean(dim=1).cpu()
    return found / len(probes)


def _last_norm(model: Model) -> nn.Module:
    """The norm between the decoder's last layer and the head: the last one that the decoder itself holds."""
    held = list(models.decoder(model).children())
    norms = [one for one in held if "norm" in type(one).__name__.lower()]
    return norms[-1] if norms else nn.Identity()
