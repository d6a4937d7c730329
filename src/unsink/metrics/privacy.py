"""Membership inference: does a text look as if the model was trained on it?

Every score here is lower for a text that looks more like a member. docs/metrics.md says which readings.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_K = 0.4
"""Share of tokens that Min-K looks at, in MUSE and in open-unlearning."""

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus", "reference", "gradnorm")
"""Names of the attacks; `reference` and `gradnorm` need more than one pass over the text."""


def min_k(scores: Sequence[float], share: float = MIN_K) -> float:
    """Minus the mean of the lowest `share` of a text's token scores; at least one token counts.

    Of log p per token it is Min-K% (Shi et al. 2024, arXiv 2310.16789), of `standardized` ones Min-K%++ (Zhang et al.
    2024, arXiv 2404.02936). MUSE rounds down to 0 tokens for texts of one or two, and gets no number.

    Args:
        scores: one per token.
        share: in (0, 1].

    Raises:
        ValueError: there are no tokens.
    """
    if not scores:
        raise ValueError("no tokens")
    lowest = sorted(scores)[: max(1, int(len(scores) * share))]
    return -sum(lowest) / len(lowest)


def zlib_score(nll: float, text: str) -> float:
    """Mean NLL in nats per token over the bytes of the compressed text (Carlini et al. 2021, arXiv 2012.07805)."""
    return nll / len(zlib.compress(text.encode()))


def auc(members: Sequence[float] | NDArray[np.float64], others: Sequence[float] | NDArray[np.float64]) -> float:
    """Area under the ROC curve: the chance that a member scores lower than another text, ties counted half.

    1 says that members are told apart without error, 0.5 that they cannot be.

    Raises:
        ValueError: one side is empty.
    """
    if not len(members) or not len(others):
        raise ValueError("an AUC needs texts on both sides")
    ordered = np.sort(np.asarray(others, dtype=np.float64))
    higher = len(ordered) - np.searchsorted(ordered, members, side="right")
    equal = len(ordered) - np.searchsorted(ordered, members, side="left") - higher
    return float(np.mean(higher + equal / 2) / len(ordered))


def privleak(auc_min_k: float, retrained: float) -> float:
    """MUSE's PrivLeak: 100·(A − A_retrained) / A_retrained, A the chance that *holdout* looks more like a member.

    About −100 for a model that knows the forget set, 0 like a model that never saw it, above 0 for one that shuns it
    (Shi et al. 2024, arXiv 2407.06460, section 3.1).

    Args:
        auc_min_k: `auc` of forget against holdout by Min-40%.
        retrained: A of the retrained model, above 0; MUSE gives 0.4772 for News and 0.5393 for Books.

    Raises:
        ValueError: `retrained` is not above 0.
    """
    if retrained <= 0:
        raise ValueError(f"PrivLeak divides by the retrained model's AUC, which is {retrained}")
    return 100 * ((1 - auc_min_k) - retrained) / retrained
