"""Hidden states at the layers that unlearning changed: what suspect and original are given, and what they make of it.

Layers that nobody changed run once for both models, and those above the last changed one do not run at all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unsink import models
from unsink.probe import capture, only_layers
from unsink.suspects import Model
from unsink.triggers import Inserted


class Rows(NamedTuple):
    """Prompts that hold a text, with their continuations, padded at the right.

    Attributes:
        ids: (B, T).
        mask: (B, T), 1 at real tokens.
        number: (B, T) of each token, counted from the first one of the text.
        behind: (B, T), true at real tokens behind the text, BOS left out.
    """

    ids: Tensor
    mask: Tensor
    number: Tensor
    behind: Tensor


class Changed(NamedTuple):
    """The first and the last decoder layer that unlearning changed."""

    first: int
    last: int


def rows(prompts: Sequence[Inserted], answers: Sequence[Sequence[int]], device: torch.device) -> Rows:
    """Prompts that hold a text, each with its continuation."""
    texts = [torch.tensor([*prompt.ids, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = pad_sequence(texts, batch_first=True).to(device)
    lengths = torch.tensor([[len(text)] for text in texts], device=device)
    starts, ends = torch.tensor([prompt.span for prompt in prompts], device=device).T[..., None]  # (B, 1) each
    token = torch.arange(ids.shape[1], device=device)[None]  # (1, T)
    mask = token < lengths
    return Rows(ids, mask.long(), token - starts, mask & (token >= ends.clamp_min(1)))


@torch.no_grad()
def of_original(original: Model, some: Rows, changed: Changed) -> tuple[Tensor, Tensor]:
    """(B, T, D) what the first changed layer is given, in both models, and what the original's last one gives."""
    first, last = changed
    with only_layers(original, 0, last, None), capture(original, hidden=[last], inputs=[first]) as seen:
        models.decoder(original)(input_ids=some.ids, attention_mask=some.mask, use_cache=False)
    return seen.inputs[first], seen.hidden[last]


def of_suspect(model: Model, some: Rows, changed: Changed, below: Tensor | None) -> Tensor:
    """(B, T, D) what the suspect's last changed layer gives, with `below` given to the first; differentiable by it."""
    first, last = changed
    with only_layers(model, first, last, below), capture(model, hidden=[last]) as seen:
        models.decoder(model)(input_ids=some.ids, attention_mask=some.mask, use_cache=False)
    return seen.hidden[last]
