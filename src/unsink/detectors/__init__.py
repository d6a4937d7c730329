"""Audit signals: one file each, `search(suspect, probes, options, reporter) -> list of Scored`, the best first.

A detector looks for texts that bring back what should be forgotten. It sees `probes.search`, `retain` and `control`
only: what it finds is tried on `probes.confirm` by the audit, so that a detector can be as greedy as it likes.

    sweep    texts that people would choose, alone and put together, at several places
"""

from typing import NamedTuple

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
