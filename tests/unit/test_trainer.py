"""The loop on a problem small enough to know: it learns, it stops, it continues from where it was killed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unsink import trainer
from unsink.errors import ModelError
from unsink.trainer import Checkpoint, History, Schedule, history_tsv, train


def problem() -> tuple[dict[str, nn.Parameter], object]:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))

    def terms(step: int, _history: History) -> dict[str, Tensor]:
        goal = torch.tensor([1.0, float(step % 3)])
        gap = (weight - goal).square().sum()
        return {"loss": gap, "gap": gap, "forget": gap}

    return {"weight": weight}, terms


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    schedule = Schedule(steps=100, lr=1.0, warmup=4)
    assert schedule.rate(0) == pytest.approx(0.25)
    assert schedule.rate(3) == pytest.approx(0.1 + 0.9 * 0.97)
    assert schedule.rate(99) == pytest.approx(0.1 + 0.9 * 0.01)


def test_training_lowers_the_loss_and_keeps_one_row_per_step() -> None:
    parameters, terms = problem()
    history = train(parameters, terms, Schedule(30, 0.1))
    assert [row["step"] for row in history] == list(range(1, 31))
    assert history[0]["loss"] > 7
    assert history[-1]["loss"] < history[0]["loss"] - 1


def test_stop_ends_the_training_early() -> None:
    parameters, terms = problem()
    assert len(train(parameters, terms, Schedule(30, 0.1), stop=lambda rows: len(rows) == 4)) == 4


@pytest.mark.parametrize("killed_at", [5, 6, 17])
def test_a_killed_run_ends_with_the_same_numbers(tmp_path: Path, killed_at: int) -> None:
    schedule = Schedule(20, 0.1, checkpoint_every=3)
    whole, terms = problem()
    uninterrupted = train(whole, terms, schedule)

    checkpoint = Checkpoint(tmp_path / "state", "digest")
    first, terms = problem()

    def dies(step: int, history: History) -> dict[str, Tensor]:
        if step == killed_at:
            raise KeyboardInterrupt
        return terms(step, history)

    with pytest.raises(KeyboardInterrupt):
        train(first, dies, schedule, checkpoint)
    second, terms = problem()
    resumed = train(second, terms, schedule, checkpoint)
    assert resumed == uninterrupted
    assert history_tsv(resumed) == history_tsv(uninterrupted)
    assert torch.equal(second["weight"], whole["weight"])
    assert [path.name for path in checkpoint.folder.iterdir()] == ["state.safetensors"]


def test_checkpoints_take_no_more_than_a_fiftieth_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, saved = [0.0], []
    parameters, terms = problem()

    def ten_seconds(step: int, history: History) -> dict[str, Tensor]:
        clock[0] += 10
        return terms(step, history)

    def one_second(_checkpoint: object, _parameters: object, _optimizer: object, history: History) -> None:
        clock[0] += 1
        saved.append(len(history))

    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trainer, "_save", one_second)
    train(parameters, ten_seconds, Schedule(12, 0.1, checkpoint_every=1), Checkpoint(tmp_path, "digest"))
    assert saved == [1, 6, 11]  # after 10 s; then 50 s after the end of each, 61 s and 112 s


def test_a_checkpoint_of_other_inputs_is_not_continued(tmp_path: Path) -> None:
    schedule = Schedule(6, 0.1, checkpoint_every=3)
    parameters, terms = problem()
    train(parameters, terms, schedule, Checkpoint(tmp_path, "old"))
    seen: list[int] = []
    parameters, terms = problem()

    def watched(step: int, history: History) -> dict[str, Tensor]:
        seen.append(step)
        return terms(step, history)

    train(parameters, watched, schedule, Checkpoint(tmp_path, "new"))
    assert seen == list(range(6))


def test_a_loss_that_is_not_finite_names_step_and_term() -> None:
    weight = nn.Parameter(torch.ones(1))

    def terms(step: int, _history: History) -> dict[str, Tensor]:
        loss = weight.sum()
        return {"loss": loss, "retain": loss * (float("nan") if step == 2 else 1)}

    with pytest.raises(ModelError, match="step 3: retain is not finite"):
        train({"weight": weight}, terms, Schedule(5, 0.1))


def test_a_first_step_without_gradient_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="no gradient reaches the adapter"):
        train({"weight": weight}, lambda _step, _history: {"loss": (weight * 0).sum()}, Schedule(5, 0.1))


def test_a_step_sees_the_rows_before_it_also_after_a_kill(tmp_path: Path) -> None:
    def run(killed_at: int | None) -> list[float]:
        weight = nn.Parameter(torch.tensor([3.0]))

        def terms(step: int, history: History) -> dict[str, Tensor]:
            if step == killed_at:
                raise KeyboardInterrupt
            loss = weight.square().sum() * (1 + sum(row["loss"] for row in history))
            return {"loss": loss}

        return [row["loss"] for row in train({"weight": weight}, terms, schedule, Checkpoint(tmp_path, "digest"))]

    schedule = Schedule(8, 0.1)
    whole = run(None)
    schedule = Schedule(8, 0.1, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(5)
    assert run(None) == whole
