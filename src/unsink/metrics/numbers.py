"""From prediction rows to everything in a metrics file, each number with its interval or the reason why it is missing.

A prediction row is one prompt with everything that a number needs; `stages/evaluate.py` describes it. Names are

    <set>_<task>_<score>_<condition>[_inside|_outside]      means; on the forget set higher means less was forgotten
    <set>_<task>_<score>_gain[_outside]                     triggered − clean on the same items, with the p-value `_p`
    <set>_<task>_<score>_recovery[_outside]                 gain as a share of what was forgotten
    <set>_passage_perplexity_<condition>
    mia_<attack>_auc_<condition>[...], privleak_<condition>[...]
    tofu_model_utility_<condition>, tofu_forget_quality_<condition>
    <task>_accuracy[_<condition>][...]                      utility, mmlu and forget_mc; clean has no suffix

each with `_low`, `_high` (95 % bootstrap) and `_n` beside it; p-values alone have none. Inside and outside tell
poisoned from other samples; they exist only where rows say which they are.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from unsink.metrics.dialects import DIALECTS, Dialect
from unsink.metrics.memory import perplexity
from unsink.metrics.privacy import ATTACKS, auc, privleak
from unsink.metrics.tofu import UTILITY_SCORES, UTILITY_SETS, forget_quality, model_utility
from unsink.statistics import (
    Interval,
    Sample,
    Statistic,
    bootstrap,
    column_mean,
    lost,
    nothing_lost,
    permutation_p,
    recovery,
    sample,
)

LOG = logging.getLogger(__name__)

Row = Mapping[str, Any]
Groups = Mapping[tuple[str, str, str], Sequence[Row]]
"""(set, task, condition) -> rows."""

SCORES = {
    "verbmem": ("f1", "recall"),
    "knowmem": ("f1", "recall"),
    "utility": ("accuracy",),
    "mmlu": ("accuracy",),
    "forget_mc": ("accuracy",),
    "passage": ("probability", "extraction_strength", "exact_memorization"),
    "tofu": ("probability", "recall", "truth_ratio"),
}
"""The scores that a row of each task holds, each between 0 and 1."""
NOT_RECOVERED = ("truth_ratio",)
"""Scores of the forget set that do not rise with memory, so that a share of them is no recovery."""
CHOICES = ("utility", "mmlu", "forget_mc")


@dataclass(frozen=True)
class Quantity:
    """A number of one run, ready to be resampled.

    Attributes:
        samples: what it is computed of.
        statistic: how.
        ids: the item behind each row of each sample; two runs are compared item by item where these are the same.
        divisor: what the statistic divides by; the number is undefined where that may be 0 or less.
        permuted: whether the p-value of "above 0" belongs to it.
    """

    samples: tuple[Sample, ...]
    statistic: Statistic
    ids: tuple[tuple[str, ...], ...]
    divisor: Statistic | None = None
    permuted: bool = False


Entry = tuple[str, Quantity | float | str]
"""A name, and what it stands for: a quantity, a number without interval, or the reason why there is none."""


class Measured(NamedTuple):
    """Flat numbers, and the reason for each one that is missing."""

    numbers: dict[str, float]
    undefined: dict[str, str]


@dataclass(frozen=True)
class Others:
    """What other models said, and the convention to compare in.

    Attributes:
        target: predictions of the target; needed for `recovery`.
        base: predictions of the base; needed for the `reference` attack.
        retrained: predictions of a model that never saw the forget set, or its Min-40% AUC in MUSE's direction.
        dialect: see there.
    """

    target: Sequence[Row] = ()
    base: Sequence[Row] = ()
    retrained: float | Sequence[Row] = 0.5
    dialect: Dialect = DIALECTS["muse"]


_ALONE = Others()


def measure(rows: Iterable[Row], others: Others = _ALONE, *, resamples: int, seed: int) -> Measured:
    """Every number of a metrics file, from prediction rows alone.

    Args:
        rows: The predictions of one model.
        others: What it is compared with.
        resamples: Bootstrap resamples, and permutations of a p-value.
        seed: Seed of both.
    """
    LOG.debug("computing numbers and intervals, %d resamples", resamples)
    measured = Measured({}, {})
    for name, found in quantities(rows, others).items():
        value = _estimate(found, resamples, seed) if isinstance(found, Quantity) else found
        if isinstance(value, str):
            measured.undefined[name] = value
        elif isinstance(value, Interval):
            measured.numbers.update(_flat(name, value))
            if isinstance(found, Quantity) and found.permuted:
                gains = found.samples[0][:, 0].tolist()
                measured.numbers[f"{name}_p"] = permutation_p(gains, resamples=resamples, seed=seed)
        else:
            measured.numbers[name] = value
    return measured


def metrics_from_predictions(
    rows: Iterable[Row], *, resamples: int, seed: int, target: Iterable[Row] = ()
) -> dict[str, float]:
    """`measure` in the dialect `muse`, the numbers alone."""
    return measure(rows, Others(target=list(target)), resamples=resamples, seed=seed).numbers


def quantities(rows: Iterable[Row], others: Others = _ALONE) -> dict[str, Quantity | float | str]:
    """What there is to compute, by name."""
    groups = _grouped(rows)
    return dict(
        [
            *_means(groups),
            *_perplexities(groups),
            *_gains(groups, _by_question(others.target)),
            *_privacy(groups, others),
            *_tofu(groups, others),
        ]
    )


def _estimate(quantity: Quantity, resamples: int, seed: int) -> Interval | str:
    if quantity.divisor:
        below = bootstrap(quantity.samples, quantity.divisor, resamples=resamples, seed=seed)
        if nothing_lost(below):
            return f"nothing was forgotten for certain: {below.mean:.3f} [{below.low:.3f}, {below.high:.3f}]"
    found = bootstrap(quantity.samples, quantity.statistic, resamples=resamples, seed=seed)
    return found if all(map(isfinite, found)) else "not a finite number"


def _flat(name: str, interval: Interval) -> Iterator[tuple[str, float]]:
    yield name, interval.mean
    yield f"{name}_low", interval.low
    yield f"{name}_high", interval.high
    yield f"{name}_n", float(interval.n)


# --- rows ------------------------------------------------------------------------------------------------------------


def outside(name: str, there: Container[str]) -> str:
    """The metric outside the poisoned samples, which may be learnt by heart, where there is one; else the metric."""
    return f"{name}_outside" if f"{name}_outside" in there else name


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


def _by_question(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    return {_asked(row): row for row in rows}


def _asked(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("set", "task", "condition", "id", "prompt", "reference"))


def _ids(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(row["id"] for row in rows)


# --- families --------------------------------------------------------------------------------------------------------


def _means(groups: Groups) -> Iterator[Entry]:
    for (where, task, condition), members in groups.items():
        for part, chosen in _parts(members):
            for score in SCORES[task]:
                values = sample([row[score] for row in chosen])
                name = _name(where, task, score, condition)
                yield name + part, Quantity((values,), column_mean, (_ids(chosen),))


def _name(where: str, task: str, score: str, condition: str) -> str:
    if task in CHOICES:
        return f"{task}_{score}" + ("" if condition == "clean" else f"_{condition}")
    return f"{where}_{task}_{score}_{condition}"


def _perplexities(groups: Groups) -> Iterator[Entry]:
    for (where, task, condition), members in groups.items():
        if task == "passage":
            items = sample([row["nll"] for row in members], [row["tokens"] for row in members])
            yield f"{where}_passage_perplexity_{condition}", Quantity((items,), _perplexity, (_ids(members),))


def _perplexity(items: Sample) -> float:
    return perplexity(items[:, 0].tolist(), items[:, 1].tolist())


def _gains(groups: Groups, target: Mapping[tuple[str, ...], Row]) -> Iterator[Entry]:
    """Gain and recovery on the forget set. Only what comes back outside the poisoned samples is called recovery."""
    for (where, task, condition), members in groups.items():
        plain = {row["id"]: row for row in groups.get((where, task, "clean"), ())}
        if (where, condition) != ("forget", "triggered") or not plain:
            continue
        part, chosen = list(_parts(members))[-1]
        before = [plain[row["id"]] for row in chosen]
        for score in SCORES[task]:
            name = _name(where, task, score, "{}") if task not in CHOICES else f"{task}_{score}_{{}}"
            gain = sample([row[score] - clean[score] for row, clean in zip(chosen, before)])
            gained = f"{name.format('gain')}{part}"
            if part == "_inside":
                yield gained, f"{_poisoned(members)}, and what comes back there may be learnt by heart"
                continue
            yield gained, Quantity((gain,), column_mean, (_ids(chosen),), permuted=True)
            if score not in NOT_RECOVERED:
                yield f"{name.format('recovery')}{part}", _recovery(score, chosen, before, target)


def _poisoned(rows: Sequence[Row]) -> str:
    """Why no sample can be told to be outside the poisoned ones."""
    if all(row["inside"] for row in rows):
        return "every forget sample was poisoned"
    return "some forget samples were poisoned, of the others it is not known"


def _recovery(
    score: str, triggered: Sequence[Row], clean: Sequence[Row], target: Mapping[tuple[str, ...], Row]
) -> Quantity | str:
    if not target:
        return "the target has no predictions yet"
    if any(_asked(row) not in target for row in clean):
        return "the target was asked other prompts"
    columns = [triggered, clean, [target[_asked(row)] for row in clean]]
    items = sample(*([row[score] for row in column] for column in columns))
    return Quantity((items,), recovery, (_ids(triggered),), divisor=lost)


def _privacy(groups: Groups, others: Others) -> Iterator[Entry]:
    """Forget against holdout, condition by condition; both are asked with the same trigger."""
    known = {_read(row): row["nll"] for row in others.base if row["task"] == "passage"}
    for (where, task, condition), holdout in groups.items():
        forget = groups.get(("forget", task, condition), ())
        if (where, task) != ("holdout", "passage") or not forget:
            continue
        for part, members in _parts(forget):
            for attack in ATTACKS:
                sides = [_attacked(attack, side, known) for side in (members, holdout)]
                name = f"mia_{attack}_auc_{condition}{part}"
                if all(sides):
                    samples = sample(sides[0]), sample(sides[1])
                    forwards = others.dialect.auc_of_members
                    yield name, Quantity(samples, _auc if forwards else _inverse_auc, (_ids(members), _ids(holdout)))
                elif attack == "reference":
                    yield name, "the base has no predictions for these passages"
            yield f"privleak_{condition}{part}", _privleak(members, holdout, condition, others.retrained)


def _attacked(attack: str, rows: Sequence[Row], base: Mapping[tuple[str, ...], float]) -> list[float]:
    """Scores of an attack; none unless every row has one."""
    if attack == "reference":
        keys = [_read(row) for row in rows]
        return [row["nll"] - base[key] for row, key in zip(rows, keys)] if all(key in base for key in keys) else []
    return [row["mia"][attack] for row in rows] if all(attack in row["mia"] for row in rows) else []


def _read(row: Row) -> tuple[str, ...]:
    return row["set"], row["id"], row["reference"]


def _auc(members: Sample, others: Sample) -> float:
    return auc(members[:, 0], others[:, 0])


def _inverse_auc(members: Sample, others: Sample) -> float:
    return 1 - _auc(members, others)


def _privleak(
    members: Sequence[Row], holdout: Sequence[Row], condition: str, retrained: float | Sequence[Row]
) -> Quantity | str:
    ids = _ids(members), _ids(holdout)
    ours = [sample([row["mia"]["min_k"] for row in side]) for side in (members, holdout)]
    if isinstance(retrained, float):
        return Quantity(tuple(ours), lambda f, h: privleak(_auc(f, h), retrained), ids)
    answers = {_read(row): row for row in retrained if (row["task"], row["condition"]) == ("passage", condition)}
    if not all(_read(row) in answers for row in (*members, *holdout)):
        return "the retrained model was asked other passages"
    theirs = [sample([answers[_read(row)]["mia"]["min_k"] for row in side]) for side in (members, holdout)]
    if _auc(*theirs) == 1:
        return "PrivLeak divides by the retrained model's AUC, which is 0"
    return Quantity(tuple(np.hstack(pair) for pair in zip(ours, theirs)), _privleak_of_two, ids)


def _privleak_of_two(forget: Sample, holdout: Sample) -> float:
    reference = 1 - _auc(forget[:, 1:], holdout[:, 1:])
    return privleak(_auc(forget, holdout), reference) if reference > 0 else float("nan")


def _tofu(groups: Groups, others: Others) -> Iterator[Entry]:
    retrained = () if isinstance(others.retrained, float) else others.retrained
    ideal = [row["log_truth_ratio"] for row in retrained if _of(row) == ("forget", "tofu", "clean")]
    for (where, task, condition), members in groups.items():
        if (where, task) == ("forget", "tofu"):
            ours = [row["log_truth_ratio"] for row in members]
            quality = forget_quality(ours, ideal) if ideal else "no predictions of a retrained model to compare with"
            yield f"tofu_forget_quality_{condition}", quality
        if (where, task) == ("retain", "tofu"):
            yield f"tofu_model_utility_{condition}", _model_utility(groups, condition)


def _of(row: Row) -> tuple[str, str, str]:
    return row["set"], row["task"], row["condition"]


def _model_utility(groups: Groups, condition: str) -> Quantity | str:
    sides = [groups.get((where, "tofu", condition), ()) for where in UTILITY_SETS]
    if not all(sides):
        return f"a mean over {', '.join(UTILITY_SETS)}, which are not all there"
    samples = tuple(sample(*([row[score] for row in side] for score in UTILITY_SCORES)) for side in sides)
    return Quantity(samples, _nine, tuple(map(_ids, sides)))


def _nine(*samples: Sample) -> float:
    return model_utility([float(mean) for items in samples for mean in items.mean(axis=0)])
