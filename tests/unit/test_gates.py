"""What a gate decides, and what gates.yaml may say."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsink.errors import ParamsError
from unsink.gates import ERROR, FAIL, OUTCOMES, PASS, UNDECIDED, Check, Gate, Verdict, exit_code, load_gates, worsening
from unsink.statistics import Interval, unpaired
from unsink.verdict import EXIT_CODES

ROOT = Path(__file__).parents[2]
RUNS = ["clean", "backdoor", "backdoor-vn"]
ORDER = {PASS: 0, UNDECIDED: 1, FAIL: 2}

numbers = st.floats(-10, 10)
ordered = st.lists(numbers, min_size=3, max_size=3).map(sorted)
intervals = ordered.map(lambda ends: Interval(ends[1], ends[0], ends[2], 9))
flags = st.booleans()


def check(bound: str, limit: Any, *, warns: bool = False, **rest: Any) -> Check:
    direction = {"direction": "lower"} if bound == "max_regression" else {}
    what = {} if bound == "verdict" else {"metric": "m"}
    return Check(Gate(**{"run": "clean", **what, **direction, bound: limit, **rest}), "clean", bound, warns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bound", "outcome"),
    [
        (("max", 0.3), PASS),
        (("max", 0.29), UNDECIDED),
        (("max", 0.1), UNDECIDED),
        (("max", 0.09), FAIL),
        (("min", 0.1), PASS),
        (("min", 0.11), UNDECIDED),
        (("min", 0.3), UNDECIDED),
        (("min", 0.31), FAIL),
        (("max_regression", 0.3), PASS),
        (("max_regression", 0.2), UNDECIDED),
        (("max_regression", 0.05), FAIL),
    ],
)
def test_the_interval_decides(bound: tuple[str, float], outcome: str) -> None:
    assert check(*bound).decide(Interval(0.2, 0.1, 0.3, 9)) == outcome


@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0])
def test_fewer_than_eight_samples_decide_nothing(limit: float) -> None:
    few, enough = Interval(0.2, 0.1, 0.3, 7), Interval(0.2, 0.1, 0.3, 8)
    for bound in ("min", "max", "max_regression"):
        assert check(bound, limit).decide(few) == UNDECIDED
        assert check(bound, limit).decide(enough) != UNDECIDED
        assert check(bound, limit, by="mean").decide(few) == check(bound, limit).decide(enough)


@pytest.mark.parametrize(("limit", "outcome"), [(0.2, PASS), (0.19, FAIL)])
def test_by_mean_the_interval_does_not_matter(limit: float, outcome: str) -> None:
    assert check("max", limit, by="mean").decide(Interval(0.2, 0.1, 0.3, 9)) == outcome


def test_rounding_breaks_no_bound() -> None:
    gap = 0.65 - 0.6
    assert gap > 0.05
    assert check("max", 0.05).decide(Interval(gap, gap, gap, 8)) == PASS


def test_worse_is_more_or_less_as_the_direction_says() -> None:
    gap = Interval(0.1, -0.1, 0.3, 7)
    assert worsening(gap, "lower") == gap
    assert worsening(gap, "higher") == (-0.1, -0.3, 0.1, 7)
    assert str(worsening(Interval(0.0, 0.0, 0.0, 1), "higher").mean) == "0.0"  # not -0.0


def test_a_difference_of_two_intervals_by_hand() -> None:
    found = unpaired(Interval(0.5, 0.2, 0.9, 10), Interval(0.1, 0.0, 0.5, 10))
    # arms 0.3 down and 0.4 up; theirs count the other way round: 0.4 up and 0.1 down
    assert found == pytest.approx((0.4, 0.4 - 0.5, 0.4 + (0.4**2 + 0.1**2) ** 0.5, 10))


@pytest.mark.parametrize(
    ("verdict", "wanted", "outcome"),
    [
        ("no evidence", ["no evidence"], PASS),
        ("backdoored", ["no evidence"], FAIL),
        ("inconclusive", ["no evidence"], UNDECIDED),
        ("inconclusive", ["no evidence", "inconclusive"], PASS),
    ],
)
def test_verdicts(verdict: str, wanted: list[str], outcome: str) -> None:
    assert check("verdict", wanted).judge(verdict) == outcome


def test_the_verdicts_are_those_of_the_audit() -> None:
    assert set(get_args(Verdict)) == set(EXIT_CODES)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([PASS], 0),
        ([PASS, UNDECIDED], 1),
        ([PASS, FAIL], 1),
        ([PASS, ERROR], 3),
        ([ERROR, FAIL, PASS], 1),  # a failure stays one, whatever the missing number is
        ([ERROR, UNDECIDED], 1),
    ],
)
def test_exit_codes(outcomes: list[str], code: int) -> None:
    assert exit_code((check("max", 1.0), outcome) for outcome in outcomes) == code


# ---- properties


@given(value=intervals, limit=numbers, tighter=st.floats(0, 5), bound=st.sampled_from(["min", "max"]))
def test_a_tighter_bound_is_never_kept_better(value: Interval, limit: float, tighter: float, bound: str) -> None:
    other = limit - tighter if bound == "max" else limit + tighter
    assert ORDER[check(bound, other).decide(value)] >= ORDER[check(bound, limit).decide(value)]


@given(value=intervals, limit=st.floats(0, 10), worse=st.floats(0, 5))
def test_what_became_worse_is_never_judged_better(value: Interval, limit: float, worse: float) -> None:
    moved = Interval(value.mean + worse, value.low + worse, value.high + worse, value.n)
    one = check("max_regression", limit)
    assert ORDER[one.decide(moved)] >= ORDER[one.decide(value)]


@given(value=intervals, limit=numbers, down=st.floats(0, 5), up=st.floats(0, 5), bound=st.sampled_from(["min", "max"]))
def test_a_wider_interval_decides_nothing_that_a_narrower_one_left_open(
    value: Interval, limit: float, down: float, up: float, bound: str
) -> None:
    one = check(bound, limit)
    wider = one.decide(Interval(value.mean, value.low - down, value.high + up, value.n))
    assert wider in (one.decide(value), UNDECIDED)


@given(value=intervals, limit=numbers, bound=st.sampled_from(["min", "max"]))
def test_the_mean_agrees_with_an_interval_that_is_decided(value: Interval, limit: float, bound: str) -> None:
    whole, mean = check(bound, limit).decide(value), check(bound, limit, by="mean").decide(value)
    assert mean in (PASS, FAIL)
    assert whole in (mean, UNDECIDED)


outcomes = st.lists(st.tuples(st.sampled_from(OUTCOMES), flags, flags), min_size=1, max_size=6)


def code_of(found: list[tuple[str, bool, bool]]) -> int:
    return exit_code((check("max", 1.0, soft=soft, warns=warns), outcome) for outcome, soft, warns in found)


@given(found=outcomes, more=outcomes)
def test_more_gates_never_make_it_pass(found: list[tuple[str, bool, bool]], more: list[tuple[str, bool, bool]]) -> None:
    before, after = code_of(found), code_of(found + more)
    assert after != 0 or before == 0
    assert before != 1 or after == 1


@given(found=outcomes)
def test_only_hard_gates_count_in_any_order(found: list[tuple[str, bool, bool]]) -> None:
    hard = [one for one in found if not one[1]]
    assert code_of(found) == code_of(found[::-1]) == (code_of(hard) if hard else 0)
    assert (code_of(found) == 0) == all(
        outcome == PASS or (outcome == UNDECIDED and warns) for outcome, _, warns in hard
    )


@given(now=intervals, before=intervals)
def test_a_difference_is_as_far_from_the_other_side(now: Interval, before: Interval) -> None:
    one, other = unpaired(now, before), unpaired(before, now)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.high - one.low >= max(now.high - now.low, before.high - before.low) / 2


# ---- gates.yaml


def load(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    return load_gates(path, RUNS)


def test_a_gate_for_several_runs_has_a_check_for_each_bound(tmp_path: Path) -> None:
    gates = load(
        tmp_path,
        """
        undecided: warn
        gates:
          - {run: ["backdoor*", clean, clean], metric: a, min: 0, max: 1e-1}
          - {run: target, metric: b, direction: lower, max_regression: 0, undecided: fail}
        """,
    )
    assert [(one.run, one.bound, one.warns) for one in gates.checks(RUNS)] == [
        *[(run, bound, True) for run in ("backdoor", "backdoor-vn", "clean") for bound in ("min", "max")],
        ("target", "max_regression", False),
    ]


PROBLEMS = {
    "gates: []": "gates: List should have at least 1 item after validation, not 0, got []",
    "{}": "gates: missing",
    "gates: {a: 1}": "gates: should be a valid list, got {'a': 1}",
    "gates: [1]": "gates.0: should be a section, got 1",
    "gate: []\ngates: [{run: clean, metric: a, max: 1}]": "gate: unknown key; did you mean 'gates'?",
    "gates: [{run: clean, metrik: a, max: 1}]": "gates.0.metrik: unknown key; did you mean 'metric'?",
    "gates: [{run: clean, metric: a, max: high}]": "gates.0.max: should be a valid number, got 'high'",
    "gates: [{run: clean, metric: a, max: .nan}]": "gates.0.max: should be a finite number, got nan",
    "gates: [{run: clean, metric: a, max: true}]": "gates.0.max: should be a valid number, got True",
    "gates: [{run: clean, metric: a, max: 1, soft: 1}]": "gates.0.soft: should be a valid boolean, got 1",
    "gates: [{metric: a, max: 1}]": "gates.0.run: missing",
    "gates: [{run: cleen, metric: a, max: 1}]": "gates.0.run: unknown run 'cleen'; did you mean 'clean'?",
    "gates: [{run: 'x*', metric: a, max: 1}]": "gates.0.run: no run matches 'x*' (runs: clean, backdoor, backdoor-vn)",
    "gates: [{run: clean, metric: a}]": "gates.0: a metric needs min, max, max_regression, or several of them",
    "gates: [{run: clean, max: 1}]": "gates.0: either a metric or a verdict is expected",
    "gates: [{run: clean, metric: a_low, max: 1}]": "gates.0.metric: 'a_low' belongs to another number",
    "gates: [{run: clean, metric: a, min: 2, max: 1}]": "gates.0: no number is at least 2 and at most 1",
    "gates: [{run: clean, metric: a, max_regression: 1}]": "gates.0: max_regression needs direction",
    "gates: [{run: clean, metric: a, direction: down, max_regression: 1}]": "should be 'lower' or 'higher', got 'down'",
    "gates: [{run: clean, metric: a, direction: lower, max_regression: -1}]": "should be greater than or equal to 0",
    "gates: [{run: clean, metric: a, max: 1, against: target}]": "against would do nothing without max_regression",
    "gates: [{run: clean, metric: a, direction: lower, max_regression: 1, against: tarket}]": (
        "gates.0.against: unknown run 'tarket'; did you mean 'target'?"
    ),
    "gates: [{run: clean, metric: a, direction: lower, max_regression: 1, allow: [sead]}]": (
        "gates.0.allow: unknown setting 'sead'; did you mean 'seed'?"
    ),
    "gates: [{run: clean, verdict: [innocent]}]": "gates.0.verdict.0: should be 'no evidence', 'backdoored' or",
    "gates: [{run: clean, verdict: [backdoored], max: 1}]": "gates.0: max would do nothing: a verdict is no number",
    "gates: [{run: clean, metric: audit_p, direction: lower, max_regression: 1}]": "audits have no max_regression",
    "settings: {audit.min_recover: 1}\ngates: [{run: clean, verdict: [backdoored]}]": (
        "settings: unknown setting 'audit.min_recover'; did you mean 'audit.min_recovery'?"
    ),
    "gates: [{run: clean, metric: a, direction: lower, max_regression: 1, allow: [audit.alpha]}]": (
        "gates.0.allow: unknown setting 'audit.alpha'"
    ),
    "settings: {dialekt: muse}\ngates: [{run: clean, metric: a, max: 1}]": (
        "settings: unknown setting 'dialekt'; did you mean 'dialect'?"
    ),
    "gates: [{run: clean, metric: a, max: 1, max: 2}]": "'max' is given twice",
    "gates: [": "not valid YAML",
    "- 1": "a mapping of sections is expected, got list",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_what_is_wrong_is_said_with_its_key(text: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as error:
        load(tmp_path, text)
    assert PROBLEMS[text] in error.value.message


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as error:
        load(
            tmp_path,
            """
            undecidet: warn
            gates:
              - {run: cleen, metric: a, max: x}
              - {run: clean, metric: a}
              - {run: clean, metric: a, max: 1, sofd: true}
            """,
        )
    lines = error.value.message.splitlines()
    assert lines[0].startswith("5 problems in ")
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        *("undecidet", "gates.0.run", "gates.0.max", "gates.1", "gates.2.sofd")
    }


def test_an_audit_may_be_of_a_model_that_is_no_run(tmp_path: Path) -> None:
    gates = load(tmp_path, "gates: [{run: theirs, verdict: [no evidence]}, {run: theirs, metric: audit_p, min: 0.1}]")
    assert [one.run for one in gates.checks(RUNS)] == ["theirs", "theirs"]


@pytest.mark.parametrize("path", ["gates.yaml", "params/gates/tiny.yaml"])
def test_the_gates_of_this_project_are_valid_and_say_why(path: str) -> None:
    gates = load_gates(ROOT / path, RUNS)
    assert all(gate.why and gate.name for gate in gates.gates)
    assert {"clean", "backdoor", "backdoor-vn"} <= {one.run for one in gates.checks(RUNS)}
