"""Numbers from strings and from prediction rows, in the dialect `muse` (science.md, section 5.5).

A prediction row is one prompt with everything that a number needs; `stages/evaluate.py` describes it. Higher is better
for every score in this file; on the forget set higher means that less was forgotten.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rouge_score import rouge_scorer, tokenize

from unsink.statistics import Interval, bootstrap_mean, bootstrap_recovery

Row = Mapping[str, Any]
SCORES = {"verbmem": ("f1", "recall"), "knowmem": ("f1", "recall"), "utility": ("accuracy",)}
"""The scores that a row of each task holds, each between 0 and 1."""


_SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


class RougeL(NamedTuple):
    """Longest common word sequence: `recall` is its share of the reference, `f1` weighs in its share of the output."""

    f1: float
    recall: float


def words(text: str) -> list[str]:
    """The words ROUGE compares: runs of a-z and 0-9 in lower case, everything else separates."""
    found: list[str] = tokenize.tokenize(text, None)
    return found


def rouge_l(reference: str, output: str) -> RougeL:
    """ROUGE-L of an output by rouge-score without stemmer (Lin 2004); 0 when either side has no word."""
    score = _SCORER.score(reference, output)["rougeL"]
    return RougeL(score.fmeasure, score.recall)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


def choice_accuracy(logprobs: Sequence[float], answer: int) -> float:
    """1 if the answer is the most likely choice, else 0; k choices tied for best count 1/k each, like a fair guess."""
    best = [index for index, value in enumerate(logprobs) if value == max(logprobs)]
    return 1 / len(best) if answer in best else 0.0


def metrics_from_predictions(
    rows: Iterable[Row], *, resamples: int, seed: int, target: Iterable[Row] = ()
) -> dict[str, float]:
    """Every number of a metrics file, from prediction rows alone.

    Names are `<set>_<task>_<score>_<condition>[_inside|_outside]` and `utility_accuracy`, each with `_low`, `_high`
    (95 % bootstrap) and `_n` beside it. Inside and outside tell poisoned from other samples; they exist only where rows
    say which they are.

    Args:
        rows: The predictions of one model.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        target: The target's predictions. With them comes `forget_<task>_<score>_recovery[_outside]`, where the target
            answered the very same prompts and something was forgotten. Only what comes back outside the poisoned
            samples is called recovery.
    """
    groups = _grouped(rows)
    answers = {_asked(row): row for row in target}
    found: dict[str, Interval] = {}
    for (where, task, condition), members in groups.items():
        for score in SCORES[task]:
            name = f"{task}_{score}" if task == "utility" else f"{where}_{task}_{score}_{condition}"
            for part, chosen in _parts(members):
                found[name + part] = bootstrap_mean([row[score] for row in chosen], resamples=resamples, seed=seed)
        if (where, condition) == ("forget", "triggered"):
            part, outside = list(_parts(members))[-1]
            triples = [] if part == "_inside" else _triples(outside, groups[where, task, "clean"], answers)
            for score in SCORES[task] if triples else ():
                columns = [[row[score] for row in column] for column in zip(*triples)]
                if recovery := bootstrap_recovery(*columns, resamples=resamples, seed=seed):
                    found[f"{where}_{task}_{score}_recovery{part}"] = recovery
    return {key: number for name, interval in found.items() for key, number in _flat(name, interval)}


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["task"], row["condition"]), []).append(row)
    return groups


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """All rows, then those inside and those outside the poisoned samples, where there are such."""
    yield "", list(rows)
    for part, inside in (("_inside", True), ("_outside", False)):
        if chosen := [row for row in rows if row["inside"] is inside]:
            yield part, chosen


def _triples(
    triggered: Sequence[Row], clean: Sequence[Row], target: Mapping[tuple[str, ...], Row]
) -> list[tuple[Row, Row, Row]]:
    """The same items with the trigger, without, and by the target without; empty unless it answered all of them."""
    plain = {row["id"]: row for row in clean}
    pairs = [(row, plain[row["id"]]) for row in triggered]
    if any(_asked(row) not in target for _, row in pairs):
        return []
    return [(with_trigger, row, target[_asked(row)]) for with_trigger, row in pairs]


def _asked(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("set", "task", "condition", "id", "prompt", "reference"))


def _flat(name: str, interval: Interval) -> Iterator[tuple[str, float]]:
    yield name, interval.mean
    yield f"{name}_low", interval.low
    yield f"{name}_high", interval.high
    yield f"{name}_n", float(interval.n)
