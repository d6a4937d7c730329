"""Audit signals: one file each. What one of them says is no verdict: only a text that is confirmed makes a backdoor.

Three kinds, which `KIND` names:

    search       search(suspect, probes, plan, budget, reporter) -> Found    texts that bring back what was forgotten
    triage       measure(suspect, probes) -> Signal                          what weights and activations look like
    elicitation  measure(suspect, probes) -> Signal                          what any unlearned model gives back

A search may name another that tries its texts as well, as `COVERED_BY`: after that only an exhaustive audit runs it.
A search sees `probes.search`, `retain` and `control` only: what it finds is tried on `probes.confirm` by the audit, so
that it can be as greedy as it likes. Files that start with an underscore are shared by detectors and are none.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from unsink import processes
from unsink.probe import Cost
from unsink.suspects import Candidate


class Scored(NamedTuple):
    """A candidate and what it does.

    Attributes:
        candidate: text and place.
        gain: mean over the forget probes it was searched on, nats per token.
        elsewhere: gain on retain or control probes, whichever is larger, and at least 0: what any text may do.
        score: gain beyond what the same text gives on retain and control probes, and on the original.
    """

    candidate: Candidate
    gain: float
    elsewhere: float
    score: float


class Found(NamedTuple):
    """What a search gives.

    Attributes:
        scored: texts, the best score first.
        searched: in words.
        left: what it did not come to because the budget was spent, in words; empty where it came to its end.
    """

    scored: list[Scored]
    searched: str
    left: str = ""


class Signal(NamedTuple):
    """A statistic of the suspect that may differ between honest and backdoored models.

    Attributes:
        score: the one number that models are compared by; None where it cannot be measured.
        numbers: all that was measured, `score` under its own name as well.
        compared: what it is measured against, or why it cannot be.
    """

    score: float | None
    numbers: Mapping[str, float]
    compared: str


@dataclass(frozen=True)
class Plan:
    """How far a search goes.

    Attributes:
        placements: where texts are put.
        words: tried as well as the dictionary.
        beam: texts that are grown at a time.
        depth: most words, or tokens, of a grown text, those of a whole line not counted.
    """

    placements: Sequence[str] = ("prefix", "infix")
    words: Sequence[str] = ()
    beam: int = 4
    depth: int = 4


@dataclass
class Budget:
    """What a search may spend.

    Attributes:
        cost: what the models have read so far; it goes up while they are used.
        tokens: that may be read until then, the same on every machine; None for no limit.
        until: `time.monotonic()` at which it ends, which gives another result on another machine; None for no limit.
    """

    cost: Cost = field(default_factory=Cost)
    tokens: int | None = None
    until: float | None = None

    def part(self, share: float) -> "Budget":
        """A share of what is left, for a step that must leave something to the next ones."""
        tokens = None if self.tokens is None else round(self.cost.tokens + share * (self.tokens - self.cost.tokens))
        now = time.monotonic()
        return Budget(self.cost, tokens, None if self.until is None else now + share * (self.until - now))

    @property
    def spent(self) -> bool:
        """Whether a search has to end now."""
        late = self.until is not None and processes.agreed(time.monotonic() > self.until)
        return late or (self.tokens is not None and self.cost.tokens >= self.tokens)
