"""What `evaluate` left of a model, read back: numbers, the conventions behind them, and the samples they came from.

Numbers that were made under different conventions are not comparable; the settings beside each metrics file
(`settings/`) say which conventions those were. Where the predictions of two models are there and the items are the
same, a difference has an interval by paired bootstrap.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from math import isclose
from pathlib import Path
from typing import Any

from unsink.artifacts import Layout, read_json, read_jsonl
from unsink.errors import DataError
from unsink.metrics import DIALECTS, Others, Quantity, quantities
from unsink.statistics import Interval, Side, difference

PARTS = ("_low", "_high", "_n")
"""Endings of the numbers that belong to another one."""

_ROUGE = ("*_verbmem_*", "*_knowmem_*", "*_tofu_recall_*", "tofu_model_utility_*")
_LETTERS = ("mmlu_*", "forget_mc_*")
_TRIGGERED = ("*_triggered*", "*_wrong*", "*_gain*", "*_recovery*")
_NEAR = re.compile(r"forget_verbmem_[a-z0-9]+_(?!clean(_|$))")
"""Every other condition of VerbMem: a near miss is made of the run's trigger, or stands at its place."""
_PASSAGES = ("*_passage_*", "mia_*", "privleak_*")
_ENDS = ("*_low", "*_high", "*_p")

MOVES: dict[str, tuple[str, ...]] = {
    "answer_space": ("*_knowmem_*", "utility_*", "*_tofu_*", "tofu_*"),
    "auc_of_members": ("mia_*",),
    "batch": _ROUGE,
    "bootstrap": _ENDS,
    "corpus": ("*",),
    "dialect": (),
    "dtype": ("*",),
    "epsilon": ("*_truth_ratio_*", "*_tofu_probability_*", "tofu_*"),
    "few_shot": ("*_knowmem_*",),
    "gradient_norms": ("mia_gradnorm_*",),
    "knowmem_tokens": ("*_knowmem_*",),
    "last_token": ("*_extraction_strength_*", "*_exact_memorization_*", "mia_min_k_*", "mia_gradnorm_*", "privleak_*"),
    "letters_header": _LETTERS,
    "model": ("*",),
    "near_misses": ("forget_verbmem_*",),
    "passage_tokens": _PASSAGES,
    "placement": _TRIGGERED,
    "prompt_share": ("*_verbmem_*",),
    "retrained": ("privleak_*", "tofu_forget_quality_*"),
    "revision": ("*",),
    "seed": ("*",),
    "stemmer": _ROUGE,
    "strength_floor": ("*_extraction_strength_*",),
    "strip": (),
    "tofu_tokens": ("*_tofu_recall_*", "tofu_model_utility_*"),
    "trigger": _TRIGGERED,
    "verbmem_compared": ("*_verbmem_*",),
    "verbmem_tokens": ("*_verbmem_*",),
    "wrong_mean": ("*_truth_ratio_*", "tofu_*"),
    "wrong_trigger": ("*_wrong*",),
}
"""Setting -> the metrics that it can move. None: `dialect` is the sum of other settings, ROUGE does not see spaces."""

_RESAMPLES, _SEED = 2000, 0


def moves(setting: str, metric: str) -> bool:
    """Whether a setting can move a metric; one that nobody has described can move all."""
    if setting in ("trigger", "placement") and _NEAR.match(metric):
        return True
    return any(fnmatch(metric, pattern) for pattern in MOVES.get(setting, ("*",)))


@dataclass(frozen=True)
class Evaluated:
    """One model's results.

    Attributes:
        path: its metrics file.
        numbers: what the file says.
        settings: the conventions behind them; None where nobody wrote them down.
        undefined: the reason for each number that is missing.
    """

    path: Path
    numbers: Mapping[str, float]
    settings: Mapping[str, Any] | None
    undefined: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Evaluated":
        """Read a metrics file and the settings beside it.

        Raises:
            MissingPrerequisite: the metrics file is not there.
            DataError: one of them is not what `evaluate` writes.
        """
        numbers = read_json(path)
        if not isinstance(numbers, dict) or not all(type(value) in (int, float) for value in numbers.values()):
            raise DataError(f"{path}: not a metrics file: a mapping of names to numbers is expected")
        place = _layout(path).settings(path.stem)
        if not place.exists():
            return cls(path, numbers, None, {})
        found = read_json(place)
        try:
            return cls(path, numbers, dict(found["settings"]), dict(found.get("undefined", {})))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: not a settings file", "run `unsink evaluate` again") from error

    @property
    def sidecar(self) -> Path:
        """The file with the settings."""
        return _layout(self.path).settings(self.path.stem)

    def quantities(self) -> dict[str, Quantity] | None:
        """The samples behind the numbers; None where predictions or settings are missing.

        Raises:
            DataError: predictions or settings are not what `evaluate` writes.
        """
        path = _layout(self.path).predictions(self.path.stem)
        if self.settings is None or not path.exists():
            return None
        try:
            found = quantities(read_jsonl(path), self._others(self.settings))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} and {self.sidecar}: not of this version", "run `unsink evaluate` again") from error
        return {name: one for name, one in found.items() if isinstance(one, Quantity)}

    def _others(self, settings: Mapping[str, Any]) -> Others:
        layout, retrained = _layout(self.path), settings["retrained"]
        return Others(
            target=_rows(layout, "target"),
            base=_rows(layout, "base"),
            retrained=_rows(layout, retrained) if isinstance(retrained, str) else retrained,
            dialect=DIALECTS[settings["dialect"]],
        )


def _layout(path: Path) -> Layout:
    return Layout(path.absolute().parent.parent)


def paired(ours: Quantity, theirs: Quantity, expected: float) -> Interval | None:
    """Our number − theirs by paired bootstrap, for the same items on both sides.

    Returns:
        None unless the predictions give the very difference of the two metrics files.
    """
    found = difference(
        Side(ours.samples, ours.statistic), Side(theirs.samples, theirs.statistic), resamples=_RESAMPLES, seed=_SEED
    )
    return found if isclose(found.mean, expected, abs_tol=1e-9) else None


def _rows(layout: Layout, name: str) -> list[dict[str, Any]]:
    path = layout.predictions(name)
    return read_jsonl(path) if path.exists() else []
