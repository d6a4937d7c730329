"""An array job, with submitit's local executor in the place of Slurm's."""

from pathlib import Path

import pytest

from unsink.api import Project
from unsink.errors import MissingPrerequisite, ParamsError, UnsinkError
from unsink.stages.submit import Task, _command


def test_a_local_job_runs_the_stages_of_each_run(copy: Path) -> None:
    project = Project(copy / "params.yaml", {"poison.trigger": "red fox"})
    for run in ("clean", "backdoor"):
        (copy / "splits" / run / "poisoned.jsonl").unlink()
    submitted = project.submit(["poison"], ["clean", "backdoor"], cluster="local", given={"timeout_min": 3})
    assert submitted["jobs"].keys() == {"clean", "backdoor"}
    assert (copy / "splits" / "clean" / "poisoned.jsonl").read_text() == ""
    assert "red fox" in (copy / "splits" / "backdoor" / "poisoned.jsonl").read_text()
    assert [*copy.glob("jobs/*.err")]


def test_what_cannot_be_submitted_says_why(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(copy / "params.yaml")
    with pytest.raises(ParamsError, match="'evaluat' is no stage of a run"):
        project.submit(["evaluat"], ["clean"])
    with pytest.raises(MissingPrerequisite, match="backdoor-vn copies values of clean, which is not unlearned yet"):
        project.submit(["unlearn"], ["backdoor-vn"])
    with pytest.raises(ParamsError, match="--with: "):
        project.submit(["poison"], ["clean"], cluster="local", given={"colour": "red"})
    with pytest.raises(UnsinkError, match="no slurm here"):
        project.submit(["poison"], ["clean"])
    monkeypatch.setattr("unsink.stages.submit.find_spec", lambda _: None)
    with pytest.raises(UnsinkError, match="submitit is not installed"):
        project.submit(["poison"], ["clean"])


def test_a_task_fails_with_its_command_and_can_be_started_again(tmp_path: Path) -> None:
    task = Task(tmp_path)
    with pytest.raises(UnsinkError, match=r"sh -c 'exit 3': exit code 3"):
        task([["sh", "-c", "exit 3"], ["touch", "reached"]])
    assert not (tmp_path / "reached").exists()
    again = task.checkpoint([["touch", "again"]])
    again.function(*again.args)
    assert (tmp_path / "again").exists()


def test_several_processes_are_started_by_torchrun_where_a_stage_can_share() -> None:
    shared = " ".join(_command("unlearn", "clean", ["-S", "seed=1"], 4)[1:])
    expected = (
        "-m torch.distributed.run --standalone --nproc-per-node 4 -m -- unsink unlearn --run clean --quiet -S seed=1"
    )
    assert shared == expected
    assert _command("poison", "clean", [], 4)[1:] == ["-m", "unsink", "poison", "--run", "clean", "--quiet"]


def test_a_verdict_is_no_failure_of_a_job() -> None:
    alone = _command("audit", "clean", [], 1)
    assert alone[1:] == ["-m", "unsink", "audit", "--run", "clean", "--exit-zero", "--quiet"]
    assert "torch.distributed.run" in _command("audit", "clean", [], 4)
