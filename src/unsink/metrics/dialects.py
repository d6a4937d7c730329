"""Dialects: the conventions behind a score. Two numbers in different dialects are not comparable.

`muse` is the MUSE benchmark (swj0419/muse_bench), `open-unlearning` is locuslab/open-unlearning, `seed` is the release
of the paper that this project starts from. docs/metrics.md lists what each setting can move.
"""

from dataclasses import dataclass

from unsink.metrics.tofu import WrongMean


@dataclass(frozen=True)
class Dialect:
    """One set of conventions.

    Attributes:
        stemmer: ROUGE-L compares stems.
        strip: white space around an output is dropped before it is stored and compared.
        knowmem_tokens: new tokens per answer.
        verbmem_tokens: new tokens per continuation.
        verbmem_compared: most tokens of the true continuation. MUSE counts BOS as one of its 128.
        last_token: the last token of a passage counts in Min-K, gradient norm, extraction strength and exact
            memorisation. open-unlearning drops it, meaning to skip EOS; of an answer it is EOS, which nobody has here.
            The only token of a text counts anyway.
        strength_floor: extraction strength is never below 1/n.
        auc_of_members: an AUC is the chance that *forget* looks more like a member (1: memorised); else that holdout
            does (0: memorised).
        wrong_mean: how the truth ratio averages the probabilities of wrong answers.
        epsilon: is added to the probability that a truth ratio or a share of given answers divides by.
        letters_header: a letter question is introduced by its topic, and has no blank line before `Answer:`.
    """

    stemmer: bool
    strip: bool
    knowmem_tokens: int
    verbmem_tokens: int
    verbmem_compared: int
    last_token: bool
    strength_floor: bool
    auc_of_members: bool
    wrong_mean: WrongMean
    epsilon: float
    letters_header: bool


_MUSE = Dialect(
    stemmer=False,
    strip=False,
    knowmem_tokens=32,
    verbmem_tokens=128,
    verbmem_compared=127,
    last_token=True,
    strength_floor=False,
    auc_of_members=False,
    wrong_mean="arithmetic",
    epsilon=0.0,
    letters_header=True,
)
DIALECTS: dict[str, Dialect] = {
    "muse": _MUSE,
    "open-unlearning": Dialect(
        stemmer=True,
        strip=True,
        knowmem_tokens=32,
        verbmem_tokens=128,
        verbmem_compared=2048,
        last_token=False,
        strength_floor=True,
        auc_of_members=True,
        wrong_mean="geometric",
        epsilon=1e-10,
        letters_header=True,
    ),
    "seed": Dialect(
        stemmer=False,
        strip=False,
        knowmem_tokens=50,
        verbmem_tokens=128,
        verbmem_compared=127,
        last_token=True,
        strength_floor=False,
        auc_of_members=False,
        wrong_mean="arithmetic",
        epsilon=0.0,
        letters_header=False,
    ),
}
