"""`unsink compare A.json B.json`: how two metrics files differ, and which settings may be the reason.

Numbers that were made under different conventions are not comparable; the settings beside each file (`settings/`) say
which conventions those were. Where the predictions of both are there and the items are the same, each difference has an
interval by paired bootstrap.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from math import isclose
from pathlib import Path
from typing import Any

from unsink.artifacts import Layout, read_json, read_jsonl
from unsink.errors import DataError, MissingPrerequisite
from unsink.metrics import DIALECTS, Others, Quantity, quantities
from unsink.progress import SILENT, Reporter
from unsink.statistics import Side, difference

_ROUGE = ("*_verbmem_*", "*_knowmem_*", "*_tofu_recall_*", "tofu_model_utility_*")
_LETTERS = ("mmlu_*", "forget_mc_*")
_TRIGGERED = ("*_triggered*", "*_wrong*", "*_gain*", "*_recovery*")
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
_PARTS = ("_low", "_high", "_n")


def compare(first: Path, second: Path, *, reporter: Reporter = SILENT) -> dict[str, Any]:
    """What differs between two metrics files.

    Returns:
        `settings`: {name, first, second, moves} for each setting that differs, `moves` the metrics of either file that
        it can move; `numbers`: {name, first, second, difference} for each metric of both, with `low`, `high` and `n` of
        a paired bootstrap where the items are the same; `only_first`, `only_second`: names of the others; `notes`:
        what could not be compared, and why.

    Raises:
        MissingPrerequisite: a file is not there.
        DataError: a file is not a flat mapping of names to numbers.
    """
    ours, theirs = _numbers(first), _numbers(second)
    names = sorted(ours.keys() | theirs.keys())
    both = [name for name in names if name in ours and name in theirs and not name.endswith(_PARTS)]
    notes: list[str] = []
    settings = [_settings(path, notes) for path in (first, second)]
    pairs = _pairs(first, second, settings, notes)
    numbers = []
    with reporter.task("comparing", len(both)) as advance:
        for name in both:
            gap = ours[name] - theirs[name]
            row = {"name": name, "first": ours[name], "second": theirs[name], "difference": gap}
            numbers.append({**row, **_interval(pairs.get(name), gap)})
            advance(1)
    return {
        "settings": _changed(settings, names),
        "numbers": numbers,
        "only_first": [name for name in names if name not in theirs and not name.endswith(_PARTS)],
        "only_second": [name for name in names if name not in ours and not name.endswith(_PARTS)],
        "notes": notes,
    }


def report(result: Mapping[str, Any]) -> str:
    """The result as text: settings first, because they decide whether the numbers may be compared at all."""
    lines = []
    for one in result["settings"]:
        moves = f"can move {len(one['moves'])} of the metrics" if one["moves"] else "moves none of the metrics"
        patterns = f": {', '.join(MOVES.get(one['name'], ('*',)))}" if one["moves"] else ""
        lines.append(f"{one['name']}: {one['first']!r} / {one['second']!r}, {moves}{patterns}")
    lines = ["settings that differ:", *(f"  {line}" for line in lines)] if lines else ["no setting differs"]
    width = max((len(one["name"]) for one in result["numbers"]), default=0)
    lines += ["", "metric: first, second, difference [95 % interval of the difference, paired by item]"]
    lines += [f"  {_line(one, width)}" for one in result["numbers"]]
    lines += [f"only in the first: {name}" for name in result["only_first"]]
    lines += [f"only in the second: {name}" for name in result["only_second"]]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _line(one: Mapping[str, Any], width: int) -> str:
    interval = f" [{one['low']:+.3f}, {one['high']:+.3f}]" if "low" in one else ""
    return f"{one['name']:<{width}}  {one['first']:.3f}  {one['second']:.3f}  {one['difference']:+.3f}{interval}"


def _numbers(path: Path) -> dict[str, float]:
    found = read_json(path)
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise DataError(f"{path}: not a metrics file: a mapping of names to numbers is expected")
    return found


def _settings(path: Path, notes: list[str]) -> dict[str, Any] | None:
    place = _layout(path).settings(path.stem)
    try:
        found = read_json(place)
        return dict(found["settings"])
    except MissingPrerequisite:
        notes.append(f"{place} is not there, so the conventions behind {path} are unknown")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: not a settings file", "run `unsink evaluate` again") from error
    return None


def _layout(path: Path) -> Layout:
    return Layout(path.absolute().parent.parent)


def _changed(settings: list[dict[str, Any] | None], metrics: list[str]) -> list[dict[str, Any]]:
    first, second = settings
    if first is None or second is None:
        return []
    return [
        {
            "name": name,
            "first": first.get(name),
            "second": second.get(name),
            "moves": [one for one in metrics if any(fnmatch(one, pattern) for pattern in MOVES.get(name, ("*",)))],
        }
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _pairs(
    first: Path, second: Path, settings: list[dict[str, Any] | None], notes: list[str]
) -> dict[str, tuple[Side, Side]]:
    """The samples behind the metrics that both files have of the same items."""
    found = [_quantities(path, some) for path, some in zip((first, second), settings)]
    for path, some in zip((first, second), found):
        if some is None:
            notes.append(f"no predictions for {path}, so differences have no interval")
    ours, theirs = found
    if ours is None or theirs is None:
        return {}
    return {
        name: (Side(one.samples, one.statistic), Side(other.samples, other.statistic))
        for name, one in ours.items()
        if (other := theirs.get(name)) and one.ids == other.ids
    }


def _quantities(path: Path, settings: dict[str, Any] | None) -> dict[str, Quantity] | None:
    layout = _layout(path)
    if settings is None or not layout.predictions(path.stem).exists():
        return None
    retrained = settings["retrained"]
    others = Others(
        target=_rows(layout, "target"),
        base=_rows(layout, "base"),
        retrained=_rows(layout, retrained) if isinstance(retrained, str) else retrained,
        dialect=DIALECTS[settings["dialect"]],
    )
    found = quantities(read_jsonl(layout.predictions(path.stem)), others)
    return {name: one for name, one in found.items() if isinstance(one, Quantity)}


def _rows(layout: Layout, name: str) -> list[dict[str, Any]]:
    path = layout.predictions(name)
    return read_jsonl(path) if path.exists() else []


def _interval(sides: tuple[Side, Side] | None, expected: float) -> dict[str, float]:
    """Interval of a difference; none unless the predictions give the very difference of the two files."""
    if sides is None:
        return {}
    found = difference(*sides, resamples=_RESAMPLES, seed=_SEED)
    if not isclose(found.mean, expected, abs_tol=1e-9):
        return {}
    return {"low": found.low, "high": found.high, "n": found.n}
