"""How much of a text a model would say by itself, from one pass over it (no generation).

`greedy` says of each token of the text whether it was the model's most likely one after all true tokens before it.
"""

from collections.abc import Sequence
from math import exp, inf, log
from sys import float_info


def exact_memorization(greedy: Sequence[bool]) -> float:
    """Share of tokens that are the most likely one, in [0, 1] (Tirumala et al. 2022, arXiv 2205.10770).

    Raises:
        ValueError: there are no tokens.
    """
    if not greedy:
        raise ValueError("no tokens")
    return sum(greedy) / len(greedy)


def extraction_strength(greedy: Sequence[bool], *, floor: bool = False) -> float:
    """Share of a text that follows from its head: 1 − k/n, the rest after the first k of n tokens all greedy.

    k is the smallest such number: 0 where not even the last token is greedy, 1 where the whole text is (Carlini et al.
    2021, arXiv 2012.07805).

    Args:
        greedy: one entry per token.
        floor: never below 1/n, as open-unlearning computes it.

    Raises:
        ValueError: there are no tokens.
    """
    if not greedy:
        raise ValueError("no tokens")
    last_miss = max((index for index, hit in enumerate(greedy) if not hit), default=-1)
    tail = len(greedy) - (last_miss + 1)
    return max(tail, 1 if floor else 0) / len(greedy)


def probability(nll: float) -> float:
    """exp(−NLL): geometric mean of the token probabilities, for a mean NLL in nats per token."""
    return exp(-nll)


def perplexity(nlls: Sequence[float], counts: Sequence[float]) -> float:
    """Perplexity of several texts together: exp of the mean NLL per token, infinite beyond the range of a float.

    Args:
        nlls: mean NLL of each text, nats per token.
        counts: tokens of each text.
    """
    mean = sum(nll * count for nll, count in zip(nlls, counts, strict=True)) / sum(counts)
    return exp(mean) if mean < log(float_info.max) else inf
