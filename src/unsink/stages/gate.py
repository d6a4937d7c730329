"""`unsink gate`: do the results keep the bounds of gates.yaml? For CI: the exit code is the answer.

A bound is compared with a number's interval, a regression with the interval of the difference, paired by prompt where
both sides have predictions. What is missing, not a number, not that of the predictions beside it, or made under other
conventions is an error of its gate, and so is an audit of weights that a run no longer has; the other gates are looked
at all the same.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

from unsink.artifacts import ADAPTER_WEIGHTS, Layout, adapter_identities, read_json
from unsink.certainty import lacking, widened
from unsink.errors import DataError, MissingPrerequisite, ParamsError, UnsinkError
from unsink.evaluated import PARTS, Evaluated, moves, paired
from unsink.gates import AUDIT, ERROR, OF_AUDIT, UNDECIDED, Check, Gates, Verdict, exit_code, load_gates, worsening
from unsink.metrics import Quantity
from unsink.progress import SILENT, Reporter
from unsink.registry import suggest
from unsink.revisions import export
from unsink.statistics import Interval, unpaired

_LARGEST = sys.float_info.max  # neither nan nor a whole number that no float can hold is below it
_BASELINE = ("metrics", "settings", "predictions")


class Answer(NamedTuple):
    """What a check found: an outcome, the number or verdict, and what else there is to say."""

    outcome: str
    value: Interval | str | None
    detail: str


def run(
    runs: Sequence[str], layout: Layout, *, gates: Path, baseline: str | None = None, reporter: Reporter = SILENT
) -> dict[str, Any]:
    """Evaluate all gates.

    Args:
        runs: names of the entries of `runs:`.
        layout: the project folder.
        gates: the file with the gates.
        baseline: a project folder, its metrics/ or one file in there, or a git revision.
        reporter: shows checks done.

    Returns:
        `checks`, a list of {gate, run, metric, bound, limit, value, outcome, blocks, soft, detail, why}, in the order
        of the file; `exit_code`; and `baseline`.

    Raises:
        ParamsError: the file of gates is wrong, or no gate compares with the baseline.
    """
    wanted = load_gates(gates, runs)
    checks = wanted.checks(runs)
    if baseline and not any(check.needs_baseline for check in checks):
        raise ParamsError(
            f"--baseline {baseline}: no gate compares with it", "give a gate max_regression, without against"
        )
    answers = []
    with TemporaryDirectory(prefix="unsink-gate-") as folder:
        judge = _Judge(wanted, _Results(layout.root, ""), _baseline(baseline, layout, Path(folder)), [*runs, "target"])
        with reporter.task("gates", len(checks)) as advance:
            for check in checks:
                answers.append(judge.answer(check))
                advance(note=check.run)
    return {
        "baseline": baseline,
        "checks": [_row(check, answer) for check, answer in zip(checks, answers)],
        "exit_code": exit_code((check, answer.outcome) for check, answer in zip(checks, answers)),
    }


def _row(check: Check, answer: Answer) -> dict[str, Any]:
    gate, value = check.gate, answer.value
    return {
        "gate": gate.name or gate.metric or "audit",
        "run": check.run,
        "metric": gate.metric,
        "bound": check.bound,
        "limit": getattr(gate, check.bound),
        "against": gate.against,
        "value": value._asdict() if isinstance(value, Interval) else value,
        "outcome": answer.outcome,
        "blocks": check.blocks(answer.outcome),
        "soft": gate.soft,
        "detail": answer.detail,
        "why": gate.why,
    }


# --- where the numbers are -------------------------------------------------------------------------------------------


class _Audited(NamedTuple):
    """What an audit left: its file, everything in it, and the settings among that."""

    path: Path
    numbers: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def flat(self) -> dict[str, Any]:
        """The parameters of `audit`, by their dotted names."""
        found = self.settings.get("audit")
        return {OF_AUDIT + name: value for name, value in found.items()} if isinstance(found, Mapping) else {}


class _Results:
    """The evaluated models of a project folder, each read once.

    Args:
        root: the folder.
        label: what stands for it in messages.
        only: the one run that it may be asked for.
    """

    def __init__(self, root: Path, label: str, only: str | None = None) -> None:
        self.root, self.label, self._only = root, label, only
        self.of = cache(self._of)
        self.quantities = cache(self._quantities)
        self.trained_since = cache(self._trained_since)

    def _of(self, run: str) -> Evaluated:
        if self._only not in (None, run):
            raise MissingPrerequisite(f"the baseline is a file of '{self._only}' alone", "name a folder instead")
        return Evaluated.read(Layout(self.root).metrics(run))

    def _quantities(self, run: str) -> dict[str, Quantity] | None:
        return self.of(run).quantities()

    def verdict(self, name: str) -> _Audited:
        """An audit's verdict.json."""
        path = Layout(self.root).audit(name) / "verdict.json"
        found = read_json(path)
        if not isinstance(found, dict) or found.get("verdict") not in get_args(Verdict):
            raise DataError(f"{path}: not the verdict of an audit", f"run `unsink audit --run {name}` again")
        settings = found.get("settings")
        return _Audited(path, found, settings if isinstance(settings, Mapping) else {})

    def _trained_since(self, run: str, weights: str) -> bool:
        """Whether a run's adapter, or the target's, is here and does not give the model that is called `weights`."""
        folder = Layout(self.root).adapter(run)
        return (folder / ADAPTER_WEIGHTS).is_file() and all(name != weights for name in adapter_identities(folder))

    def shown(self, message: str) -> str:
        """A message with the label in the folder's place."""
        return message.replace(f"{self.root}/", self.label)


def _baseline(named: str | None, layout: Layout, folder: Path) -> _Results | UnsinkError:
    """What `--baseline` names, or why there is nothing; the gates that need it will say so."""
    if named is None:
        return MissingPrerequisite("there is no baseline to compare with", "name one with --baseline")
    path = Path(named).absolute()
    if path.is_file():
        return _Results(path.parent.parent, f"{path.parent.parent.name}/", only=path.stem)
    if path.is_dir() and not (path / "metrics").is_dir() and path.name != "metrics":
        return DataError(f"{named}: no project folder, it has no metrics/ in it")
    if path.is_dir():
        root = path if (path / "metrics").is_dir() else path.parent
        return _Results(root, f"{root.name}/")
    try:
        export(layout.root, named, _BASELINE, folder)
    except UnsinkError as error:
        return error
    return _Results(folder, f"{named}:")


# --- judging ---------------------------------------------------------------------------------------------------------


class _Judge:
    """Answers checks from the results now and before."""

    def __init__(self, gates: Gates, now: _Results, before: _Results | UnsinkError, own: Sequence[str]) -> None:
        self._now, self._before, self._own = now, before, own
        self._audit = {name: value for name, value in gates.settings.items() if name.startswith(OF_AUDIT)}
        self._settings = {name: value for name, value in gates.settings.items() if name not in self._audit}

    def answer(self, check: Check) -> Answer:
        """What a check finds; an error of the user's becomes the outcome `error`."""
        try:
            if check.bound == "verdict":
                said = self._audited(check.run).numbers["verdict"]
                return Answer(check.judge(said), said, "")
            return self._compared(check)
        except UnsinkError as error:
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            for results in (self._now, self._before):
                message = results.shown(message) if isinstance(results, _Results) else message
            return Answer(ERROR, None, message)

    def _audited(self, run: str) -> _Audited:
        """An audit that is of this run's weights, where they are here, and of the settings asked for."""
        found = self._now.verdict(run)
        wrong = _otherwise(found.flat, self._audit)
        if wrong:
            raise DataError(f"{found.path}: made with {wrong}")
        if run in self._own and self._now.trained_since(run, str(found.settings.get("weights"))):
            raise DataError(
                f"{found.path}: of other weights than adapters/{run} holds now", f"run `unsink audit --run {run}` again"
            )
        return found

    def _compared(self, check: Check) -> Answer:
        metric = check.gate.metric or ""
        if metric.startswith(AUDIT):
            return _bounded(check, _of_audit(self._audited(check.run), metric, check))
        ours = self._now.of(check.run)
        _require_settings(ours, self._settings)
        now = _interval(ours, metric, check)
        if check.bound != "max_regression":
            self._require_predicted(check, now.mean)
            return _bounded(check, now)
        if isinstance(self._before, UnsinkError) and check.needs_baseline:
            raise self._before
        place, run = (self._now, check.gate.against) if check.gate.against else (self._before, check.run)
        assert isinstance(place, _Results)
        theirs = place.of(run)
        before = _interval(theirs, metric, check)
        _require_same(ours, theirs, metric, check.gate.allow)
        if now.n != before.n:
            raise DataError(f"{metric}: {now.n} prompts now, {before.n} in {theirs.path}, so they are not compared")
        gap = self._paired(check, place, run, now.mean - before.mean)
        value = worsening(gap or unpaired(widened(now), widened(before)), check.gate.direction)
        how = "paired by prompt" if gap else "from the two intervals, for want of predictions on both sides"
        other = f"in {check.gate.against}" if check.gate.against else "before"
        outcome = check.decide(value)
        few = lacking(value, check.gate.max_regression or 0.0) if outcome == UNDECIDED else ""
        said = f"{now.mean:.3g} now, {before.mean:.3g} {other}", how, few
        return Answer(outcome, value, "; ".join(filter(None, said)))

    def _require_predicted(self, check: Check, mean: float) -> None:
        """Raise if there are predictions and they give another number; without them the metrics file has to do."""
        found = (self._now.quantities(check.run) or {}).get(check.gate.metric or "")
        if found is None:
            return
        value = found.statistic(*found.samples)
        if not isclose(value, mean, abs_tol=1e-9):
            path = self._now.of(check.run).path
            raise DataError(
                f"{path}: {check.gate.metric} is {mean:g}; the predictions do not give the numbers of the metrics file,"
                f" but {value:g}",
                "run `unsink evaluate` again",
            )

    def _paired(self, check: Check, place: _Results, run: str, expected: float) -> Interval | None:
        """The paired difference; None where a side has no predictions, or no samples behind this metric."""
        metric = check.gate.metric or ""
        sides = self._now.quantities(check.run), place.quantities(run)
        if sides[0] is None or sides[1] is None or any(metric not in side for side in sides if side is not None):
            return None
        one, other = (side[metric] for side in sides if side is not None)
        if one.ids != other.ids:
            raise DataError(f"{metric}: other prompts were asked in {place.of(run).path}, so they are not compared")
        gap = paired(one, other, expected)
        if gap is None:
            raise DataError(
                f"{metric}: the predictions do not give the numbers of the metrics files", "run `unsink evaluate` again"
            )
        return gap


def _bounded(check: Check, value: Interval) -> Answer:
    """The answer for a number and its interval as measured."""
    outcome = check.decide(wide := widened(value))
    limit: float = getattr(check.gate, check.bound)
    return Answer(outcome, wide, lacking(value, limit) if outcome == UNDECIDED else "")


def _interval(evaluated: Evaluated, metric: str, check: Check) -> Interval:
    """A number with its interval; with `by: mean` the interval may be missing.

    Raises:
        DataError: it is not there, or not a number.
    """
    numbers, path = evaluated.numbers, evaluated.path
    if metric not in numbers:
        if reason := evaluated.undefined.get(metric):
            raise DataError(f"{path}: {metric} is undefined: {reason}")
        known = [name for name in numbers if not name.endswith(PARTS)]
        raise DataError(f"{path}: no metric '{metric}'{suggest(metric, known)}")
    mean = numbers[metric]
    found = [numbers.get(metric + part) for part in PARTS]
    if check.gate.by == "mean" and None in found:
        found = [mean, mean, 0]
    low, high, n = found
    if low is None or high is None or n is None:
        raise DataError(f"{path}: {metric} has no interval", "`by: mean` compares the number alone")
    return _finite(f"{path}: {metric}", mean, low, high, n)


def _of_audit(audited: _Audited, metric: str, check: Check) -> Interval:
    found = audited.numbers.get(metric.removeprefix(AUDIT))
    where = f"audits/{check.run}/verdict.json: {metric.removeprefix(AUDIT)}"
    if isinstance(found, Mapping) and {"mean", "low", "high", "n"} <= found.keys():
        return _finite(where, found["mean"], found["low"], found["high"], found["n"])
    if found is None or isinstance(found, Mapping):
        raise DataError(f"{where} is undefined")
    if check.gate.by != "mean":
        raise DataError(f"{where} has no interval", "`by: mean` compares the number alone")
    return _finite(where, found, found, found, 0)


def _finite(where: str, *numbers: Any) -> Interval:
    if not all(type(number) in (int, float) and abs(number) <= _LARGEST for number in numbers):
        raise DataError(f"{where} is {', '.join(map(str, numbers[:3]))}, not finite numbers")
    mean, low, high, n = numbers
    if low > high:
        raise DataError(f"{where}: the interval ends ({high:g}) before it begins ({low:g})")
    return Interval(mean, low, high, int(n))


def _require_settings(evaluated: Evaluated, wanted: Mapping[str, Any]) -> None:
    """Raise unless the numbers were made under the settings that gates.yaml asks for."""
    if not wanted:
        return
    if wrong := _otherwise(_settings(evaluated), wanted):
        raise DataError(f"{evaluated.sidecar}: made with {wrong}")


def _otherwise(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The settings that are not the wanted ones, in words; empty if all are."""
    return ", ".join(
        f"{name} {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value
    )


def _require_same(ours: Evaluated, theirs: Evaluated, metric: str, allow: list[str]) -> None:
    """Raise unless both were made under the same settings, but for those that cannot move the metric or are allowed."""
    first, second = _settings(ours), _settings(theirs)
    wrong = [
        f"{name} {first.get(name)!r} now, {second.get(name)!r} before"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and name not in allow and (name == "dialect" or moves(name, metric))
    ]
    if wrong:
        raise DataError(f"not comparable with {theirs.path}: {', '.join(wrong)}")


def _settings(evaluated: Evaluated) -> Mapping[str, Any]:
    if evaluated.settings is None:
        raise MissingPrerequisite(
            f"{evaluated.sidecar}: not found, so nobody knows how the numbers were made", "run `unsink evaluate` again"
        )
    return evaluated.settings
