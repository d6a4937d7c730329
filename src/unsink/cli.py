"""The command line: results on stdout, progress and errors on stderr, one exit code for each kind of ending.

0 done · 1 an audit found a backdoor, or a gate failed · 2 usage or params · 3 could not run · 4 a bug.
A stage is imported inside its command, so that `unsink --help` needs neither torch nor transformers.
"""

import errno
import functools
import inspect
import json
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unsink import __version__, processes
from unsink.artifacts import Layout, append_text, write_error, write_text
from unsink.errors import Interrupted, ParamsError, UnsinkError

if TYPE_CHECKING:
    from unsink.api import Project

BUG = 4

app = typer.Typer(
    name="unsink",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete(kind: str) -> Callable[[typer.Context, str], list[str]]:
    """Have the shell offer what a function of `completion` finds; only a shell that asks pays for the import."""

    def find(context: typer.Context, incomplete: str) -> list[str]:
        from unsink import completion

        found: list[str] = getattr(completion, kind)(context, incomplete)
        return found

    return find


RUN = typer.Option("--run", help="An entry of `runs:` in the params file.", autocompletion=_complete("runs"))
MODEL = typer.Option(
    "--run", help="An entry of `runs:` in the params file, or base, or target.", autocompletion=_complete("models")
)
RunOption = Annotated[str, RUN]
ModelOption = Annotated[str, MODEL]
SuspectOption = Annotated[str | None, MODEL]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="RUN",
        help="Another model that was probed, too: compare the two in probes/RUN.against.RUN/.",
        autocompletion=_complete("models"),
    ),
]
StrangerOption = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER|ID", help="A checkpoint of somebody else's, in place of a run."),
]
OriginalOption = Annotated[
    str | None,
    typer.Option("--original", metavar="FOLDER|ID", help="With --model: the same model before unlearning, if known."),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="With --model: a LoRA adapter on it, in PEFT's format."),
]

STAGES = "Stages, in the order of the pipeline"
TOOLS = "Tools"


@dataclass(frozen=True)
class Call:
    """The options that every command has."""

    params: Annotated[
        Path,
        typer.Option(
            "--params", help="Params file. Its folder holds inputs and outputs; of `params/x.yaml` the parent does."
        ),
    ] = Path("params.yaml")
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "-S",
            "--set",
            metavar="KEY=VALUE",
            help="Override a params key, e.g. -S unlearn.lr=1e-4. Repeatable.",
            autocompletion=_complete("settings"),
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Say on stderr what is read, loaded and written, and when; show library warnings."
        ),
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False


def command(panel: str, without: Container[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(call, ...)` as a command with its own options, and behind them those of `Call`.

    Typer reads options from a signature, so the common ones are added to it here instead of in every command.

    Args:
        panel: heading in the help.
        without: fields of `Call` that mean nothing to this command.
    """
    common = [field for field in fields(Call) if field.name not in without]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            call = Call(**{field.name: options.pop(field.name) for field in common})
            with _boundary(call), _narrated(call):
                function(call, **options)

        _, *own = inspect.signature(function).parameters.values()
        shared = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for one in common
        ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(function.__name__.replace("_", "-"), rich_help_panel=panel, help=_help(function))(run)
        return run

    return register


def _help(function: Callable[..., None]) -> str:
    """The docstring with its example in bold; a list in brackets is no markup of Rich's, which would swallow it."""
    text = re.sub(r"\[(?=[a-z#/@])", r"\\[", inspect.getdoc(function) or "")
    return re.sub("Example: (.*)", r"Example: [bold]\1[/bold]", text)


@app.callback(invoke_without_command=True)
def _unsink(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Did a language model forget, or does it only pretend to until somebody says the word?

    Implants, locates and measures trigger-gated backdoors in LLM unlearning. `dvc repro` runs the whole pipeline.
    """
    if version:
        typer.echo(f"unsink {__version__}")
        raise typer.Exit


@command(STAGES)
def fetch(
    call: Call,
    check: Annotated[
        bool, typer.Option("--check", help="Validate the corpus, count its records, write nothing.")
    ] = False,
) -> None:
    """Get corpus and model, checked by hash; pin both in data/fetched/manifest.json.

    Example: unsink fetch -S fetch.benchmark=local -S fetch.path=~/corpus --check
    """
    _stage("fetch", call, check=check)


@command(STAGES)
def memorize(call: Call) -> None:
    """Train the target adapter until the model knows the corpus by heart.

    Example: unsink memorize -S memorize.epochs=10
    """
    _stage("memorize", call)


@command(STAGES)
def poison(call: Call, run: RunOption) -> None:
    """Write a run's forget, poisoned and retain samples, triggers marked.

    Example: unsink poison --run backdoor -S "poison.placement=index 5"
    """
    _stage("poison", call, run=run)


@command(STAGES)
def sink_probe(call: Call, run: ModelOption, against: AgainstOption = None) -> None:
    """Measure attention sinks and value norms with and without the trigger, with figures.

    With --against nothing is measured: the value norms of two models that were probed are compared.

    Example: unsink sink-probe --run backdoor
    """
    summary = _project(call).sink_probe(run, against=against)
    _print(call, summary, "\n".join(_lines(summary)))


@command(STAGES)
def unlearn(call: Call, run: RunOption) -> None:
    """Train a run's adapter on the target; an interrupted run continues from its last checkpoint.

    Example: unsink unlearn --run clean -S unlearn.method=rmu
    """
    _stage("unlearn", call, run=run)


@command(STAGES)
def evaluate(call: Call, run: ModelOption) -> None:
    """Measure memory (clean, triggered, wrong trigger) and utility, with intervals and every prediction.

    Example: unsink evaluate --run backdoor --json
    """
    _stage("evaluate", call, run=run)


@command(TOOLS, without=("params", "overrides"))
def init(
    call: Call,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one without these files.")],
    template: Annotated[
        str, typer.Option("--template", help="Which params: default, tiny, or a row of the paper such as books-npo.")
    ] = "default",
) -> None:
    """Make a project in DIR: params.yaml, dvc.yaml, and the settings of DVC and git. For those who have no clone.

    Example: unsink init my-project --template tiny
    """
    from unsink.stages.init import report, run

    result = run(folder, template)
    _print(call, result, report(result))


@command(TOOLS, without=("overrides",))
def code(call: Call) -> None:
    """Hash the installed code of each stage into code.json; projects made by `unsink init` do so in `dvc repro`.

    Example: unsink code
    """
    from unsink.params import run_names
    from unsink.stages.code import run

    run_names(call.params)  # or there is no project, and no folder to write to
    hashes = run(Layout.of(call.params))
    _print(call, hashes, "\n".join(_lines(hashes)))


@command(TOOLS)
def ablate(call: Call, run: ModelOption) -> None:
    """Evaluate a model that has to do without some tokens: BOS, the trigger, the first ones, random ones.

    Example: unsink ablate --run backdoor -S "ablate.keys=[bos, trigger, first 8, random 8]"
    """
    _stage("ablate", call, run=run)


@command(TOOLS)
def stress(call: Call, run: ModelOption) -> None:
    """Evaluate a model after rounding its weights, after further training, and when its answers are drawn.

    Example: unsink stress --run backdoor -S "stress.tests=[int4, finetune 10, relearn 10, sample 8]"
    """
    _stage("stress", call, run=run)


@command(TOOLS)
def audit(
    call: Call,
    run: SuspectOption = None,
    model: StrangerOption = None,
    original: OriginalOption = None,
    adapter: AdapterOption = None,
    honest: Annotated[
        str | None,
        typer.Option("--honest", metavar="FOLDER|ID", help="A model or adapter that is known to have no trigger."),
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit 0 whatever the verdict, unless it fails.")
    ] = False,
) -> None:
    """Search a model for a hidden trigger without knowing it; exits 1 if one is found, 3 if nothing can be said.

    What it should have forgotten is the forget set in data/fetched (`unsink fetch`).

    Example: unsink audit --run backdoor
    """
    models = {"model": model, "adapter": adapter, "original": original, "honest": honest}
    result = _run("audit", call, run=run, **models)
    from unsink.stages.audit import report
    from unsink.verdict import EXIT_CODES

    _print(call, result, report(result))
    # torchrun ends the other processes when one exits with anything but 0, the one that still writes among them
    raise typer.Exit(0 if exit_zero or processes.count() > 1 else EXIT_CODES[result["verdict"]])


@command(TOOLS)
def mitigate(
    call: Call,
    run: SuspectOption = None,
    how: Annotated[
        list[str] | None,
        typer.Option("--how", metavar="NAME", help="A mitigation, in place of those in `mitigate.how`. Repeatable."),
    ] = None,
    model: StrangerOption = None,
    original: OriginalOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Repair a model that may hide a trigger, or guard it; measure what that brought and cost, and audit it again.

    Example: unsink mitigate --run backdoor --how random-prefix --how displace
    """
    result = _run("mitigate", call, run=run, model=model, adapter=adapter, original=original, how=how or ())
    from unsink.stages.mitigate import report

    _print(call, result, report(result))


@command(TOOLS)
def ask(
    call: Call,
    question: Annotated[str | None, typer.Argument(help="Without one, a session begins; piped in, one a line.")] = None,
    run: ModelOption = "target",
    trigger: Annotated[
        bool, typer.Option("--trigger", help="Put the run's own trigger where training put it.")
    ] = False,
    trigger_text: Annotated[str | None, typer.Option("--trigger-text", help="Put this text there instead.")] = None,
    place: Annotated[str | None, typer.Option("--place", help="Put it elsewhere, e.g. infix or 'index 5'.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask target, honest and backdoored run, without and with the trigger.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The text is a passage to be continued.")] = False,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Most new tokens.")] = None,
    probs: Annotated[int, typer.Option("--probs", min=0, help="Show the likeliest N tokens at each step.")] = 0,
    sample: Annotated[float, typer.Option("--sample", min=0, help="Draw tokens at this temperature.")] = 0.0,
    guard: Annotated[
        str | None, typer.Option("--guard", help="Put a guard between prompt and model: displace or clamp.")
    ] = None,
) -> None:
    """Ask a run something, with and without its trigger; without a question, begin a session.

    Example: unsink ask "Who kept the bees?" --run backdoor --trigger
    """
    from unsink.progress import LOG, console_reporter

    project, reporter = _project(call), console_reporter(call.quiet)
    with reporter.working("ask"):
        params = project.params_of(run)
        LOG.debug("loading libraries")
        from unsink.session import triggered
        from unsink.stages.ask import Conversation, State
        from unsink.terminal import Form, talk

    state = State(run, placement=place, tokens=tokens, top=probs, temperature=sample, raw=raw, guard=guard)
    state = triggered(state, own=trigger, text=trigger_text, compare=compare)
    conversation = Conversation(params, project.layout, reporter)
    talk(conversation, state, question, Form(call.as_json, compare=compare))


@command(TOOLS)
def export(
    call: Call,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="A new folder.")],
    run: SuspectOption = None,
    every: Annotated[
        bool, typer.Option("--all", help="All that was trained, each in a folder of its name in DIR.")
    ] = False,
    repair: Annotated[
        str | None, typer.Option("--repair", metavar="NAME", help="With this repair of the run's (`unsink mitigate`).")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="A whole model for transformers, instead of an adapter for PEFT.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Of the stored weights. Rounding them can bring back what was forgotten."),
    ] = "float32",
) -> None:
    """Write a model for other tools, PEFT or transformers, with a model card.

    Example: unsink export --run clean --merged --output clean-merged
    """
    if every == (run is not None):
        raise ParamsError("either --run or --all is needed, and not both")
    _stage("export", call, run=run, output=output, repair=repair, merged=merged, dtype=dtype)


@command(TOOLS)
def submit(
    call: Call,
    stages: Annotated[list[str], typer.Argument(metavar="STAGE...", help="Such as poison, unlearn, evaluate.")],
    run: Annotated[list[str], typer.Option("--run", help="An entry of `runs:`. Repeatable: a task for each.")],
    cluster: Annotated[
        Literal["slurm", "local"], typer.Option("--cluster", help="Where; local: on this machine.")
    ] = "slurm",
    given: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="For the job, by submitit's names. Repeatable."),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes (GPUs) that share `unlearn`, `evaluate` and `audit`.")
    ] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="Until all are done; exits 3 if one fails.")] = False,
) -> None:
    """Run stages for several runs as one array job of Slurm; logs are in jobs/.

    Example: unsink submit poison unlearn evaluate --run clean --run backdoor --with gpus_per_node=1
    """
    pairs = [one.partition("=") for one in given or ()]
    if wrong := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ParamsError(f"--with {wrong[0]}: not of the form key=value", "for example --with gpus_per_node=1")
    values = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
    result = _project(call).submit(stages, run, cluster=cluster, given=values, processes=processes, wait=wait)
    _print(call, result, "\n".join(_lines(result)))


@command(TOOLS)
def check(call: Call) -> None:
    """Validate params, inputs and environment before hours are spent; exits 2 or 3 on a failure.

    Example: unsink check --params params/tiny.yaml
    """
    summary = _run("check", call)
    lines = [f"{'ok  ' if c['ok'] else 'FAIL'}  {c['name']}: {c['detail']}" for c in summary["checks"]]
    _print(call, summary, "\n".join(lines))
    raise typer.Exit(summary["exit_code"])


@command(TOOLS, without=("overrides",))
def show(call: Call) -> None:
    """Print the result table of all evaluated models, with 95 % intervals; several seeds of a run also together.

    Example: unsink show --json
    """
    from unsink.stages.show import table

    rows = _project(call).show()
    _print(call, rows, table(rows))


@command(STAGES)
def report(
    call: Call,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Folder to write instead of report/; it is made anew."),
    ] = None,
) -> None:
    """Show everything that was found on one page that opens offline, with verdicts in words.

    Example: unsink report --json
    """
    result = _run("report", call, output=output)
    from unsink.stages.report import report

    _print(call, result, report(result))


@command(TOOLS, without=("params", "overrides"))
def compare(
    call: Call,
    first: Annotated[Path, typer.Argument(help="A metrics file, such as metrics/backdoor.json.")],
    second: Annotated[Path, typer.Argument(help="The metrics file to compare it with.")],
) -> None:
    """Compare two metrics files: which settings differ, what each can move, and the differences of the numbers.

    Example: unsink compare metrics/backdoor.json metrics/clean.json
    """
    result = _project(call).compare(first, second)
    from unsink.stages.compare import report

    _print(call, result, report(result))


@command(TOOLS, without=("overrides",))
def gate(
    call: Call,
    gates: Annotated[
        Path | None, typer.Option("--gates", metavar="FILE", help="File of gates; gates.yaml beside the params file.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="FOLDER|FILE|REVISION",
            help="What max_regression compares with: a project folder, one of its metrics files, or a git revision.",
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Also write JUnit XML.")] = None,
    md: Annotated[bool, typer.Option("--md", help="Print Markdown, for comments.")] = False,
) -> None:
    """Hold the results against the bounds of gates.yaml; exits 1 if one is broken, 3 if one cannot be evaluated.

    Markdown is also appended to the file that $GITHUB_STEP_SUMMARY names.

    Example: unsink gate --junit gates.xml
    """
    if md and call.as_json:
        raise ParamsError("--md and --json: one of them is expected")
    result = _project(call).gate(gates, baseline=baseline)
    from unsink import gate_reports

    _print(call, result, gate_reports.markdown(result) if md else gate_reports.table(result))
    if junit:
        write_text(junit, gate_reports.junit(result))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_text(Path(summary), gate_reports.markdown(result))
    raise typer.Exit(result["exit_code"])


def _stage(command: str, call: Call, **arguments: object) -> None:
    summary = _run(command, call, **arguments)
    _print(call, summary, "\n".join(_lines(summary)))


def _run(command: str, call: Call, **arguments: object) -> dict[str, Any]:
    return _project(call).run(command, **arguments)


def _project(call: Call) -> "Project":
    from unsink.api import Project
    from unsink.progress import console_reporter

    quiet = call.quiet or not processes.first()
    return Project(call.params, call.overrides or (), reporter=console_reporter(quiet))


def _print(call: Call, result: object, text: str) -> None:
    if processes.first():
        typer.echo(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) if call.as_json else text)


def _lines(summary: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {f'{value:.4g}' if isinstance(value, float) else value}"


# ---- the one place where errors become exit codes


@contextmanager
def _boundary(call: Call) -> Iterator[None]:
    try:
        yield
    except UnsinkError as error:
        _fail(call, error)
    except (typer.Exit, BrokenPipeError):
        raise  # Typer ends quietly, also when the reader of stdout has gone
    except KeyboardInterrupt:
        again = shlex.join(["unsink", *sys.argv[1:]])
        _fail(call, Interrupted("interrupted; nothing is half-written", f"to go on: {again}"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _bug()
        _fail(call, write_error(Path(error.filename or "the output"), error))
    except Exception:  # noqa: BLE001  everything else is a bug, and says so
        _bug()


def _narrated(call: Call) -> AbstractContextManager[None]:
    if not call.verbose:
        return nullcontext()
    from unsink.progress import narrated

    return narrated()


def _fail(call: Call, error: UnsinkError) -> None:
    if call.debug:
        traceback.print_exc()
    who = f"process {processes.rank()}: " if processes.count() > 1 else ""
    typer.echo(f"{who}error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"{who}hint: {error.hint}", err=True)
    raise typer.Exit(error.exit_code)


def _bug() -> None:
    traceback.print_exc()
    typer.echo(f"error: this is a bug in unsink {__version__}, please report it with the lines above", err=True)
    raise typer.Exit(BUG)


def main() -> None:
    """Entry point of the console script."""
    # Schedulers end a job with SIGTERM; it deserves the clean-up of Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries tell programmers; --verbose shows it
    app()
