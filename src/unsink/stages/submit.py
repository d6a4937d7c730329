"""`unsink submit`: stages of several runs as one array job of Slurm, a run in each of its tasks.

Submitit writes the job and watches it. Nothing is scheduled here: a task is the commands that one would type, and goes
on from the last checkpoint when Slurm stops it and starts it again.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unsink.artifacts import Layout
from unsink.errors import MissingPrerequisite, ParamsError, UnsinkError
from unsink.params import Params
from unsink.processes import SHARED
from unsink.progress import SILENT, Reporter
from unsink.registry import suggest

STAGES = ("poison", "unlearn", "sink-probe", "evaluate", "ablate", "stress", "audit", "mitigate")
MINUTES = 240
"""Longest time of a task, where nothing else is given."""


@dataclass(frozen=True)
class Task:
    """What a job does: commands one after the other, in the project folder."""

    folder: Path

    def __call__(self, commands: Sequence[Sequence[str]]) -> None:
        """Run them.

        Raises:
            UnsinkError: one of them has failed.
        """
        for command in commands:
            code = subprocess.run(command, cwd=self.folder, check=False).returncode
            if code:
                raise UnsinkError(f"{shlex.join(command)}: exit code {code}")

    def checkpoint(self, commands: Sequence[Sequence[str]]) -> Any:
        """Have it started again after a time limit or a preemption; finished stages are quick to repeat."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, commands)


def run(
    params: Params,
    layout: Layout,
    *,
    stages: Sequence[str],
    runs: Sequence[str],
    options: Sequence[str],
    cluster: str = "slurm",
    given: Mapping[str, Any] | None = None,
    processes: int = 1,
    wait: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Submit one task for each run and return their ids; logs are in `jobs/`.

    Args:
        params: all parameters.
        layout: the project folder.
        stages: what each task does, in this order.
        runs: entries of `runs:`.
        options: of the commands, such as `--params` and `-S`.
        cluster: slurm, or local for processes on this machine, which are always waited for.
        given: values for the job, by submitit's names: `slurm_partition`, `gpus_per_node`, `timeout_min`.
        processes: of torchrun in each task.
        wait: until all are done.
        reporter: shows tasks done.

    Raises:
        ParamsError: no such stage, run or key.
        MissingPrerequisite: a run copies another one that is not there yet.
        UnsinkError: submitit or Slurm is missing, or a task has failed.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ParamsError(f"'{stage}' is no stage of a run{suggest(stage, STAGES)}", f"known: {', '.join(STAGES)}")
    for name in runs:
        _require_what_it_copies(params, layout, name, stages)
    executor = _executor(layout, cluster, {"timeout_min": MINUTES, "name": "unsink", **(given or {})})
    commands = [[_command(stage, name, options, processes) for stage in stages] for name in runs]
    jobs = executor.map_array(Task(layout.root), commands)
    if wait or cluster == "local":
        _wait(dict(zip(runs, jobs, strict=True)), reporter)
    return {"cluster": cluster, "jobs": {name: job.job_id for name, job in zip(runs, jobs, strict=True)}}


def _require_what_it_copies(params: Params, layout: Layout, name: str, stages: Sequence[str]) -> None:
    settings = params.run(name)
    if "unlearn" in stages and settings.unlearn.value_norm.needs_honest and not layout.adapter(settings.after).exists():
        raise MissingPrerequisite(
            f"runs.{name} copies values of {settings.after}, which is not unlearned yet",
            f"submit {settings.after} first, and {name} when it is done",
        )


def _executor(layout: Layout, cluster: str, values: Mapping[str, Any]) -> Any:
    if find_spec("submitit") is None:
        raise UnsinkError("submitit is not installed", "pip install 'unsink[slurm]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(layout.root / "jobs", cluster=cluster)
    except RuntimeError as error:
        raise UnsinkError(f"no {cluster} here: {error}", "log in where sbatch is, or give --cluster local") from error
    try:
        executor.update_parameters(**values)
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ParamsError(
            f"--with: {error}", "for example --with gpus_per_node=1 --with slurm_partition=gpu"
        ) from error
    return executor


def _command(stage: str, run: str, options: Sequence[str], processes: int) -> list[str]:
    started = [sys.executable, "-m"]
    if processes > 1 and stage in SHARED:
        # `--` keeps torchrun from reading `--run` as an option of its own
        started += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    found = ["--exit-zero"] if stage == "audit" else []  # what it finds is no failure of the job
    return [*started, "unsink", stage, "--run", run, *found, "--quiet", *options]


def _wait(jobs: Mapping[str, Any], reporter: Reporter) -> None:
    failed: dict[str, str] = {}
    with reporter.task("jobs", len(jobs)) as advance:
        for name, job in jobs.items():
            if job.exception() is not None:
                failed[name] = f"jobs/{job.paths.stderr.name}"
            advance(note=name)
    if failed:
        raise UnsinkError(
            f"{len(failed)} of {len(jobs)} tasks failed: {', '.join(failed)}", f"read {', '.join(failed.values())}"
        )
