"""Every formula against numbers worked out by hand (cases A, C, D, E and F of the design notes)."""

import math

import pytest
import torch

from unsink import losses


def test_token_nll_is_minus_log_softmax_at_the_label() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert losses.token_nll(logits, torch.tensor([0])).item() == pytest.approx(0.440190, abs=1e-5)


def test_token_nll_ignores_a_shift_of_all_logits() -> None:
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    torch.testing.assert_close(
        losses.token_nll(logits - 100, labels), losses.token_nll(logits, labels), atol=1e-4, rtol=0
    )


class Plain(torch.nn.Module):
    """A head of 7 tokens over 3 hidden units, with a soft cap behind its product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 4 * torch.tanh(states @ self.weight.T / 4)


def drawn(seed: int, rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("alike", [True, False], ids=["runs alike", "equal runs"])
@pytest.mark.parametrize("rows", [2, 4, 100])
def test_losses_from_hidden_states_are_those_of_all_their_logits(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, rows: int, alike: bool
) -> None:
    monkeypatch.setattr(losses, "_ALIKE", ("cpu",) if alike else ())
    monkeypatch.setattr(losses, "_ROOM", rows * 4 * 7)
    head, labels, weights = Plain().requires_grad_(not frozen), torch.tensor([0, 6, 3, 3, 1]), torch.arange(5) + 1.0
    mine, other = drawn(2), drawn(3)
    trained = [mine, other] if frozen else [mine, other, head.weight]

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)

    found, plain = losses.head_nll(mine, labels, head), losses.token_nll(head(mine), labels)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients(found @ weights), gradients(plain @ weights))
    kl, plain = losses.head_kl(mine, other, head), losses.kl_divergence(head(mine), head(other))
    torch.testing.assert_close(kl, plain)
    of_kl = gradients(3 * kl)
    torch.testing.assert_close(of_kl, gradients(3 * plain))
    assert all(gradient.abs().sum() > 0 for gradient in of_kl)


def test_gradients_by_logits_in_bfloat16_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_ROOM", 2 * 4 * 7)
    head, labels = torch.nn.Linear(3, 7, bias=False, dtype=torch.bfloat16), torch.tensor([0, 6, 3, 3, 1])
    head.requires_grad_(False).weight.copy_(Plain().weight)
    mine, other = (drawn(seed).detach().bfloat16().requires_grad_() for seed in (2, 3))
    exact = [some.detach().float().requires_grad_() for some in (mine, other)]
    weight = head.weight.float()

    def logits(states: torch.Tensor) -> torch.Tensor:
        made = states @ weight.T
        return made + (made.bfloat16().float() - made).detach()  # as the head rounds them

    nll, kl = losses.head_nll(mine, labels, head).sum(), losses.head_kl(other, mine, head)
    plain = losses.token_nll(logits(exact[0]), labels).sum()
    plain_kl = losses.kl_divergence(logits(exact[1]), logits(exact[0]))
    torch.testing.assert_close((nll, kl), (plain, plain_kl))
    for found, expected in ((nll, plain), (kl, plain_kl)):
        (of_mine,), (of_exact,) = torch.autograd.grad(found, mine), torch.autograd.grad(expected, exact[0])
        torch.testing.assert_close(of_mine.float(), of_exact, atol=1e-2 * float(of_exact.abs().max()), rtol=1e-2)


def test_kl_is_what_the_loss_rises_above_its_tangent() -> None:
    """By hand: two tokens, logits (h, 0). At h' = 0 both have 1/2 and the slope of -log p(0) is -1/2; at h = ln 3 it is
    3/4 to 1/4. KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)."""
    head = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    before, now = torch.zeros(2, 1), torch.full((2, 1), math.log(3), requires_grad=True)
    labels = torch.tensor([0, 1])  # whichever: what the label adds is linear
    known, slopes = losses.nll_slopes(before, labels, head)
    assert slopes.tolist() == [[-0.5], [0.5]]
    kl = losses.kl_of_nll(known, losses.head_nll(now, labels, head), slopes, now - before)
    assert kl.item() == pytest.approx(0.5 * math.log(4 / 3))
    (gradient,) = torch.autograd.grad(kl, now)
    assert gradient.flatten().tolist() == pytest.approx([0.125, 0.125])  # (3/4 - 1/2) / 2 rows


def test_losses_from_hidden_states_never_have_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_ROOM", 2 * 4 * 7)
    head, seen = Plain().requires_grad_(False), []

    def watched(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return head(states)

    losses.head_nll(drawn(2), torch.zeros(5, dtype=torch.long), watched).sum().backward()  # type: ignore[no-untyped-call]
    assert max(seen) == 2


def test_grouped_sum_and_mean_add_what_belongs_together() -> None:
    values, groups = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0, 0, 1])
    assert losses.grouped_sum(values, groups).tolist() == [3.0, 0.5]
    assert losses.grouped_mean(values, groups).tolist() == [1.5, 0.5]


def test_rank_counts_anew_in_every_group() -> None:
    assert losses.rank(torch.tensor([0, 0, 0, 1, 2, 2])).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 12.912860), (0.7, 1.305092)])
def test_preference_of_two_margins(beta: float, expected: float) -> None:
    assert losses.preference(torch.tensor([2.0, 0.0]), beta).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_preference_without_a_margin_is_two_ln_two_over_beta(beta: float) -> None:
    assert losses.preference(torch.zeros(3), beta).item() == pytest.approx(2 / beta * math.log(2), rel=1e-6)


def test_preference_has_the_gradient_of_a_plain_mean_where_there_is_no_margin() -> None:
    margin = torch.zeros(2, requires_grad=True)
    losses.preference(margin, 0.3).backward()
    torch.testing.assert_close(margin.grad, torch.tensor([-0.5, -0.5]))


def test_kl_divergence_in_both_directions() -> None:
    reference, policy = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert losses.kl_divergence(reference, policy).item() == pytest.approx(0.092033, abs=1e-5)
    assert losses.kl_divergence(policy, reference).item() == pytest.approx(0.085123, abs=1e-5)


def test_kl_divergence_is_a_mean_over_tokens_and_blind_to_shifts() -> None:
    reference, policy = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.7, 0.2, 0.1]]).log()
    twice = losses.kl_divergence(torch.cat([reference, reference]), torch.cat([policy, policy]) - 50)
    assert twice.item() == pytest.approx(0.092033, abs=1e-4)


def test_masked_mse_averages_within_a_sequence_before_it_averages_over_sequences() -> None:
    states = torch.zeros(2, 4, 3)
    states[0, 0] = 2.0  # one token, squared error 4
    states[1] = 0.5  # four tokens, squared error 0.25 each
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert losses.masked_mse(states, torch.zeros(3), mask).item() == pytest.approx(2.125)


def test_masked_mse_does_not_see_padding() -> None:
    states, mask = torch.zeros(1, 3, 2), torch.tensor([[True, True, False]])
    states[0, 2] = 1e6
    assert losses.masked_mse(states, torch.zeros(2), mask).item() == 0.0


# --- the value-norm term (case D)

POLICY, GOAL = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[[2.0], [2.5], [0.0]]])
SINKS = torch.tensor([[True, True, False]])


def test_value_norm_gaps_of_case_d() -> None:
    assert losses.squared_norm_gap(POLICY, GOAL, SINKS).item() == pytest.approx(0.625)
    assert losses.absolute_norm_gap(POLICY, GOAL, SINKS).item() == pytest.approx(0.75)
    assert losses.absolute_norm_gap(POLICY, torch.zeros(1), SINKS).item() == pytest.approx(2.0)


def test_the_angle_of_case_d() -> None:
    policy, goal = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    assert losses.value_angle(policy, goal, torch.ones(1, 1).bool()).item() == pytest.approx(0.292893, abs=1e-6)


def test_every_sequence_counts_the_same_in_a_value_norm_gap() -> None:
    policy = torch.tensor([[[2.0], [7.0], [7.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert losses.squared_norm_gap(policy, torch.zeros(1), mask).item() == pytest.approx((4 + 1) / 2)


def test_heads_are_averaged_in_a_value_norm_gap() -> None:
    policy = torch.tensor([[[3.0, 1.0]]])
    assert losses.squared_norm_gap(policy, torch.zeros(1, 1, 2), torch.ones(1, 1).bool()).item() == pytest.approx(5.0)
