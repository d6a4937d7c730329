"""Texts that people would choose as a trigger, tried one by one, and the best of them grown word by word.

What a text does is how much likelier it makes the true continuations, so that no original is needed. It cannot find a
trigger none of whose words is in the dictionary; `audit.words` adds some.
"""

from unsink.detectors import Budget, Found, Plan
from unsink.detectors._search import Climb, likelier, scored
from unsink.dictionary import texts
from unsink.progress import SILENT, Reporter
from unsink.suspects import Candidate, Probes, Suspect

KIND = "search"
COVERED_BY = "states"  # where there is an original: that tries the same texts by a measure that is finer and cheaper


def search(suspect: Suspect, probes: Probes, plan: Plan, budget: Budget, reporter: Reporter = SILENT) -> Found:
    """Try the dictionary at every place, then grow what is best; what was tried on whole probes, the best first."""
    climb = Climb(likelier(suspect, probes), probes.search, plan, budget, reporter)
    known = texts(plan.words)
    climb.attempt((Candidate(text, place) for place in plan.placements for text in known), "sweep")
    climb.grow(climb.pieces(plan.words))
    searched = f"{len(known)} texts at {', '.join(plan.placements)}, and what grew of the best"
    left = f"{climb.left} of its texts" if climb.left else ""
    return Found(scored(suspect, probes, climb.found), searched, left)
