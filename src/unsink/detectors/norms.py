"""How value norms at the first tokens differ from the original's, on clean prompts: no trigger is needed.

A trigger at an attention sink has to change what is read there, and a term may have held its value norms in place
(arXiv 2510.17021). For each layer that unlearning changed, the mean norm of the value vectors at tokens 0 to 7 is
compared with the original's: log ratios, 0 where nothing moved.

    bos              mean over the layers at token 0
    first            mean over the layers at tokens 1 to 7
    behind           mean over the layers at the tokens behind
    largest          largest absolute one of all layers and tokens 0 to 7

The score is how much further the first tokens moved than those behind: |mean of tokens 0 to 7| − |behind|.
"""

import torch
from torch import Tensor

from unsink import models
from unsink.detectors import Signal
from unsink.detectors._deltas import changed_layers
from unsink.probe import capture, value_norms
from unsink.suspects import Model, Probes, Suspect

KIND = "triage"
_FIRST = 8
_TOKENS = 24


def measure(suspect: Suspect, probes: Probes) -> Signal:
    """Log ratios of value norms to the original's, on the forget probes that are searched on."""
    layers = changed_layers(suspect)
    if suspect.original is None or layers is None:
        return Signal(None, {}, "no original, or one with the same weights")
    texts = [(*one.ids, *one.answer)[:_TOKENS] for one in probes.search]
    width = min(map(len, texts))
    ids = torch.tensor([list(text[:width]) for text in texts], device=suspect.model.device)
    wanted = list(range(layers[0], layers[1] + 1))
    ratios = torch.log(_norms(suspect.model, ids, wanted) / _norms(suspect.original, ids, wanted))  # (L, T)
    first, behind = ratios[:, :_FIRST], ratios[:, _FIRST:]
    rest = float(behind.mean()) if behind.numel() else 0.0
    score = abs(float(first.mean())) - abs(rest)
    numbers = {
        "bos": float(first[:, 0].mean()),
        "first": float(first[:, 1:].mean()),
        "behind": rest,
        "largest": float(first.abs().max()),
        "further": score,
    }
    return Signal(score, numbers, "log ratio of value norms at the first eight tokens to the original's, less behind")


@torch.no_grad()
def _norms(model: Model, ids: Tensor, layers: list[int]) -> Tensor:
    """(L, T) mean norm over the prompts."""
    with capture(model, values=layers) as seen:
        models.decoder(model)(input_ids=ids, use_cache=False)
    return torch.stack([value_norms(seen.values[layer])[..., 0].mean(dim=0) for layer in layers]).clamp_min(1e-12)
