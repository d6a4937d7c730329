"""The formulas as the objective calls them, on answers made by hand."""

import math

import pytest
import torch

from unsink.forward import Forward
from unsink.methods import npo, rmu


def forward(nll: list[float], rows: list[int], hidden: torch.Tensor | None = None) -> Forward:
    """An answer with given losses; without a model behind it."""
    count = max(rows) + 1
    labelled = torch.ones(count, 3, dtype=torch.bool)
    labelled[:, 0] = False  # BOS
    made = Forward(
        torch.zeros(len(nll), dtype=torch.long),
        torch.tensor(rows),
        torch.zeros(len(nll), 2),
        lambda states: states,
        torch.ones(count, 3, dtype=torch.bool),
        labelled,
        {} if hidden is None else {2: hidden},
    )
    made.__dict__["nll"] = torch.tensor(nll)
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_npo_of_whole_sequences_is_the_papers() -> None:
    method = npo.Method(npo.Options(beta=0.1))
    policy, reference = forward([1.0, 2.0, 0.5], [0, 0, 1]), forward([0.5, 0.5, 0.5], [0, 0, 1])
    assert method.forget_loss(policy, reference, seeded()).item() == pytest.approx(12.912860, abs=1e-5)


def test_npo_with_windows_of_one_token_treats_every_token_as_a_sequence() -> None:
    method = npo.Method(npo.Options(beta=0.5, window=1))
    policy, reference = forward([1.0, 2.0, 0.5], [0, 0, 1]), forward([0.5, 0.5, 0.5], [0, 0, 1])
    by_hand = [-4 * math.log(1 / (1 + math.exp(-0.5 * gap))) for gap in (0.5, 1.5, 0.0)]
    assert method.forget_loss(policy, reference, seeded()).item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_windows_are_contiguous_no_longer_than_asked_and_never_span_two_sequences() -> None:
    rows = torch.tensor([0] * 11 + [1] * 4 + [2])
    groups, count = npo.windows(rows, 4, seeded())
    assert groups.tolist() == sorted(groups.tolist())
    assert set(groups.tolist()) == set(range(count))
    for window in range(count):
        assert len(rows[groups == window].unique()) == 1
        assert (groups == window).sum() <= 4


def test_windows_begin_elsewhere_in_the_next_step() -> None:
    rows, generator = torch.zeros(40, dtype=torch.long), seeded()
    starts = {tuple(npo.windows(rows, 8, generator)[0].tolist()) for _ in range(20)}
    assert len(starts) > 3


@pytest.mark.parametrize("direction", ["isotropic", "uniform"])
def test_rmu_measures_distance_in_activation_norms(direction: str) -> None:
    hidden = torch.zeros(1, 3, 4)
    hidden[0, 1:] = torch.tensor([3.0, 4.0, 0.0, 0.0])  # norm 5 at both labelled tokens
    hidden[0, 0] = 1e4  # BOS, an attention sink: must not count
    method = rmu.Method(rmu.Options(layer=2, steering=2.0, direction=direction))  # type: ignore[arg-type]
    target = forward([0.0, 0.0], [0, 0], hidden)
    method.prepare(target, seeded())
    assert method.retain_loss(target, target).item() == 0.0
    steered = forward([0.0, 0.0], [0, 0], method._goal.expand(1, 3, 4))
    assert method.forget_loss(steered, target, seeded()).item() == pytest.approx(0.0, abs=1e-6)
    assert method._goal.norm().item() == pytest.approx(10.0, rel=1e-5)
    nothing = forward([0.0, 0.0], [0, 0], torch.zeros(1, 3, 4))
    assert method.forget_loss(nothing, target, seeded()).item() == pytest.approx(4.0, rel=1e-5)  # 2 norms, squared
