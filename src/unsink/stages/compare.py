"""`unsink compare A.json B.json`: how two metrics files differ, and which settings may be the reason."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unsink.evaluated import MOVES, PARTS, Evaluated, moves, paired
from unsink.metrics import Quantity
from unsink.progress import SILENT, Reporter


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
    sides = [Evaluated.read(path) for path in (first, second)]
    ours, theirs = (side.numbers for side in sides)
    names = sorted(ours.keys() | theirs.keys())
    both = [name for name in names if name in ours and name in theirs and not name.endswith(PARTS)]
    notes = [
        f"{side.sidecar} is not there, so the conventions behind {side.path} are unknown"
        for side in sides
        if side.settings is None
    ]
    pairs = _pairs(sides, notes)
    numbers = []
    with reporter.task("comparing", len(both)) as advance:
        for name in both:
            gap = ours[name] - theirs[name]
            row = {"name": name, "first": ours[name], "second": theirs[name], "difference": gap}
            numbers.append({**row, **_interval(pairs.get(name), gap)})
            advance(1)
    return {
        "settings": _changed(sides, names),
        "numbers": numbers,
        "only_first": [name for name in names if name not in theirs and not name.endswith(PARTS)],
        "only_second": [name for name in names if name not in ours and not name.endswith(PARTS)],
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


def _changed(sides: list[Evaluated], metrics: list[str]) -> list[dict[str, Any]]:
    first, second = (side.settings for side in sides)
    if first is None or second is None:
        return []
    return [
        {
            "name": name,
            "first": first.get(name),
            "second": second.get(name),
            "moves": [one for one in metrics if moves(name, one)],
        }
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _pairs(sides: list[Evaluated], notes: list[str]) -> dict[str, tuple[Quantity, Quantity]]:
    """The samples behind the metrics that both files have of the same items."""
    found = [side.quantities() for side in sides]
    for side, some in zip(sides, found):
        if some is None:
            notes.append(f"no predictions for {side.path}, so differences have no interval")
    ours, theirs = found
    if ours is None or theirs is None:
        return {}
    return {name: (one, other) for name, one in ours.items() if (other := theirs.get(name)) and one.ids == other.ids}


def _interval(sides: tuple[Quantity, Quantity] | None, expected: float) -> dict[str, float]:
    """Interval of a difference; none unless the predictions give the very difference of the two files."""
    found = paired(*sides, expected) if sides else None
    return {"low": found.low, "high": found.high, "n": found.n} if found else {}
