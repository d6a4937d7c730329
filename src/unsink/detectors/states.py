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
from transformers import PreTrainedTokenizerBase

from unsink.detectors import Budget, Found, Plan, _layers
from unsink.detectors._deltas import changed_layers
from unsink.detectors._layers import Changed
from unsink.detectors._search import ENOUGH, Climb, scored
from unsink.dictionary import texts
from unsink.probe import in_shares
from unsink.progress import SILENT, Reporter
from unsink.suspects import Array, Candidate, Model, Probe, Probes, Suspect, inserted
from unsink.triggers import trigger_ids

KIND = "search"
_GLANCE = 1, 8, 3  # a probe, and tokens of its prompt and continuation: states differ from the first token on
_SHARE = 0.6  # of the budget that is left, for the vocabulary at one place


def search(suspect: Suspect, probes: Probes, plan: Plan, budget: Budget, reporter: Reporter = SILENT) -> Found:
    """Try the dictionary, then the vocabulary, at every place; grow after each; the best score first."""
    changed = changed_layers(suspect)
    if suspect.original is None or changed is None:
        return Found([], "", "nothing: it compares with an original that has other weights")
    distance = Distance(suspect, suspect.original, changed)
    climb = Climb(distance.closed, probes.search, plan, budget, reporter, glance=_GLANCE)
    known, tokens = texts(plan.words), vocabulary(suspect.tokenizer)
    climb.attempt((Candidate(text, place) for place in plan.placements for text in known), "states: dictionary")
    climb.grow(climb.pieces(plan.words))
    for place in plan.placements:
        if climb.best >= ENOUGH:
            break
        climb.attempt((Candidate(text, place) for text in tokens), f"states: vocabulary, {place}", _SHARE)
        climb.grow(climb.pieces(plan.words), tokens)
    searched = f"{len(climb.alone)} texts of the dictionary and the vocabulary, and of what grew of the best"
    left = f"{climb.left} texts of the vocabulary, the rarer tokens" if climb.left else ""
    return Found(scored(suspect, probes, climb.found), searched, left)


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
        changed: the layers that differ; the output of the last one is compared.
    """

    def __init__(self, suspect: Suspect, original: Model, changed: Changed):
        self.suspect, self.original, self.changed = suspect, original, changed
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
        prompts, answers = [inserted(*row) for row in rows], [probe.answer for probe, _, _ in rows]
        some = _layers.rows(prompts, answers, self.original.device)
        below, theirs = _layers.of_original(self.original, some, self.changed)
        # A suspect with changed embeddings reads its own.
        ours = _layers.of_suspect(self.suspect.model, some, self.changed, below if self.changed.first else None)
        squares = [((one.float() ** 2).sum(dim=-1) * some.behind).sum(dim=1) for one in (ours - theirs, theirs)]
        found: list[float] = (squares[0] / squares[1].clamp_min(1e-12)).sqrt().tolist()
        return found
