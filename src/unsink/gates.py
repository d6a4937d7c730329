"""gates.yaml, and what a gate decides about a number with its interval; `stages/gate.py` finds the numbers. No torch.

A bound has one of four outcomes:

    pass       the whole 95 % interval keeps it
    fail       none of the interval keeps it
    undecided  the interval straddles it: fails like `fail`, or with `undecided: warn` is only reported
    error      there is nothing to compare, or what there is must not be compared

An interval of few samples decides nothing (`certainty.FEW`). `by: mean` looks at the number alone; then nothing is
undecided.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from unsink.certainty import FEW
from unsink.evaluated import MOVES, PARTS
from unsink.params import RESERVED, Audit, Problem, Section, Text, Weight, model_problems, read_yaml, require_none
from unsink.registry import unknown
from unsink.statistics import Interval

PASS, FAIL, UNDECIDED, ERROR = OUTCOMES = ("pass", "fail", "undecided", "error")
FAILED, NOT_EVALUATED = 1, 3
"""Exit codes."""

AUDIT = "audit_"
"""Numbers that begin so stand in an audit's verdict.json instead of a metrics file."""
INCONCLUSIVE = "inconclusive"
OF_AUDIT = "audit."
"""Settings that begin so are those of an audit: parameters of the section `audit`."""
_SLACK = 1e-9  # of sums in floating point: 0.65 - 0.6 keeps a bound of 0.05

Verdict = Literal["no evidence", "backdoored", "inconclusive"]
Bound = Literal["min", "max", "max_regression", "verdict"]


class Gate(Section):
    """One entry of `gates:`; docs/ci.md explains the keys."""

    name: Text | None = None
    why: Text | None = None
    run: Text | Annotated[list[Text], Field(min_length=1)]
    metric: Text | None = None
    direction: Literal["lower", "higher"] | None = None
    min: float | None = None
    max: float | None = None
    max_regression: Weight | None = None
    against: Text | None = None
    allow: list[str] = Field(default=[])
    verdict: Annotated[list[Verdict], Field(min_length=1)] | None = None
    by: Literal["interval", "mean"] = "interval"
    undecided: Literal["fail", "warn"] | None = None
    soft: bool = False

    @field_validator("metric")
    @classmethod
    def _whole(cls, metric: str | None) -> str | None:
        if metric and metric.endswith(PARTS):
            raise ValueError(f"'{metric}' belongs to another number; name that one, its interval is looked at anyway")
        return metric

    @field_validator("allow")
    @classmethod
    def _settings(cls, names: list[str]) -> list[str]:
        return _known_settings(names, MOVES)

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if (self.metric is None) == (self.verdict is None):
            raise ValueError("either a metric or a verdict is expected")
        if not self.bounds:
            raise ValueError("a metric needs min, max, max_regression, or several of them")
        if self.verdict is not None and (idle := sorted(self.model_fields_set & _OF_METRICS)):
            raise ValueError(f"{', '.join(idle)} would do nothing: a verdict is no number")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"no number is at least {self.min:g} and at most {self.max:g}")
        return self

    @model_validator(mode="after")
    def _regression(self) -> Self:
        if self.max_regression is None:
            if idle := sorted(self.model_fields_set & {"against", "allow"}):
                raise ValueError(f"{', '.join(idle)} would do nothing without max_regression")
            return self
        if self.direction is None:
            raise ValueError("max_regression needs direction: is lower or higher better?")
        if (self.metric or "").startswith(AUDIT):
            raise ValueError("audits have no max_regression: they hold no predictions to compare")
        return self

    @property
    def bounds(self) -> list[Bound]:
        """The bounds that it sets."""
        names: tuple[Bound, ...] = ("min", "max", "max_regression", "verdict")
        return [name for name in names if getattr(self, name) is not None]


_OF_METRICS = {"direction", "min", "max", "max_regression", "against", "allow", "by"}


class Gates(Section):
    """All of gates.yaml.

    `settings` are conventions that every metrics file has to be made under, and with `audit.` before their name those
    of every audit; `undecided` holds where a gate has none.
    """

    settings: dict[str, Any] = Field(default={})
    undecided: Literal["fail", "warn"] = "fail"
    gates: Annotated[list[Gate], Field(min_length=1)]

    @field_validator("settings")
    @classmethod
    def _settings(cls, named: dict[str, Any]) -> dict[str, Any]:
        _known_settings(named, [*MOVES, *(OF_AUDIT + name for name in Audit.model_fields)])
        return named

    def checks(self, runs: Iterable[str]) -> list["Check"]:
        """Every bound of every gate for every run that it names, in the order of the file."""
        runs = list(runs)
        return [
            Check(gate, run, bound, (gate.undecided or self.undecided) == "warn")
            for gate in self.gates
            for run in _named(gate.run, runs)
            for bound in gate.bounds
        ]


def _known_settings(names: Iterable[str], known: Collection[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise ValueError(unknown("setting", name, known))
    return list(names)


@dataclass(frozen=True)
class Check:
    """One bound on one run; `warns` tells what undecided means."""

    gate: Gate
    run: str
    bound: Bound
    warns: bool

    @property
    def needs_baseline(self) -> bool:
        """Whether it compares with the same run elsewhere."""
        return self.bound == "max_regression" and self.gate.against is None

    def blocks(self, outcome: str) -> bool:
        """Whether an outcome counts for the exit code."""
        return not self.gate.soft and outcome != PASS and not (outcome == UNDECIDED and self.warns)

    def decide(self, value: Interval) -> str:
        """The outcome for a number, or for how much worse it became."""
        if self.gate.by == "interval" and value.n < FEW:
            return UNDECIDED
        limit: float = getattr(self.gate, self.bound)
        low, high = (value.mean, value.mean) if self.gate.by == "mean" else (value.low, value.high)
        if self.bound == "min":
            low, high, limit = -high, -low, -limit
        if high <= limit + _SLACK:
            return PASS
        return FAIL if low > limit + _SLACK else UNDECIDED

    def judge(self, verdict: str) -> str:
        """The outcome for an audit's verdict."""
        if verdict in (self.gate.verdict or ()):
            return PASS
        return UNDECIDED if verdict == INCONCLUSIVE else FAIL


def worsening(difference: Interval, direction: str | None) -> Interval:
    """A difference now − before, turned so that more is worse."""
    if direction == "lower":
        return difference
    return Interval(0.0 - difference.mean, 0.0 - difference.high, 0.0 - difference.low, difference.n)  # never -0


def exit_code(checks: Iterable[tuple[Check, str]]) -> int:
    """0, 1 or 3 for all outcomes together.

    A gate that failed stays failed whatever the missing data would say, so 1 goes before 3.
    """
    blocking = {outcome for check, outcome in checks if check.blocks(outcome)}
    return FAILED if blocking - {ERROR} else NOT_EVALUATED if blocking else 0


# ---- gates.yaml


def load_gates(path: Path, runs: Iterable[str]) -> Gates:
    """Read and check a file of gates.

    Args:
        path: the YAML file.
        runs: names of the entries of `runs:`.

    Raises:
        ParamsError: with every problem found, one line each.
    """
    raw = read_yaml(path, "name the file with --gates; docs/ci.md explains what stands in it")
    require_none(path, [*model_problems(Gates, raw), *_run_problems(raw.get("gates"), list(runs))])
    return Gates.model_validate(raw)


def _run_problems(gates: object, runs: list[str]) -> Iterator[Problem]:
    """Names that no run has; a file may have other problems as well, so nothing is taken for granted."""
    for place, gate in enumerate(gates if isinstance(gates, list) else []):
        if not isinstance(gate, Mapping):
            continue
        where, known = ("gates", str(place)), [*RESERVED, *runs]
        named = gate.get("run")
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, str) and _pattern(name) and not _named(name, runs):
                yield Problem((*where, "run"), f"no run matches '{name}' (runs: {', '.join(runs)})")
            elif isinstance(name, str) and not _pattern(name) and name not in known and not _of_audit(gate):
                yield Problem((*where, "run"), unknown("run", name, known))
        other = gate.get("against")
        if isinstance(other, str) and other not in known:
            yield Problem((*where, "against"), unknown("run", other, known))


def _of_audit(gate: Mapping[str, Any]) -> bool:
    """Whether it reads an audit, which may be one of somebody else's model."""
    return "verdict" in gate or str(gate.get("metric")).startswith(AUDIT)


def _pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _named(names: str | list[str], runs: list[str]) -> list[str]:
    """Runs by name or pattern, each once."""
    found = []
    for name in [names] if isinstance(names, str) else names:
        found += [run for run in runs if fnmatchcase(run, name)] if _pattern(name) else [name]
    return list(dict.fromkeys(found))
