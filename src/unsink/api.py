"""The commands as methods: what the command line calls, and what a notebook does.

The files are the same, and so is what a method returns: what its command prints with `--json`. Nothing is printed, and
no progress is shown unless a reporter is given. What a user can mend is raised as `UnsinkError`; Ctrl-C, or the stop
button of a notebook, raises `KeyboardInterrupt` and leaves what the command would leave.
"""

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unsink import memory, processes
from unsink.artifacts import Layout, require_new
from unsink.errors import MissingPrerequisite, ModelError, ParamsError
from unsink.params import RESERVED, Params, load_params, run_names
from unsink.progress import SILENT, Reporter

LOG = logging.getLogger(__name__)

Result = dict[str, Any]


class Project:
    """A project folder.

    Args:
        params: The params file. Its folder holds inputs and outputs; of `params/x.yaml` the parent does.
        overrides: Params keys with other values, `{"unlearn.lr": 2e-4}`; or as on the command line, `["seed=1"]`.
        reporter: Where commands say how far they are; `console_reporter()` shows bars on a terminal.
    """

    def __init__(
        self,
        params: str | Path = "params.yaml",
        overrides: Mapping[str, object] | Sequence[str] = (),
        *,
        reporter: Reporter = SILENT,
    ) -> None:
        self.file = Path(params)
        self.layout = Layout.of(self.file)
        self._overrides = _texts(overrides)
        self._reporter = reporter

    @property
    def params(self) -> Params:
        """All parameters, overrides applied. The file is read each time, so that it may be edited between two calls.

        Raises:
            ParamsError: With every problem found.
        """
        return load_params(self.file, self._overrides)

    def params_of(self, run: object) -> Params:
        """All parameters, if there is such a run: so a mistyped one is told before libraries load, which takes seconds.

        Args:
            run: An entry of `runs:`, or `base` or `target`; anything but a text is not looked at.

        Raises:
            ParamsError: As `params`, or no such run.
        """
        params = self.params
        if isinstance(run, str) and run not in RESERVED:
            params.run(run)
        return params

    def run(self, command: str, **arguments: object) -> Result:
        """What every method below does: the work of a command, by name.

        Args:
            command: Such as "sink-probe".
            **arguments: Its own options, such as `run="backdoor"`.
        """
        label = " ".join([command, *(value for value in arguments.values() if isinstance(value, str))])
        with self._reporter.working(label):
            params = self.params_of(arguments.get("run"))
            if processes.count() > 1 and command not in processes.SHARED:
                raise ParamsError(
                    f"{command} runs in one process, not in {processes.count()}",
                    f"start it without torchrun; {', '.join(processes.SHARED)} can share their work",
                )
            LOG.debug("loading libraries")
            stage = importlib.import_module(f"unsink.stages.{command.replace('-', '_')}")
            with processes.joined(params.model.device), _memory(params, command, arguments.get("run")):
                summary: Result = stage.run(params, self.layout, reporter=self._reporter, **arguments)
        return summary

    # ---- stages, in the order of the pipeline

    def fetch(self, *, check: bool = False) -> Result:
        """Get corpus and model and return their manifest; with `check` read the corpus only and count its records.

        Raises:
            UnsinkError: The corpus is missing or malformed, or a model cannot be had.
        """
        return self.run("fetch", check=check)

    def memorize(self) -> Result:
        """Train the target, the model that knows the corpus by heart, and return how well it does.

        Raises:
            UnsinkError: It does not know the corpus well enough, or nothing was fetched.
        """
        return self.run("memorize")

    def poison(self, run: str) -> Result:
        """Write a run's forget, poisoned and retain samples, and return how many there are.

        Raises:
            UnsinkError: No such run, a trigger that does not fit, or nothing was fetched.
        """
        return self.run("poison", run=run)

    def sink_probe(self, run: str, *, against: str | None = None) -> Result:
        """Measure attention sinks and value norms of a run, `base` or `target`, and return the main numbers.

        Args:
            run: An entry of `runs:`, or `base` or `target`.
            against: Another one that was probed, as `run` was: nothing is measured then, the value norms of the two
                are compared in `probes/<run>.against.<against>/`.

        Raises:
            UnsinkError: No such run, or its adapter is missing; or the two were not probed on the same prompts.
        """
        if against is None:
            return self.run("sink-probe", run=run)
        return self.run("value-norms", run=run, against=against)

    def unlearn(self, run: str) -> Result:
        """Train a run's adapter, from its last checkpoint if there is one, and return its summary.

        Raises:
            UnsinkError: No such run, a loss that is not finite, or samples or the target are missing.
        """
        return self.run("unlearn", run=run)

    def evaluate(self, run: str) -> Result:
        """Measure what a run, `base` or `target` still knows, and return the means; intervals are in `metrics/`.

        Raises:
            UnsinkError: No such run, or its samples or adapter are missing.
        """
        return self.run("evaluate", run=run)

    # ---- tools

    def ablate(self, run: str) -> Result:
        """Evaluate a model that has to do without some tokens, and return the main numbers of each ablation.

        Raises:
            UnsinkError: As `evaluate`, or a rule of `ablate.keys` names no token.
        """
        return self.run("ablate", run=run)

    def stress(self, run: str) -> Result:
        """Evaluate a model after rounding or further training, and return the main numbers of each test.

        Raises:
            UnsinkError: As `evaluate`.
        """
        return self.run("stress", run=run)

    def audit(
        self,
        run: str | None = None,
        *,
        model: str | None = None,
        original: str | None = None,
        adapter: str | None = None,
        honest: str | None = None,
    ) -> Result:
        """Search a run, or a checkpoint of somebody else's, for a trigger that nobody told; return the verdict.

        Args:
            run: An entry of `runs:`, or `base` or `target`.
            model: Folder or Hugging Face id, in place of a run.
            original: With `model`: the same model before unlearning, if known.
            adapter: With `model`: a LoRA adapter on it, in PEFT's format.
            honest: A model or adapter that is known to have no trigger.

        Raises:
            UnsinkError: Neither or both of run and model are given, or something is missing or damaged.
        """
        return self.run("audit", run=run, model=model, original=original, adapter=adapter, honest=honest)

    def mitigate(
        self,
        run: str | None = None,
        *,
        how: Sequence[str] = (),
        model: str | None = None,
        original: str | None = None,
        adapter: str | None = None,
    ) -> Result:
        """Repair or guard a model that may hide a trigger; return what that brought and cost, by mitigation.

        Args:
            run: An entry of `runs:`, or `base` or `target`.
            how: Names of mitigations, in place of `mitigate.how`.
            model: Folder or Hugging Face id, in place of a run.
            original: With `model`: the same model before unlearning, if known.
            adapter: With `model`: a LoRA adapter on it, in PEFT's format.

        Raises:
            UnsinkError: Neither or both of run and model are given, or something is missing or damaged.
        """
        return self.run("mitigate", run=run, how=how, model=model, original=original, adapter=adapter)

    def export(
        self,
        run: str | None,
        output: str | Path,
        *,
        repair: str | None = None,
        merged: bool = False,
        dtype: str = "float32",
    ) -> Result:
        """Write a model for other tools, PEFT or transformers, with a model card, and return what it holds.

        Args:
            run: An entry of `runs:`, or `base` or `target`; None for all that was trained, each in a folder of its own.
            output: A new folder.
            repair: A repair of that run, such as random-prefix, to go with it.
            merged: A whole model instead of an adapter.
            dtype: Of the stored weights: float32, bfloat16 or float16.

        Raises:
            UnsinkError: No such run or repair, an adapter is missing, or the folder holds something.
        """
        require_new(Path(output))  # said before libraries load, which takes seconds
        return self.run("export", run=run, output=Path(output), repair=repair, merged=merged, dtype=dtype)

    def submit(
        self,
        stages: Sequence[str],
        run: Sequence[str],
        *,
        cluster: str = "slurm",
        given: Mapping[str, object] | None = None,
        processes: int = 1,
        wait: bool = False,
    ) -> Result:
        """Run stages for several runs as one array job of Slurm, and return the id of each task.

        Args:
            stages: Such as `["poison", "unlearn", "evaluate"]`, done in this order for each run.
            run: Entries of `runs:`, a task for each.
            cluster: `slurm`, or `local` for processes on this machine.
            given: For the job, by submitit's names, such as `{"gpus_per_node": 1, "slurm_partition": "gpu"}`.
            processes: That share a task.
            wait: Until all are done; so it is for `local`.

        Raises:
            UnsinkError: No such stage, run or key; submitit or Slurm is missing; or a task has failed.
        """
        options = ["--params", str(self.file.absolute()), *(part for one in self._overrides for part in ("-S", one))]
        return self.run(
            "submit",
            stages=stages,
            runs=run,
            options=options,
            cluster=cluster,
            given=given,
            processes=processes,
            wait=wait,
        )

    def check(self) -> Result:
        """Validate params, inputs and environment, and return what was found; problems are told, not raised.

        Raises:
            ParamsError: The params file itself is wrong.
        """
        return self.run("check")

    def show(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and 95 % interval of each column of the result table: run -> column -> mean, low, high (p-values: mean).

        Runs that differ in their seed alone have a row together as well.

        Raises:
            MissingPrerequisite: Nothing has been evaluated yet.
            ParamsError: Nor is there a params file.
        """
        from unsink.stages.show import pooled, results

        try:
            rows = results(self.layout)
        except MissingPrerequisite:
            run_names(self.file)  # in a wrong folder there are no params either, and that says more
            raise
        return rows | pooled(self.params, self.layout) if self.file.exists() else rows

    def report(self, output: str | Path | None = None) -> Result:
        """Write one page that opens offline, and its figures; return where they are and the verdicts in words.

        Args:
            output: The folder; `report/` of the project.

        Raises:
            UnsinkError: Nothing has been evaluated yet.
        """
        return self.run("report", output=Path(output) if output else None)

    def compare(self, first: str | Path, second: str | Path) -> Result:
        """Say which settings of two metrics files differ, what each can move, and how the numbers differ.

        Args:
            first: Such as `metrics/backdoor.json`; a relative path counts from the project folder.
            second: What it is compared with.

        Raises:
            UnsinkError: A file is missing or no metrics file.
        """
        with self._reporter.working("compare"):
            from unsink.stages.compare import compare

            return compare(self.layout.root / first, self.layout.root / second, reporter=self._reporter)

    def gate(self, gates: str | Path | None = None, *, baseline: str | None = None) -> Result:
        """Hold the results against bounds; a broken one is told in `checks` and `exit_code`, not raised.

        Args:
            gates: The file of gates; `gates.yaml` beside the params file.
            baseline: What `max_regression` compares with: a project folder, a metrics file, or a git revision.

        Raises:
            ParamsError: The file of gates is wrong, or no gate compares with the baseline.
        """
        with self._reporter.working("gate"):
            from unsink.stages.gate import run

            file = Path(gates) if gates else self.file.with_name("gates.yaml")
            return run(run_names(self.file), self.layout, gates=file, baseline=baseline, reporter=self._reporter)


@contextmanager
def _memory(params: Params, command: str, run: object) -> Iterator[None]:
    """Say what to try when there is not enough of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        smaller = memory.smaller(params, command, run if isinstance(run, str) else None)
        raise ModelError(
            f"{command}: out of memory: {str(error).partition(chr(10))[0]}",
            f"try it with -S {smaller}" if smaller else "take a device with more memory, or a smaller model",
        ) from error


def _texts(overrides: Mapping[str, object] | Sequence[str]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]  # JSON is YAML
    return list(overrides)
