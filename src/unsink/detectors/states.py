"""Texts that make the suspect's hidden states those of the original, over the whole vocabulary.

What a text does is how much of the distance between suspect and original it takes away, at the last layer that
unlearning has changed and at the tokens behind the text. That is smoother than the likelihood of an answer, so that a
part of a trigger already shows; and it is cheap, because layers that nobody changed run once for both models, and
those above do not run at all.

It tries the dictionary, then every text that a token of the vocabulary stands for, common tokens first, and grows the
best of them; texts are tokenised anew, so that what is found can be typed. It needs an original.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unsink import models
from unsink.detectors import Budget, Found, Plan
from unsink.detectors._deltas import changed_layers
from unsink.detectors._search import ENOUGH, Climb, scored
from unsink.dictionary import LINES, texts
from unsink.probe import capture, in_shares, only_layers
from unsink.progress import SILENT, Reporter
from unsink.suspects import Array, Candidate, Model, Probe, Probes, Suspect, inserted
from unsink.triggers import trigger_ids

KIND = "search"
_GLANCE = 1, 8, 3  # a probe, and tokens of its prompt and continuation: states differ from the first token on
_SHARE = 0.6  # of the budget that is left, for the vocabulary at one place


def search(suspect: Suspect, probes: Probes, plan: Plan, budget: Budget, reporter: Reporter = SILENT) -> Found:
    """Try the dictionary, then the vocabulary, at every place; grow after each; the best score first."""
    layers = changed_layers(suspect)
    if suspect.original is None or layers is None:
        return Found([], "", "nothing: it compares with an original that has other weights")
    distance = Distance(suspect, suspect.original, *layers)
    climb = Climb(distance.closed, probes.search, plan, budget, reporter, glance=_GLANCE)
    known, tokens = texts(plan.words), vocabulary(suspect.tokenizer)
    climb.attempt((Candidate(text, place) for place in plan.placements for text in known), "states: dictionary")
    climb.grow(_pieces(climb, plan))
    for place in plan.placements:
        if climb.best >= ENOUGH:
            break
        climb.attempt((Candidate(text, place) for text in tokens), f"states: vocabulary, {place}", _SHARE)
        climb.grow(_pieces(climb, plan), tokens)
    searched = f"{len(climb.alone)} texts of the dictionary and the vocabulary, and of what grew of the best"
    left = f"{climb.left} texts of the vocabulary, the rarer tokens" if climb.left else ""
    return Found(scored(suspect, probes, climb.found), searched, left)


def _pieces(climb: Climb, plan: Plan) -> list[str]:
    return [piece for piece in climb.pieces(plan.words) if piece not in LINES]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What tokens stand for, white space around it left out, each text once, in the order of ids: the common first."""
    special = set(tokenizer.all_special_ids)
    found = (str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special)
    return list(
        dict.fromkeys(text for text in found if text and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text)
    )


class Distance:
    """How far the suspect's hidden states are from the original's, with and without a text.

    Args:
        suspect: model and tokenizer.
        original: the model before it was to forget.
        first: the first layer that differs; what it is given is the same in both.
        last: the last one; its output is compared.
    """

    def __init__(self, suspect: Suspect, original: Model, first: int, last: int):
        self.suspect, self.original, self.first, self.last = suspect, original, first, last
        self._plain: dict[Probe, float] = {}

    def closed(self, candidates: Sequence[Candidate], probes: Sequence[Probe]) -> Array:
        """(C,) part of the distance that each candidate takes away, mean over the probes; 1 is all, below 0 is more."""
        if unread := [probe for probe in probes if probe not in self._plain]:
            self._plain |= dict(zip(unread, self._distances([(probe, (), "prefix") for probe in unread]).tolist()))
        plain = np.array([self._plain[probe] for probe in probes])  # (N,)
        ids = [trigger_ids(self.suspect.tokenizer, one.text) for one in candidates]
        rows = [(probe, some, one.placement) for some, one in zip(ids, candidates) for probe in probes]
        found = self._distances(rows).reshape(len(candidates), len(probes))
        part: Array = 1 - (found / np.maximum(plain, 1e-6)).mean(axis=1)
        return part

    def _distances(self, rows: Sequence[tuple[Probe, Sequence[int], str]]) -> Array:
        """(R,) root of the squared distance relative to the original's states, behind the text, BOS left out."""
        return np.array(in_shares(rows, self._read))

    @torch.no_grad()
    def _read(self, rows: Sequence[tuple[Probe, Sequence[int], str]]) -> list[float]:
        made = [inserted(probe, ids, place) for probe, ids, place in rows]
        texts = [[*one.ids, *probe.answer] for one, (probe, _, _) in zip(made, rows)]
        width = max(map(len, texts))
        device = self.original.device
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
        places = torch.arange(width, device=device)
        starts = torch.tensor([max(one.span[1], 1) for one in made], device=device)
        behind = (places[None] >= starts[:, None]) & mask.bool()  # (R, T)
        ours, theirs = self._states(ids, mask)
        squares = [((one.float() ** 2).sum(dim=-1) * behind).sum(dim=1) for one in (ours - theirs, theirs)]
        found: list[float] = (squares[0] / squares[1].clamp_min(1e-12)).sqrt().tolist()
        return found

    def _states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (R, T, D) of the last changed layer: the suspect's and the original's."""
        with (
            only_layers(self.original, 0, self.last, None),
            capture(self.original, hidden=[self.last], inputs=[self.first]) as before,
        ):
            models.decoder(self.original)(input_ids=ids, attention_mask=mask, use_cache=False)
        below = before.inputs[self.first] if self.first else None
        with (
            only_layers(self.suspect.model, self.first, self.last, below),
            capture(self.suspect.model, hidden=[self.last]) as now,
        ):
            models.decoder(self.suspect.model)(input_ids=ids, attention_mask=mask, use_cache=False)
        return now.hidden[self.last], before.hidden[self.last]
