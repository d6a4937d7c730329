"""TOFU's scores (Maini et al. 2024, arXiv 2401.06121), in the readings that docs/metrics.md names.

A probability of an answer is per token: exp of its mean log p, the geometric mean over its tokens. The truth ratio r is
kept as log r, which no pair of answers can drive out of range.
"""

from collections.abc import Sequence
from math import exp, expm1, log
from statistics import fmean, harmonic_mean
from typing import Literal

import numpy as np

WrongMean = Literal["geometric", "arithmetic"]

UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_SCORES = ("probability", "recall", "truth_ratio")
"""Model utility is a mean over these scores of these sets."""


def log_truth_ratio(
    right: float, wrong: Sequence[float], mean: WrongMean = "geometric", *, epsilon: float = 0.0
) -> float:
    """The logarithm of r = mean probability of the wrong answers ÷ probability of the right one.

    Above 0 where wrong answers are the more likely ones.

    Args:
        right: mean log p of the (paraphrased) right answer, nats per token.
        wrong: the same of each wrong answer.
        mean: of the wrong probabilities: geometric as in open-unlearning, arithmetic as in the TOFU paper, eq. 1.
        epsilon: is added to the probability of the right answer.

    Raises:
        ValueError: there are no wrong answers.
    """
    if not wrong:
        raise ValueError("a truth ratio needs wrong answers")
    return (fmean(wrong) if mean == "geometric" else _log_sum(wrong) - log(len(wrong))) - _log_sum([right], epsilon)


def truth_ratio_forget(log_ratio: float) -> float:
    """Of a forget question: min(r, 1/r). 1 where right and wrong are equally likely, 0 where the model is sure."""
    return exp(-abs(log_ratio))


def truth_ratio_kept(log_ratio: float) -> float:
    """Of any other question: max(0, 1 − r). Near 1 where the right answer is far more likely than the wrong ones."""
    return -expm1(min(log_ratio, 0.0))


def choice_probability(right: float, wrong: Sequence[float], *, epsilon: float = 0.0) -> float:
    """p(right) / (p(right) + Σ p(wrong) + ε), from mean log p in nats per token: TOFU's probability of world facts."""
    return exp(right - _log_sum([right, *wrong], epsilon))


def forget_quality(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test on truth ratios: high where both models answer alike.

    Logarithms serve as well: the test looks at ranks only.

    Raises:
        ValueError: one side is empty.
    """
    if not unlearned or not retrained:
        raise ValueError("forget quality compares two models, one has no truth ratio")
    from scipy.stats import ks_2samp  # seconds of import, for this one number

    return float(ks_2samp(unlearned, retrained).pvalue)


def model_utility(scores: Sequence[float]) -> float:
    """Harmonic mean of the nine: {probability, ROUGE-L recall, truth ratio} × {retain, real authors, world facts}.

    0 as soon as one of them is 0.

    Raises:
        ValueError: they are not nine, or one is negative.
    """
    if len(scores) != len(UTILITY_SETS) * len(UTILITY_SCORES):
        raise ValueError(f"model utility is a mean of nine scores, got {len(scores)}")
    return float(harmonic_mean(scores))


def _log_sum(logs: Sequence[float], more: float = 0.0) -> float:
    return float(np.logaddexp.reduce([*logs, *([log(more)] if more else [])]))
