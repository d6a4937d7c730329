"""`unsink gate` through the command line: it fails when it must, says why, and passes otherwise. No model is needed."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner, Result

from results import evaluated
from unsink import artifacts
from unsink.artifacts import Layout
from unsink.cli import app

METRIC = "forget_verbmem_f1_clean"
SCORES = [0.0, 0.2] * 12  # mean 0.1, interval about 0.06 to 0.14
REGRESSION = {"run": "clean", "metric": METRIC, "direction": "lower", "max_regression": 0.05}

Gate = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this project run in CI, where there is a summary to write to."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def params_file(params_file: Path) -> Path:
    """The tiny params file in a folder below the test's own, which may become a git repository around it."""
    folder = params_file.parent / "project"
    folder.mkdir()
    return params_file.rename(folder / "params.yaml")


@pytest.fixture
def project(params_file: Path) -> Path:
    """A project whose run `clean` was evaluated."""
    evaluated(params_file.parent, "clean", SCORES)
    return params_file.parent


@pytest.fixture
def baseline(project: Path) -> Path:
    """The same run, elsewhere and earlier."""
    evaluated(project / "before", "clean", SCORES)
    return project / "before"


@pytest.fixture
def gate(project: Path) -> Gate:
    """Runs the command on gates written as Python values."""

    def run(gates: Any, *arguments: str, **rest: Any) -> Result:
        (project / "gates.yaml").write_text(yaml.safe_dump({"gates": gates, **rest}))
        return CliRunner().invoke(app, ["gate", "--quiet", "--params", str(project / "params.yaml"), *arguments])

    return run


def bound(**limits: Any) -> list[dict[str, Any]]:
    return [{"run": "clean", "metric": METRIC, **limits}]


def outcomes(result: Result) -> list[str]:
    return [row["outcome"] for row in json.loads(result.stdout)["checks"]]


# ---- pass, fail, undecided


def test_a_bound_that_is_kept_passes(gate: Gate) -> None:
    result = gate(bound(min=0.01, max=0.2))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "passed: 2 pass"


@pytest.mark.parametrize(
    ("limits", "outcome", "code"),
    [
        ({"max": 0.05}, "FAIL", 1),
        ({"min": 0.15}, "FAIL", 1),
        ({"max": 0.1}, "UNDECIDED", 1),
        ({"min": 0.1}, "UNDECIDED", 1),
        ({"max": 0.1, "undecided": "warn"}, "undecided (warning)", 0),
        ({"max": 0.05, "undecided": "warn"}, "FAIL", 1),
        ({"max": 0.05, "soft": True}, "fail (soft)", 0),
        ({"max": 0.05, "by": "mean"}, "FAIL", 1),
        ({"max": 0.11, "by": "mean"}, "pass", 0),
    ],
)
def test_bounds(limits: dict[str, Any], outcome: str, code: int, gate: Gate) -> None:
    result = gate([{**bound(**limits)[0], "why": "because"}])
    assert result.exit_code == code
    assert result.stdout.splitlines()[1].startswith(outcome)
    assert ("why: because" in result.stdout) == (outcome != "pass")


@pytest.mark.parametrize(
    ("scores", "limits", "outcome", "detail"),
    [
        ([0.0], {"max": 0.15}, "undecided", "too few samples: 1, where at least 8"),
        ([1.0] * 7, {"max": 0.15}, "undecided", "too few samples: 7, where at least 8"),
        ([1.0] * 12, {"min": 0.74}, "undecided", "all 12 samples are alike, others need not be; 13 alike would decide"),
        ([1.0] * 12, {"min": 0.735}, "pass", ""),  # the exact interval is [0.7354, 1]
        ([1.0] * 12, {"max": 0.73}, "fail", ""),
        ([0.0] * 12, {"max": 0.26}, "undecided", "13 alike would decide it"),
        ([0.0] * 12, {"max": 0.265}, "pass", ""),
        ([0.0] * 24, {"max": 0.0}, "undecided", "no number of them decides it"),
        ([0.0] * 24, {"max": 0.0, "by": "mean"}, "pass", ""),
        ([1.0] * 24, {"min": 1.0, "by": "mean"}, "pass", ""),
        ([0.0], {"max": 0.15, "by": "mean"}, "pass", ""),
    ],
)
def test_an_interval_without_width_is_no_certainty(
    scores: list[float], limits: dict[str, Any], outcome: str, detail: str, gate: Gate, project: Path
) -> None:
    evaluated(project, "clean", scores)
    row = json.loads(gate(bound(**limits), "--json").stdout)["checks"][0]
    assert row["outcome"] == outcome
    assert detail in row["detail"]
    assert bool(detail) == bool(row["detail"])


def test_one_failure_among_many_fails(gate: Gate) -> None:
    result = gate([*bound(max=0.2), *bound(max=0.05), *bound(min=0.0)], "--json")
    assert (result.exit_code, outcomes(result)) == (1, ["pass", "fail", "pass"])


def test_a_failure_goes_before_what_could_not_be_evaluated(gate: Gate) -> None:
    result = gate([{"run": "target", "metric": METRIC, "max": 1}, *bound(max=0.05)], "--json")
    assert (result.exit_code, outcomes(result)) == (1, ["error", "fail"])


def test_undecided_can_be_set_for_the_whole_file(gate: Gate) -> None:
    assert gate(bound(max=0.1), undecided="warn").exit_code == 0
    assert gate(bound(max=0.1, undecided="fail"), undecided="warn").exit_code == 1


# ---- what cannot be evaluated: exit code 3


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file of JSON, to what no JSON writer of ours would write."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


NAN = float("nan")
BROKEN: dict[str, tuple[Callable[[Layout], Any], str]] = {
    "no file": (lambda at: at.metrics("clean").unlink(), "metrics/clean.json: not found; run `unsink evaluate"),
    "no metric": (
        lambda at: rewrite(at.metrics("clean"), lambda _: {"forget_verbmem_f1_cleen": 1.0}),
        "no metric 'forget_verbmem_f1_clean'; did you mean 'forget_verbmem_f1_cleen'?",
    ),
    "no interval": (
        lambda at: rewrite(at.metrics("clean"), lambda m: {METRIC: m[METRIC]}),
        "has no interval; `by: mean` compares the number alone",
    ),
    "nan": (lambda at: rewrite(at.metrics("clean"), lambda m: {**m, METRIC: NAN}), "not finite numbers"),
    "infinite end": (
        lambda at: rewrite(at.metrics("clean"), lambda m: {**m, f"{METRIC}_high": float("inf")}),
        "not finite numbers",
    ),
    "too large": (lambda at: rewrite(at.metrics("clean"), lambda m: {**m, METRIC: 10**400}), "not finite numbers"),
    "no interval at all": (
        lambda at: rewrite(at.metrics("clean"), lambda m: {**m, f"{METRIC}_low": 0.9}),
        "the interval ends (0.1",
    ),
    "text": (lambda at: rewrite(at.metrics("clean"), lambda m: {**m, METRIC: "low"}), "not a metrics file"),
    "null": (lambda at: rewrite(at.metrics("clean"), lambda m: {**m, METRIC: None}), "not a metrics file"),
    "a list": (lambda at: at.metrics("clean").write_text("[]"), "not a metrics file"),
    "cut off": (lambda at: at.metrics("clean").write_text('{"a": 1,'), "metrics/clean.json:1: not JSON"),
    "empty": (lambda at: at.metrics("clean").write_text(""), "metrics/clean.json:1: not JSON"),
    "no text": (lambda at: at.metrics("clean").write_bytes(b"\xff\xfe\xff"), "not UTF-8 text"),
    "undefined": (
        lambda at: (
            at.metrics("clean").write_text("{}"),
            rewrite(at.settings("clean"), lambda s: {**s, "undefined": {METRIC: "nothing was asked"}}),
        ),
        "is undefined: nothing was asked",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_number_that_is_not_there_is_no_pass(case: str, gate: Gate, project: Path) -> None:
    breaks, message = BROKEN[case]
    assert gate(bound(max=0.5)).exit_code == 0
    breaks(Layout(project))
    result = gate(bound(max=0.5))
    assert (result.exit_code, result.stderr) == (3, "")
    assert result.stdout.splitlines()[1].startswith("ERROR")
    assert message in result.stdout
    assert str(project) not in result.stdout
    assert gate(bound(max=0.5, soft=True)).exit_code == 0  # reported, and no more


def test_settings_that_the_file_asks_for(gate: Gate, project: Path) -> None:
    assert gate(bound(max=0.5), settings={"dialect": "muse", "seed": 0}).exit_code == 0
    result = gate(bound(max=0.5), settings={"dialect": "open-unlearning", "seed": 0})
    assert result.exit_code == 3
    assert "settings/clean.json: made with dialect 'muse', not 'open-unlearning'" in result.stdout
    Layout(project).settings("clean").unlink()
    result = gate(bound(max=0.5), settings={"dialect": "muse"})
    assert result.exit_code == 3
    assert "settings/clean.json: not found, so nobody knows how the numbers were made" in result.stdout


def test_numbers_that_the_predictions_do_not_give(gate: Gate, project: Path) -> None:
    evaluated(project, "clean", [1.0] * 24)
    forged = {METRIC: 0.05, f"{METRIC}_low": 0.0, f"{METRIC}_high": 0.1}
    rewrite(Layout(project).metrics("clean"), lambda found: {**found, **forged})
    for limits in ({"max": 0.2}, {"min": 0.0}, {"max": 0.2, "by": "mean"}):
        result = gate(bound(**limits))
        assert result.exit_code == 3
        assert "the predictions do not give the numbers of the metrics file, but 1" in result.stdout
    Layout(project).predictions("clean").unlink()  # such as in a clone without DVC's cache
    assert gate(bound(max=0.2)).exit_code == 0


# ---- regressions


def worse(project: Path, by: float) -> None:
    evaluated(project, "clean", [score + by for score in SCORES])


@pytest.mark.parametrize(("by", "outcome", "code"), [(0.0, "pass", 0), (0.04, "pass", 0), (0.06, "fail", 1)])
def test_a_regression_is_paired_by_prompt(
    by: float, outcome: str, code: int, gate: Gate, project: Path, baseline: Path
) -> None:
    worse(project, by)
    result = gate([REGRESSION], "--baseline", str(baseline), "--json")
    row = json.loads(result.stdout)["checks"][0]
    assert (result.exit_code, row["outcome"]) == (code, outcome)
    # every prompt became worse by the same, which has no width, though the interval of each side has
    assert [row["value"][part] for part in ("mean", "low", "high")] == pytest.approx([by, by, by])
    assert "paired by prompt" in row["detail"]


def test_few_prompts_tell_no_regression(gate: Gate, project: Path, baseline: Path) -> None:
    for folder in (project, baseline):
        evaluated(folder, "clean", SCORES[:7])
    result = gate([REGRESSION], "--baseline", str(baseline))
    assert result.exit_code == 1
    assert "paired by prompt; too few samples: 7, where at least 8" in result.stdout


def test_what_became_better_is_no_regression(gate: Gate, project: Path, baseline: Path) -> None:
    worse(project, 0.3)
    higher = {**REGRESSION, "direction": "higher", "max_regression": 0}
    assert gate([higher], "--baseline", str(baseline)).exit_code == 0
    assert gate([REGRESSION], "--baseline", str(baseline)).exit_code == 1


def test_without_predictions_the_intervals_have_to_do(gate: Gate, project: Path, baseline: Path) -> None:
    Layout(baseline).predictions("clean").unlink()
    result = gate([{**REGRESSION, "max_regression": 0.2}], "--baseline", str(baseline), "--json")
    row = json.loads(result.stdout)["checks"][0]
    assert (result.exit_code, row["outcome"]) == (0, "pass")
    assert row["value"]["low"] < 0 < row["value"]["high"]
    assert "from the two intervals" in row["detail"]
    assert gate([{**REGRESSION, "max_regression": 0.01}], "--baseline", str(baseline)).exit_code == 1  # undecided


def test_another_run_may_be_the_baseline(gate: Gate, project: Path) -> None:
    evaluated(project, "target", [score + 0.3 for score in SCORES])
    against = {**REGRESSION, "against": "target"}
    assert gate([against]).exit_code == 0
    result = gate([{**against, "direction": "higher"}])
    assert result.exit_code == 1
    assert "0.1 now, 0.4 in target" in result.stdout


@pytest.mark.parametrize("named", ["before", "before/metrics", "before/metrics/clean.json"])
def test_a_baseline_is_a_folder_or_a_file(
    named: str, gate: Gate, project: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert gate([REGRESSION], "--baseline", named).exit_code == 0
    worse(project, 0.06)
    assert gate([REGRESSION], "--baseline", named).exit_code == 1


OTHER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "seed": (lambda at: evaluated(at, "clean", SCORES, seed=1), "seed 0 now, 1 before"),
    "dialect": (
        lambda at: evaluated(at, "clean", SCORES, dialect="open-unlearning"),
        "dialect 'muse' now, 'open-unlearning' before",
    ),
    "corpus": (lambda at: evaluated(at, "clean", SCORES, corpus="x"), "corpus None now, 'x' before"),
    "unknown setting": (lambda at: evaluated(at, "clean", SCORES, new=1), "new None now, 1 before"),
    "number of prompts": (lambda at: evaluated(at, "clean", SCORES[2:]), "24 prompts now, 22 in before/metrics"),
    "prompts": (
        lambda at: (
            Layout(at)
            .predictions("clean")
            .write_text(Layout(at).predictions("clean").read_text().replace('"id": "p3"', '"id": "q3"'))
        ),
        "other prompts were asked in before/metrics/clean.json",
    ),
    "predictions": (
        lambda at: (
            Layout(at)
            .predictions("clean")
            .write_text(Layout(at).predictions("clean").read_text().replace('"f1": 0.2', '"f1": 0.1'))
        ),
        "the predictions do not give the numbers of the metrics files",
    ),
    "rows": (lambda at: Layout(at).predictions("clean").write_text('{"id": 1}\n'), "not of this version"),
    "settings missing": (lambda at: Layout(at).settings("clean").unlink(), "before/settings/clean.json: not found"),
    "settings broken": (lambda at: Layout(at).settings("clean").write_text("[]"), "not a settings file"),
    "metrics missing": (lambda at: Layout(at).metrics("clean").unlink(), "before/metrics/clean.json: not found"),
    "metrics broken": (lambda at: Layout(at).metrics("clean").write_text("{"), "before/metrics/clean.json:1: not JSON"),
    "nan": (lambda at: rewrite(Layout(at).metrics("clean"), lambda m: {**m, METRIC: NAN}), "not finite numbers"),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_not_comparable_is_not_compared(case: str, gate: Gate, project: Path, baseline: Path) -> None:
    change, message = OTHER[case]
    assert gate([REGRESSION], "--baseline", str(baseline)).exit_code == 0
    change(baseline)
    result = gate([REGRESSION], "--baseline", str(baseline))
    assert (result.exit_code, result.stderr) == (3, "")
    assert message in result.stdout
    assert str(project) not in result.stdout


def test_a_setting_may_be_allowed_to_differ(gate: Gate, baseline: Path) -> None:
    evaluated(baseline, "clean", SCORES, seed=1)
    assert gate([{**REGRESSION, "allow": ["seed"]}], "--baseline", str(baseline)).exit_code == 0


def test_a_setting_that_cannot_move_the_metric_does_not_matter(gate: Gate, baseline: Path) -> None:
    evaluated(baseline, "clean", SCORES, few_shot=0)  # examples stand before questions only
    assert gate([REGRESSION], "--baseline", str(baseline)).exit_code == 0


def test_a_regression_without_a_baseline_is_not_evaluated(gate: Gate) -> None:
    result = gate([REGRESSION, *bound(max=0.2)], "--json")
    assert (result.exit_code, outcomes(result)) == (3, ["error", "pass"])
    assert "name one with --baseline" in result.stdout


def test_a_file_is_the_baseline_of_its_run_alone(gate: Gate, project: Path, baseline: Path) -> None:
    evaluated(project, "backdoor", SCORES)
    result = gate([{**REGRESSION, "run": "backdoor"}], "--baseline", str(baseline / "metrics" / "clean.json"))
    assert result.exit_code == 3
    assert "the baseline is a file of 'clean' alone" in result.stdout


def test_a_folder_without_results_is_no_baseline(gate: Gate, project: Path) -> None:
    (project / "empty").mkdir()
    result = gate([REGRESSION], "--baseline", str(project / "empty"))
    assert result.exit_code == 3
    assert "no project folder, it has no metrics/ in it" in result.stdout


# ---- git


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def committed(project: Path) -> Path:
    """The project with what git keeps of it, which are no predictions."""
    git(project, "init", "--quiet", "--initial-branch=main")
    git(project, "add", "metrics", "settings")
    git(project, "commit", "--quiet", "-m", "results")
    return project


def test_a_git_revision_is_a_baseline(gate: Gate, committed: Path) -> None:
    worse(committed, 0.2)
    result = gate([REGRESSION], "--baseline", "main")
    assert result.exit_code == 1
    assert "0.3 now, 0.1 before; from the two intervals" in result.stdout
    git(committed, "add", "--force", "metrics", "settings", "predictions")
    git(committed, "commit", "--quiet", "-m", "worse, with predictions")
    result = gate([REGRESSION], "--baseline", "main")
    assert result.exit_code == 0
    assert gate([REGRESSION], "--baseline", "HEAD~1").exit_code == 1


def test_the_project_may_be_a_part_of_the_repository(gate: Gate, project: Path) -> None:
    git(project.parent, "init", "--quiet")
    git(project.parent, "add", f"{project.name}/metrics", f"{project.name}/settings")
    git(project.parent, "commit", "--quiet", "-m", "results")
    assert gate([{**REGRESSION, "max_regression": 0.2}], "--baseline", "HEAD").exit_code == 0


def test_a_revision_without_the_run_is_no_baseline(gate: Gate, committed: Path) -> None:
    evaluated(committed, "backdoor", SCORES)
    result = gate([{**REGRESSION, "run": "backdoor"}], "--baseline", "main")
    assert result.exit_code == 3
    assert "main:metrics/backdoor.json: not found" in result.stdout


@pytest.mark.parametrize("revision", ["mian", "0000000", "--help", "HEAD:metrics", ""])
def test_an_unknown_revision_is_no_baseline(revision: str, gate: Gate, committed: Path) -> None:
    result = gate([REGRESSION], f"--baseline={revision}")
    assert result.exit_code == 3
    if revision == "mian":
        assert "'mian' is no file, no folder and no git revision; did you mean 'main'?" in result.stdout


def test_without_git_there_is_no_revision(gate: Gate, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    result = gate([REGRESSION], "--baseline", "main")
    assert result.exit_code == 3
    assert "'main' is no file or folder, and no revision: the project is not in git" in result.stdout
    monkeypatch.setenv("PATH", str(project))
    result = gate([REGRESSION], "--baseline", "main")
    assert result.exit_code == 3
    assert "git is not installed" in result.stdout


# ---- audits


def audited(project: Path, **verdict: Any) -> None:
    artifacts.write_json(Layout(project).audit("clean") / "verdict.json", verdict)


@pytest.mark.parametrize(("verdict", "code"), [("no evidence", 0), ("inconclusive", 1), ("backdoored", 1)])
def test_the_verdict_of_an_audit(verdict: str, code: int, gate: Gate, project: Path) -> None:
    audited(project, verdict=verdict)
    result = gate([{"run": "clean", "verdict": ["no evidence"]}])
    assert result.exit_code == code
    assert verdict in result.stdout


@pytest.fixture
def weights(project: Path) -> str:
    """An adapter of the run `clean`; what an audit of it calls its weights."""
    folder = Layout(project).adapter("clean")
    config = {"base_model_name_or_path": "sha256:target", "peft_type": "LORA"}
    artifacts.write_json(folder / artifacts.ADAPTER_CONFIG, config)
    artifacts.write_bytes(folder / artifacts.ADAPTER_WEIGHTS, b"weights")
    return next(artifacts.adapter_identities(folder))


def test_an_audit_of_other_weights_is_no_pass(gate: Gate, project: Path, weights: str) -> None:
    gates = [
        {"run": "clean", "verdict": ["no evidence"]},
        {"run": "clean", "metric": "audit_p", "min": 0.01, "by": "mean"},
    ]
    audited(project, verdict="no evidence", p=0.2, settings={"weights": weights})
    assert gate(gates).exit_code == 0
    artifacts.write_bytes(Layout(project).adapter("clean") / artifacts.ADAPTER_WEIGHTS, b"trained again")
    result = gate(gates)
    assert (result.exit_code, result.stdout.count("ERROR")) == (3, 2)
    assert "audits/clean/verdict.json: of other weights than adapters/clean holds now" in result.stdout
    assert "run `unsink audit --run clean` again" in result.stdout
    audited(project, verdict="no evidence")  # nobody knows of which weights
    assert gate(gates[:1]).exit_code == 3
    artifacts.write_json(Layout(project).adapter("clean") / artifacts.ADAPTER_CONFIG, [])
    result = gate(gates[:1])
    assert result.exit_code == 3
    assert "adapters/clean/adapter_config.json: not the config of an adapter of unsink" in result.stdout


def test_an_audit_of_somebody_elses_model_is_of_no_adapter_here(gate: Gate, project: Path, weights: str) -> None:
    folder = Layout(project).adapter("clean")
    folder.rename(Layout(project).adapter("theirs"))
    artifacts.write_json(Layout(project).audit("theirs") / "verdict.json", {"verdict": "no evidence"})
    assert gate([{"run": "theirs", "verdict": ["no evidence"]}]).exit_code == 0


def test_settings_of_an_audit_that_the_file_asks_for(gate: Gate, project: Path) -> None:
    gates = [{"run": "clean", "verdict": ["no evidence"]}, *bound(max=0.2)]
    wanted = {"dialect": "muse", "audit.min_recovery": 0.15, "audit.alpha": 0.01}
    audited(project, verdict="no evidence", settings={"audit": {"min_recovery": 0.15, "alpha": 0.01}})
    assert gate(gates, settings=wanted).exit_code == 0
    audited(project, verdict="no evidence", settings={"audit": {"min_recovery": 0.9, "alpha": 0.01}})
    result = gate(gates, "--json", settings=wanted)
    assert (result.exit_code, outcomes(result)) == (3, ["error", "pass"])
    assert "audits/clean/verdict.json: made with audit.min_recovery 0.9, not 0.15" in result.stdout
    audited(project, verdict="no evidence")
    assert gate(gates, settings=wanted).exit_code == 3


def test_numbers_of_an_audit(gate: Gate, project: Path) -> None:
    audited(project, verdict="no evidence", p=0.2, recovery={"mean": 0.1, "low": 0.0, "high": 0.2, "n": 20})
    p = {"run": "clean", "metric": "audit_p", "min": 0.01, "by": "mean"}
    recovery = {"run": "clean", "metric": "audit_recovery", "max": 0.25}
    assert gate([p, recovery]).exit_code == 0
    assert gate([{**p, "min": 0.5}]).exit_code == 1
    assert gate([{**recovery, "max": 0.15}]).exit_code == 1
    result = gate([{**p, "by": "interval"}])
    assert result.exit_code == 3
    assert "audits/clean/verdict.json: p has no interval" in result.stdout
    audited(project, verdict="no evidence", p=0.2, recovery=None)
    assert gate([recovery]).exit_code == 3


def test_an_audit_that_was_not_made_is_no_pass(gate: Gate, project: Path) -> None:
    result = gate([{"run": "clean", "verdict": ["no evidence"]}])
    assert result.exit_code == 3
    assert "audits/clean/verdict.json: not found; run `unsink audit --run clean` first" in result.stdout
    audited(project, verdict="innocent")
    result = gate([{"run": "clean", "verdict": ["no evidence"]}])
    assert result.exit_code == 3
    assert "not the verdict of an audit" in result.stdout


# ---- usage: exit code 2


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([], "gates: List should have at least 1 item"),
        (bound(maxx=1), "gates.0.maxx: unknown key; did you mean 'max'?"),
        (bound(max="low"), "gates.0.max: should be a valid number, got 'low'"),
        ([{"run": "cleen", "metric": METRIC, "max": 1}], "gates.0.run: unknown run 'cleen'; did you mean 'clean'?"),
    ],
)
def test_wrong_gates_exit_with_2(gates: Any, message: str, gate: Gate) -> None:
    result = gate(gates)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_usage_exits_with_2(gate: Gate, project: Path, baseline: Path) -> None:
    assert gate(bound(max=1), "--md", "--json").exit_code == 2
    unused = gate(bound(max=1), "--baseline", str(baseline))
    assert unused.exit_code == 2
    assert "no gate compares with it" in unused.stderr
    missing = gate(bound(max=1), "--gates", str(project / "none.yaml"))
    assert missing.exit_code == 2
    assert "docs/ci.md" in missing.stderr
    (project / "params.yaml").write_text("runs: []")
    assert gate(bound(max=1)).exit_code == 2


# ---- reports


def test_junit_says_what_failed(gate: Gate, project: Path) -> None:
    odd = 'a "<&>" | \x07 gate'
    gates = [
        *bound(max=0.2),
        *bound(max=0.05, name=odd, why="it matters"),
        *bound(max=0.1, undecided="warn"),
        *bound(max=0.05, soft=True),
        {"run": "target", "metric": METRIC, "max": 1},
    ]
    result = gate(gates, "--junit", str(project / "out" / "gates.xml"))
    assert result.exit_code == 1
    root = ElementTree.parse(project / "out" / "gates.xml").getroot()
    suite = root[0]
    for one in (root, suite):
        counts = {name: one.get(name) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {"tests": "5", "failures": "1", "errors": "1", "skipped": "2"}
    kinds = [[child.tag for child in case] for case in suite]
    assert kinds == [[], ["failure"], ["skipped"], ["skipped"], ["error"]]
    assert (suite[1].get("name"), suite[1].get("classname")) == ('a "<&>" | ? gate: at most 0.05', "clean")
    assert "why: it matters" in (suite[1][0].text or "")
    assert "run `unsink memorize`" not in (suite[4][0].get("message") or "")
    assert "run `unsink evaluate --run target` first" in (suite[4][0].get("message") or "")


def test_markdown_is_printed_or_appended(gate: Gate, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = project / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    result = gate(bound(max=0.05, name="a|b\n`c`"), "--md")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "### unsink gate: failed (exit code 1): 1 fail"
    assert r"| ❌ FAIL | a\|b \`c\` | clean |" in result.stdout
    assert summary.read_text() == "before\n" + result.stdout.removesuffix("\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project))  # a folder
    assert gate(bound(max=0.2)).exit_code == 3


def test_the_same_results_give_the_same_bytes(gate: Gate, project: Path, baseline: Path) -> None:
    found = {gate([REGRESSION, *bound(max=0.1)], "--baseline", str(baseline)).stdout for _ in range(2)}
    assert len(found) == 1
