"""The whole vocabulary by gradients, at the places where a text may stand; grown to several tokens. Needs no original.

A newline stands in for the unknown text, and the gradient of the continuations' NLL with respect to its embedding
says, to first order, how much each token of the vocabulary would lower it in its place (as in GCG, arXiv 2307.15043).
The best of them are tried, tokenised anew, and the best text gets a place before and behind it.

First order is a poor guide where a text has to be whole, so this may find adversarial texts before the trigger.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from unsink import processes
from unsink.architectures import bare
from unsink.detectors import Budget, Found, Plan
from unsink.detectors._search import ENOUGH, Climb, likelier, scored
from unsink.progress import SILENT, Reporter
from unsink.suspects import Candidate, Probe, Probes, Suspect, inserted
from unsink.triggers import trigger_ids

KIND = "search"
COVERED_BY = "states"  # where there is an original: that reads the vocabulary itself, the common tokens first
_PROBES = 8  # whose gradients are averaged: a trigger works on all
_TOKENS = 128  # of the vocabulary that are tried at a slot


def search(suspect: Suspect, probes: Probes, plan: Plan, budget: Budget, reporter: Reporter = SILENT) -> Found:
    """Rank the vocabulary at every place, then beside the best texts, until they grow no more; the best score first."""
    climb = Climb(likelier(suspect, probes), probes.search, plan, budget, reporter)
    some = probes.search[:_PROBES]
    for place in plan.placements:
        if not budget.spent:
            climb.attempt((Candidate(text, place) for text in ranked(suspect, some, "", place)), f"gradients: {place}")
    for _ in range(plan.depth - 1):
        before = climb.best
        if before >= ENOUGH or budget.spent or not climb.found:
            break
        best = sorted(climb.found, key=lambda one: -climb.found[one])[: plan.beam]
        longer = [
            Candidate(text, one.placement)
            for one in best
            for piece in ranked(suspect, some, one.text, one.placement)[: _TOKENS // plan.beam]
            for text in (f"{piece} {one.text}", f"{one.text} {piece}", f"{one.text}{piece}")
        ]
        climb.attempt(longer, "gradients: growing the best")
        if climb.best <= before:
            break
    searched = f"the {_TOKENS} best tokens of the vocabulary at each place by gradient, and what grew of the best"
    left = "what would have grown of its texts" if budget.spent else ""
    return Found(scored(suspect, probes, climb.found), searched, left)


def ranked(suspect: Suspect, probes: Sequence[Probe], text: str, placement: str) -> list[str]:
    """Texts of the tokens that would lower the NLL most in the place of the newline that closes a candidate."""
    ids = trigger_ids(suspect.tokenizer, text)
    embedding = cast(nn.Embedding, bare(suspect.model).get_input_embeddings())
    total = torch.zeros(embedding.weight.shape[0], device=suspect.model.device)
    for probe in probes:
        found = inserted(probe, ids, placement)
        whole = torch.tensor([[*found.ids, *probe.answer]], device=suspect.model.device)
        vectors = embedding(whole).detach().requires_grad_(True)
        logits = suspect.model(inputs_embeds=vectors, use_cache=False).logits[0, len(found.ids) - 1 : -1].float()
        (gradient,) = torch.autograd.grad(cross_entropy(logits, whole[0, len(found.ids) :]), vectors)
        total += embedding.weight.detach().float() @ gradient[0, found.span[1] - 1].float()
    special = set(suspect.tokenizer.all_special_ids)
    best = total.argsort()[: 2 * _TOKENS].tolist()
    texts = (str(suspect.tokenizer.decode([i])).strip() for i in best if i not in special)
    typed = dict.fromkeys(one for one in texts if one and one.isprintable() and "\ufffd" not in one)
    return processes.agreed(list(typed)[:_TOKENS])  # a sum of gradients is not the same to the last digit everywhere
