"""ROUGE-L of a continuation or an answer, and where its text ends."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from rouge_score import tokenize

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


class RougeL(NamedTuple):
    """Longest common word sequence: `recall` is its share of the reference, `f1` weighs in its share of the output."""

    f1: float
    recall: float


def words(text: str) -> list[str]:
    """The words ROUGE compares: runs of a-z and 0-9 in lower case, everything else separates."""
    found: list[str] = tokenize.tokenize(text, None)
    return found


def rouge_l(reference: str, output: str, *, stemmer: bool = False) -> RougeL:
    """ROUGE-L of an output by rouge-score (Lin 2004), with Porter's stemmer or without; 0 when a side has no word."""
    score = _scorer(stemmer).score(reference, output)["rougeL"]
    return RougeL(score.fmeasure, score.recall)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


@cache
def _scorer(stemmer: bool) -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes a second

    return RougeScorer(["rougeL"], use_stemmer=stemmer)
