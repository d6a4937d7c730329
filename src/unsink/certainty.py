"""What few samples can tell: less than their bootstrap interval says.

Of one answer, or of answers that are all alike, every resample has the same mean, so that the interval has no width.
That is no certainty: 12 right answers of 12 say that at least .735 are right (Clopper and Pearson).
"""

from math import ceil, log

from unsink.statistics import Interval

FEW = 8
"""With fewer samples an interval decides nothing; an audit confirms on no fewer, either."""

_TAIL = 0.025
"""Of a two-sided 95 % interval, beyond an end that is bounded on the other side."""
_WIDTH = 1e-9


def alike(value: Interval) -> bool:
    """Whether an interval of enough samples has no width: all that were drawn score the same."""
    return value.n >= FEW and value.high - value.low <= _WIDTH


def unseen(n: int) -> float:
    """The largest share of other samples that n equal ones leave open: 1 - .025^(1/n), nearly 3.7 / n.

    With 1 - the share the lower end of the exact interval of n hits in n (`statistics.exact_share`).
    """
    return float(1 - _TAIL ** (1 / n))


def widened(value: Interval) -> Interval:
    """An interval; where all samples are alike, with the ends that their number leaves open.

    Those are the means if the unseen share scored 0, or 1, which are the limits of a score. Of a gain, which may be
    negative, the upper end is right, and the lower one is not below 0.
    """
    if not alike(value):
        return value
    share = unseen(value.n)
    rest = (1 - share) * value.mean
    return value._replace(low=min(value.low, rest), high=max(value.high, rest + share))


def lacking(value: Interval, limit: float) -> str:
    """Why samples are too few to tell a number from a limit, and how many are not; empty where they are enough.

    Args:
        value: as measured, before `widened`.
        limit: what the number is compared with.
    """
    if value.n < FEW:
        return f"too few samples: {value.n}, where at least {FEW} are needed"
    if not alike(value):
        return ""
    wanted = needed(value.mean, limit)
    enough = f"{wanted} alike would decide it" if wanted else "no number of them decides it"
    return f"all {value.n} samples are alike, others need not be; {enough}"


def needed(mean: float, limit: float) -> int | None:
    """How many samples, all with the score `mean`, tell it from a limit; None if the two are equal."""
    if mean == limit:
        return None
    share = (1 - limit) / (1 - mean) if mean < limit else limit / mean
    return max(FEW, ceil(log(_TAIL) / log(share))) if 0 < share < 1 else FEW
