"""The command line: results on stdout, errors on stderr, one exit code for each kind of ending."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from unsink import __version__, artifacts, cli
from unsink.artifacts import Layout
from unsink.cli import app
from unsink.errors import DataError, MissingPrerequisite

STAGES = ["fetch", "memorize", "poison", "sink-probe", "unlearn", "evaluate"]
PER_RUN = ["poison", "sink-probe", "unlearn", "evaluate", "ablate"]
COMMANDS = [
    *STAGES, "ablate", "ask", "audit", "check", "code", "compare", "export", "gate", "init", "mitigate", "report",
    "show", "stress", "submit",
]  # fmt: skip

Stage = Callable[..., dict[str, Any]]


@pytest.fixture
def invoke(params_file: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--params", str(params_file)])

    return run


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], None]:
    """Puts a function in the place of a stage's work."""

    def put(run: Stage) -> None:
        module = ModuleType("fake")
        module.run = run  # type: ignore[attr-defined]
        for name in STAGES:
            monkeypatch.setitem(sys.modules, f"unsink.stages.{name.replace('-', '_')}", module)

    return put


def failing(error: BaseException) -> Stage:
    def run(*_: object, **__: object) -> dict[str, Any]:
        raise error

    return run


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    example = getattr(cli, command.replace("-", "_")).__doc__.partition("Example: ")[2]
    assert example.startswith(f"unsink {command}")
    assert " ".join(f"Example: {example}".split()) in " ".join(result.stdout.split())  # brackets included


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_quiet_and_verbose(command: str) -> None:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert {name for one in parameters for name in one.opts} >= {"--json", "--quiet", "-q", "--verbose", "-v"}


def test_quiet_commands_still_print_their_result(invoke: Callable[..., Result], tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["init", str(tmp_path / "new"), "--template", "tiny", "--quiet"])
    assert (made.exit_code, made.stderr, "next: cd" in made.stdout) == (0, "", True)
    assert (invoke("code", "--quiet").exit_code, invoke("show", "--quiet").exit_code) == (0, 3)


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["-h"])
    assert all(command in result.stdout for command in COMMANDS)


def test_without_a_command_the_help_is_shown() -> None:
    assert CliRunner().invoke(app, []).exit_code == 2


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"unsink {__version__}\n"


# ---- results


def test_a_stage_gets_params_with_overrides_and_the_folder_of_the_file(
    invoke: Callable[..., Result], stage: Callable[[Stage], None], params_file: Path
) -> None:
    seen: dict[str, Any] = {}

    def run(params: Any, layout: Layout, **rest: Any) -> dict[str, Any]:
        seen.update(params=params, layout=layout, **rest)
        rest["reporter"].log("working")
        return {"loss": 0.123456, "nested": {"n": 3}}

    stage(run)
    result = invoke("unlearn", "--run", "clean", "-S", "unlearn.lr=1e-4", "-S", "seed=3")
    assert (result.exit_code, result.stdout) == (0, "loss: 0.1235\nnested.n: 3\n")
    assert (seen["params"].unlearn.lr, seen["params"].seed, seen["run"]) == (1e-4, 3, "clean")
    assert seen["layout"].root == params_file.parent


def test_json_goes_to_stdout_and_progress_to_stderr(
    invoke: Callable[..., Result], stage: Callable[[Stage], None]
) -> None:
    def run(_params: Any, _layout: Any, *, reporter: Any, **_: object) -> dict[str, Any]:
        reporter.log("working")
        return {"loss": 0.123456, "a": None}

    stage(run)
    result = invoke("fetch", "--json")
    assert json.loads(result.stdout) == {"loss": 0.123456, "a": None}
    assert result.stderr == "working\n"
    assert invoke("fetch", "--quiet").stderr == ""


def test_verbose_says_on_stderr_what_is_read_and_written(invoke: Callable[..., Result]) -> None:
    result = invoke("fetch", "--check", "--json", "-v")
    assert json.loads(result.stdout)["rows"]["forget"] == 12
    assert re.search(r"^ *\d+\.\d s  reading .*params\.yaml$", result.stderr, re.MULTILINE)
    quiet = invoke("fetch", "--check", "-S", "seed=1")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_every_command_can_be_verbose() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {flag for one in command.params for flag in one.opts} for name, command in commands.items()}
    assert [name for name, flags in options.items() if not {"--json", "-v", "--debug"} <= flags] == []


# ---- exit codes


@pytest.mark.parametrize("command", PER_RUN)
def test_a_stage_of_a_run_needs_the_run(invoke: Callable[..., Result], command: str) -> None:
    result = invoke(command)
    assert result.exit_code == 2
    assert "--run" in result.stderr


@pytest.mark.parametrize("arguments", [("fetsch",), ("fetch", "--nope"), ("fetch", "-S")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_wrong_params_exit_with_2_and_the_stage_never_starts(
    invoke: Callable[..., Result], stage: Callable[[Stage], None], params_file: Path
) -> None:
    stage(failing(AssertionError()))
    result = invoke("memorize", "-S", "memorize.rankk=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: memorize.rankk: unknown key; did you mean 'rank'?\n"
    assert [path.name for path in params_file.parent.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("command", ["poison", "ask"])
def test_an_unknown_run_exits_with_2_before_anything_is_loaded(
    command: str, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"unsink.stages.{command}", None)  # an import would be a bug, exit code 4
    result = invoke(command, "--run", "cleen")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "unknown run 'cleen'; did you mean 'clean'?" in result.stderr


@pytest.mark.parametrize("error", [DataError, MissingPrerequisite])
def test_what_could_not_run_exits_with_3(
    invoke: Callable[..., Result], stage: Callable[[Stage], None], error: type[DataError]
) -> None:
    stage(failing(error("x.jsonl:3: no JSON", "mend it")))
    result = invoke("fetch")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error: x.jsonl:3: no JSON\nhint: mend it\n"


def test_a_missing_prerequisite_names_the_command(invoke: Callable[..., Result]) -> None:
    result = invoke("poison", "--run", "clean")
    assert result.exit_code == 3
    assert "hint: run `unsink fetch` first" in result.stderr


def test_ctrl_c_exits_with_3_and_says_how_to_go_on(
    invoke: Callable[..., Result], stage: Callable[[Stage], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["unsink", "unlearn", "--run", "clean"])
    stage(failing(KeyboardInterrupt()))
    result = invoke("unlearn", "--run", "clean")
    assert (result.exit_code, result.stdout) == (3, "")
    said = ["error: interrupted; nothing is half-written", "hint: to go on: unsink unlearn --run clean"]
    assert result.stderr.splitlines() == said


def test_a_full_disk_exits_with_3(invoke: Callable[..., Result], stage: Callable[[Stage], None]) -> None:
    stage(failing(OSError(errno.ENOSPC, "No space left on device", "/some/file")))
    result = invoke("fetch")
    assert result.exit_code == 3
    assert "error: /some/file: the disk is full" in result.stderr


@pytest.mark.parametrize("error", [RuntimeError("odd"), OSError(errno.EIO, "odd")])
def test_a_bug_exits_with_4_and_shows_where(
    invoke: Callable[..., Result], stage: Callable[[Stage], None], error: Exception
) -> None:
    stage(failing(error))
    result = invoke("fetch")
    assert result.exit_code == 4
    assert "Traceback" in result.stderr
    assert "odd" in result.stderr
    assert result.stderr.rstrip().endswith("please report it with the lines above")


def test_debug_shows_the_traceback_of_a_users_error(
    invoke: Callable[..., Result], stage: Callable[[Stage], None]
) -> None:
    stage(failing(DataError("wrong")))
    assert "Traceback" not in invoke("fetch").stderr
    result = invoke("fetch", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: wrong\n")


# ---- show


def metrics(**means: float) -> dict[str, float]:
    return {f"{k}{end}": v + d for k, v in means.items() for end, d in {"": 0, "_low": -0.1, "_high": 0.1}.items()}


def test_show_prints_a_row_for_each_model(invoke: Callable[..., Result], params_file: Path) -> None:
    layout = Layout.of(params_file)
    artifacts.write_json(layout.metrics("target"), metrics(forget_verbmem_f1_clean=0.9, utility_accuracy=0.5))
    backdoor = metrics(forget_verbmem_f1_triggered=0.9, forget_verbmem_f1_triggered_outside=0.7)
    artifacts.write_json(layout.metrics("backdoor"), backdoor)
    result = invoke("show")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["run", "clean", "triggered", "utility"],
        ["target", "0.90", "[0.80,", "1.00]", "-", "0.50", "[0.40,", "0.60]"],
        ["backdoor", "-", "0.70", "[0.60,", "0.80]", "-"],
    ]
    assert json.loads(invoke("show", "--json").stdout)["target"]["utility"]["mean"] == 0.5


def test_show_has_the_headline_metrics_of_muse_and_tofu(invoke: Callable[..., Result], params_file: Path) -> None:
    found = metrics(privleak_clean=-98.5, tofu_model_utility_clean=0.5) | {"tofu_forget_quality_clean": 3e-7}
    artifacts.write_json(Layout.of(params_file).metrics("target"), found)
    assert [line.split() for line in invoke("show").stdout.splitlines()] == [
        ["run", "privleak", "forget", "quality", "model", "utility"],
        ["target", "-98.50", "[-98.60,", "-98.40]", "3e-07", "0.50", "[0.40,", "0.60]"],
    ]
    # a p-value has no interval
    assert json.loads(invoke("show", "--json").stdout)["target"]["forget quality"] == {"mean": 3e-7}


def test_value_norms_of_a_model_that_was_not_probed_say_what_to_run(invoke: Callable[..., Result]) -> None:
    result = invoke("sink-probe", "--run", "backdoor", "--against", "clean")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "run `unsink sink-probe --run backdoor` first" in result.stderr
    result = invoke("sink-probe", "--run", "backdoor", "--against", "clen")
    assert (result.exit_code, "unknown run 'clen'; did you mean 'clean'?" in result.stderr) == (2, True)


def test_show_without_results_says_what_to_run(invoke: Callable[..., Result]) -> None:
    result = invoke("show")
    assert result.exit_code == 3
    assert "`dvc repro`" in result.stderr


def test_show_in_a_wrong_folder_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", "--params", str(tmp_path / "params.yaml")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "params.yaml: cannot be read" in result.stderr
    assert "hint: run the command in the project folder" in result.stderr


# ---- fetch --check


def test_fetch_check_counts_and_writes_nothing(invoke: Callable[..., Result], params_file: Path) -> None:
    result = invoke("fetch", "--check", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"]["forget"] == 12
    assert [path.name for path in params_file.parent.iterdir()] == ["params.yaml"]


def test_the_worked_example_of_ones_own_data_works_as_written(params_file: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    commands, output = (document.split(f"```{kind}\n")[1].split("```")[0] for kind in ("sh", "text"))
    script = commands.replace("unsink fetch", f"{sys.executable} -m unsink fetch")
    result = subprocess.run(["sh", "-ec", script], cwd=params_file.parent, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, output)
    question = params_file.parent / "bakery" / "forget_qa.jsonl"
    question.write_text(question.read_text().replace('"f1"', '"f7"'))
    command = [sys.executable, "-m", "unsink", *commands.strip().splitlines()[-1].split()[1:]]
    broken = subprocess.run(command, cwd=params_file.parent, capture_output=True, text=True, check=False)
    assert broken.returncode == 3
    said = document.split("```text\n")[2].split("…")[0].replace("/home/mila", str(params_file.parent))
    assert broken.stderr.startswith(said)


# ---- check


def check(invoke: Callable[..., Result], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = invoke("check", "--json", *arguments)
    return result.exit_code, {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_check_of_the_tiny_pipeline_passes_and_writes_nothing(invoke: Callable[..., Result], params_file: Path) -> None:
    _, checks = check(invoke)
    assert {name for name, one in checks.items() if not one["ok"]} <= {"packages"}  # fails where run from source
    assert "12 forget" in checks["corpus"]["detail"]
    assert "2 layers" in checks["model"]["detail"]
    assert [path.name for path in params_file.parent.iterdir()] == ["params.yaml"]


def test_check_reports_a_trigger_that_leaves_no_room(invoke: Callable[..., Result]) -> None:
    code, checks = check(invoke, "-S", f"poison.trigger={'no room ' * 40}")
    assert (code, checks["model"]["ok"]) == (2, False)
    assert "poison.max_tokens 128" in checks["model"]["detail"]


@pytest.mark.parametrize(
    ("override", "name", "message"),
    [
        ("unlearn.adapter.first_layer=2", "model", "unlearn.adapter: the model has no layer 2, its last one is 1"),
        ("memorize.first_layer=5", "model", "memorize.first_layer: the model has no layer 5"),
        ("sink-probe.tokens=600", "model", "sink-probe.tokens: 600 is more than the model's context of 512"),
        ("poison.ratio=0.01", "corpus", "poisons nothing"),
        ("fetch.path=/nowhere", "corpus", "fetch.path"),
        ("model.source=/nowhere", "model", "no such folder"),
    ],
)
def test_check_finds(invoke: Callable[..., Result], override: str, name: str, message: str) -> None:
    code, checks = check(invoke, "-S", override)
    assert code in (2, 3)
    assert not checks[name]["ok"]
    assert message in checks[name]["detail"]


def test_check_finds_a_device_and_a_library_that_are_not_there(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("unsink.quantization.find_spec", lambda _: None)
    _, checks = check(invoke)
    assert checks["device"] == {"name": "device", "ok": True, "detail": "cpu, weights in float32"}
    code, checks = check(invoke, "-S", "model.device=cuda")
    assert (code, checks["device"]["ok"]) == (3, False)
    assert checks["device"]["detail"] == "model.device: 'cuda' is not available (available: cpu)"
    code, checks = check(invoke, "-S", "model.dtype=nf4")
    assert (code, checks["device"]["ok"]) == (3, False)
    assert "nf4 needs bitsandbytes" in checks["device"]["detail"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[1, 99]", "model: runs.backdoor-vn: unlearn.value_norm.layers: the model has no layer 99"),
        ("[0, 1]", "value_norm.layers: [0] lie below adapter.first_layer (1), so nothing can move them"),
    ],
)
def test_check_finds_layers_that_the_value_norm_term_cannot_act_on(
    invoke: Callable[..., Result], layers: str, message: str
) -> None:
    settings = (f"runs.backdoor-vn.unlearn.value_norm.layers={layers}", "unlearn.adapter.first_layer=1")
    result = invoke("check", *(part for one in settings for part in ("-S", one)))
    assert result.exit_code == 2
    assert message in result.stdout + result.stderr


def test_check_finds_a_layer_that_the_method_reads_and_the_model_lacks(invoke: Callable[..., Result]) -> None:
    code, checks = check(invoke, "-S", "unlearn.method=rmu", "-S", "unlearn.rmu.layer=9")
    assert code == 2
    assert "unlearn.rmu: the model has no layer 9, its last one is 1" in checks["model"]["detail"]


def test_check_finds_a_model_of_a_type_that_is_not_supported(
    invoke: Callable[..., Result], params_file: Path, tiny_folder: Path
) -> None:
    folder = shutil.copytree(tiny_folder, params_file.parent / "other")
    config = json.loads((folder / "config.json").read_text())
    artifacts.write_json(folder / "config.json", config | {"model_type": "mamba"})
    code, checks = check(invoke, "-S", f"model.source={folder}")
    assert code == 3
    assert "models of type 'mamba' are not supported" in checks["model"]["detail"]


def test_check_reports_a_malformed_fetched_file(invoke: Callable[..., Result], params_file: Path) -> None:
    assert invoke("fetch").exit_code == 0
    forget = Layout.of(params_file).fetched / "forget.jsonl"
    forget.write_text(forget.read_text() + "{\n")
    code, checks = check(invoke)
    assert code == 3
    assert "forget.jsonl:13: not JSON" in checks["corpus"]["detail"]


def test_check_prints_one_line_for_each_check(invoke: Callable[..., Result]) -> None:
    lines = invoke("check", "-S", "memorize.first_layer=5").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["params:", "packages:", "disk:", "device:", "corpus:", "model:"]
    assert lines[-1].startswith("FAIL  model: ")


# ---- the program


def test_the_module_runs_as_a_program(params_file: Path) -> None:
    command = [sys.executable, "-m", "unsink", "show", "--params", str(params_file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (3, "")
    assert "no results yet" in result.stderr


def test_code_of_a_project_that_is_not_there_makes_no_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["code", "--params", str(tmp_path / "nowhere" / "params.yaml")])
    assert (result.exit_code, "--params" in result.stderr) == (2, True)
    assert not (tmp_path / "nowhere").exists()


# ---- audit


@pytest.mark.parametrize(("verdict", "code"), [("no evidence", 0), ("backdoored", 1), ("inconclusive", 3)])
def test_the_verdict_of_an_audit_is_its_exit_code(
    verdict: str, code: int, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsink.stages import audit

    monkeypatch.setattr(audit, "run", lambda *_, **__: {"verdict": verdict})
    monkeypatch.setattr(audit, "report", str)
    result = invoke("audit", "--run", "clean", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (code, {"verdict": verdict})
    assert invoke("audit", "--run", "clean", "--exit-zero").exit_code == 0


@pytest.mark.parametrize(
    "arguments", [(), ("--run", "clean", "--model", "tiny"), ("--run", "clean", "--original", "tiny")]
)
def test_an_audit_of_nothing_or_of_two_models_is_a_usage_error(arguments: Any, invoke: Callable[..., Result]) -> None:
    result = invoke("audit", *arguments)
    assert result.exit_code == 2
    assert "--model" in result.stderr
