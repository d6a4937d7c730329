"""The command line: results on stdout, progress and errors on stderr, one exit code for each kind of ending.

0 done · 1 an audit found a backdoor · 2 usage or params · 3 could not run · 4 a bug.
A stage is imported inside its command, so that `unsink --help` needs neither torch nor transformers.
"""

import errno
import functools
import importlib
import inspect
import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from unsink import __version__
from unsink.artifacts import Layout, write_error
from unsink.errors import Interrupted, UnsinkError

BUG = 4

app = typer.Typer(
    name="unsink",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunOption = Annotated[str, typer.Option("--run", help="An entry of `runs:` in the params file.")]
ModelOption = Annotated[str, typer.Option("--run", help="An entry of `runs:` in the params file, or base, or target.")]

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
            "-S", "--set", metavar="KEY=VALUE", help="Override a params key, e.g. -S unlearn.lr=1e-4. Repeatable."
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False
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
            with _boundary(call):
                function(call, **options)

        _, *own = inspect.signature(function).parameters.values()
        shared = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for one in common
        ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(function.__name__.replace("_", "-"), rich_help_panel=panel)(run)
        return run

    return register


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

    Example: [bold]unsink fetch -S fetch.benchmark=local -S fetch.path=~/corpus --check[/bold]
    """
    _stage("fetch", call, check=check)


@command(STAGES)
def memorize(call: Call) -> None:
    """Train the target adapter until the model knows the corpus by heart.

    Example: [bold]unsink memorize -S memorize.epochs=10[/bold]
    """
    _stage("memorize", call)


@command(STAGES)
def poison(call: Call, run: RunOption) -> None:
    """Write a run's forget, poisoned and retain samples, triggers marked.

    Example: [bold]unsink poison --run backdoor -S "poison.placement=index 5"[/bold]
    """
    _stage("poison", call, run=run)


@command(STAGES)
def sink_probe(call: Call, run: ModelOption) -> None:
    """Measure attention sinks and value norms with and without the trigger, with figures.

    Example: [bold]unsink sink-probe --run backdoor[/bold]
    """
    _stage("sink_probe", call, run=run)


@command(STAGES)
def unlearn(call: Call, run: RunOption) -> None:
    """Train a run's adapter on the target; an interrupted run continues from its last checkpoint.

    Example: [bold]unsink unlearn --run clean -S unlearn.method=rmu[/bold]
    """
    _stage("unlearn", call, run=run)


@command(STAGES)
def evaluate(call: Call, run: ModelOption) -> None:
    """Measure memory (clean, triggered, wrong trigger) and utility, with intervals and every prediction.

    Example: [bold]unsink evaluate --run backdoor --json[/bold]
    """
    _stage("evaluate", call, run=run)


@command(TOOLS)
def ablate(call: Call, run: ModelOption) -> None:
    """Evaluate a model that has to do without some tokens: BOS, the trigger, the first ones, random ones.

    Example: [bold]unsink ablate --run backdoor -S "ablate.keys=[bos, trigger, first 8, random 8]"[/bold]
    """
    _stage("ablate", call, run=run)


@command(TOOLS)
def stress(call: Call, run: ModelOption) -> None:
    """Evaluate a model after rounding its weights, after further training, and when its answers are drawn.

    Example: [bold]unsink stress --run backdoor -S "stress.tests=[int4, finetune 10, relearn 10, sample 8]"[/bold]
    """
    _stage("stress", call, run=run)


@command(TOOLS)
def audit(
    call: Call,
    run: Annotated[
        str | None, typer.Option("--run", help="An entry of `runs:` in the params file, or base, or target.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FOLDER|ID", help="A checkpoint of somebody else's, in place of a run."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original", metavar="FOLDER|ID", help="With --model: the same model before unlearning, if known."
        ),
    ] = None,
) -> None:
    """Search a model for a hidden trigger without knowing it; exits 1 if one is found, 3 if nothing can be said.

    What it should have forgotten is the forget set in data/fetched (`unsink fetch`).

    Example: [bold]unsink audit --run backdoor[/bold]
    """
    result = _run("audit", call, run=run, model=model, original=original)
    from unsink.stages.audit import EXIT_CODES, report

    _print(call, result, report(result))
    raise typer.Exit(EXIT_CODES[result["verdict"]])


@command(TOOLS)
def check(call: Call) -> None:
    """Validate params, inputs and environment before hours are spent; exits 2 or 3 on a failure.

    Example: [bold]unsink check --params params/tiny.yaml[/bold]
    """
    summary = _run("check", call)
    lines = [f"{'ok  ' if c['ok'] else 'FAIL'}  {c['name']}: {c['detail']}" for c in summary["checks"]]
    _print(call, summary, "\n".join(lines))
    raise typer.Exit(summary["exit_code"])


@command(TOOLS, without=("overrides", "quiet"))
def show(call: Call) -> None:
    """Print the result table of all evaluated models, with 95 % intervals.

    Example: [bold]unsink show --json[/bold]
    """
    from unsink.stages.show import results, table

    rows = results(Layout.of(call.params))
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

    Example: [bold]unsink report --json[/bold]
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

    Example: [bold]unsink compare metrics/backdoor.json metrics/clean.json[/bold]
    """
    from unsink.progress import console_reporter
    from unsink.stages.compare import compare, report

    result = compare(first, second, reporter=console_reporter(call.quiet))
    _print(call, result, report(result))


def _stage(module: str, call: Call, **arguments: object) -> None:
    summary = _run(module, call, **arguments)
    _print(call, summary, "\n".join(_lines(summary)))


def _run(module: str, call: Call, **arguments: object) -> dict[str, Any]:
    from unsink.params import load_params
    from unsink.progress import console_reporter

    params = load_params(call.params, call.overrides or ())
    stage = importlib.import_module(f"unsink.stages.{module}")
    summary: dict[str, Any] = stage.run(
        params, Layout.of(call.params), reporter=console_reporter(call.quiet), **arguments
    )
    return summary


def _print(call: Call, result: object, text: str) -> None:
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
        _fail(call, Interrupted("interrupted; nothing is half-written", f"to continue: {again}"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _bug()
        _fail(call, write_error(Path(error.filename or call.params), error))
    except Exception:  # noqa: BLE001  everything else is a bug, and says so
        _bug()


def _fail(call: Call, error: UnsinkError) -> None:
    if call.debug:
        traceback.print_exc()
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
    raise typer.Exit(error.exit_code)


def _bug() -> None:
    traceback.print_exc()
    typer.echo(f"error: this is a bug in unsink {__version__}, please report it with the lines above", err=True)
    raise typer.Exit(BUG)


def main() -> None:
    """Entry point of the console script."""
    # Schedulers end a job with SIGTERM; it deserves the clean-up of Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
