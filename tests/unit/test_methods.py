"""The formulas as the objective calls them, against numbers worked out by hand, and what all methods have in common."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from unit.answers import from_logits, from_nll, one_token, seeded
from unsink import methods, registry
from unsink.answers import Forward
from unsink.errors import ParamsError
from unsink.methods import Method, ceu, npo, pdu, rmu

METHODS = registry.names("unsink.methods")
WITH_RETAIN = [
    name for name in METHODS if "retain" in registry.load("method", "unsink.methods", name).Options.model_fields
]

# Two sequences, of two tokens and of one.
POLICY, REFERENCE, ROWS = [1.0, 2.0, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]


def forget(name: str, policy: Forward, reference: Forward, **options: Any) -> float:
    return methods.create(name, options).forget_loss(policy, reference, seeded()).item()


# ---- golden numbers


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ga", {}, -1.166667),
        ("graddiff", {}, -1.166667),
        ("npo", {"beta": 0.1}, 12.912860),
        ("npo", {"beta": 0.7}, 1.305092),
        ("npo", {"beta": 0.5, "variant": "released-wmdp"}, 0.551986),
        ("simnpo", {"beta": 4.5}, 0.022528),
        ("simnpo", {"beta": 2.5}, 0.110070),
        ("wga", {"beta": 1.0}, -0.313938),
        ("wga", {"beta": 0.0}, -1.166667),
        ("satimp", {"beta1": 5.0, "beta2": 1.0}, -0.00682889),
    ],
)
def test_two_sequences_with_known_losses(name: str, options: dict[str, Any], expected: float) -> None:
    found = forget(name, from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS), **options)
    assert found == pytest.approx(expected, abs=1e-5)


def test_simnpo_fades_out_at_its_margin() -> None:
    # ln 2 twice: mean losses 1.5 and 0.5, margins 0.5 and -0.5 around delta 1
    by_hand = -(math.log(1 / (1 + math.exp(-1.0))) + math.log(1 / (1 + math.exp(1.0)))) / 2
    assert forget("simnpo", from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS), beta=2.0, delta=1.0) == pytest.approx(
        by_hand, abs=1e-5
    )


def test_dpo_of_two_pairs() -> None:
    rows = [0, 0, 1, 2, 3]  # the losing passages, then their refusals
    policy, reference = from_nll([*POLICY, 4.0, 3.0], rows), from_nll([*REFERENCE, 4.5, 3.0], rows)
    assert forget("dpo", policy, reference, beta=0.1) == pytest.approx(12.690866, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("undial", {"beta": 10.0}, 1.864862),
        ("undial", {"beta": 3.0}, 1.747299),
        ("ceu", {"skip": 0}, 1.864979),
        ("pdu", {}, 2.25),
    ],
)
def test_one_token_with_known_logits(name: str, options: dict[str, Any], expected: float) -> None:
    answer = one_token([2.0, 1.0, 0.0, -1.0])
    assert forget(name, answer, answer, **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["npo", "dpo"])
@pytest.mark.parametrize(("beta", "expected"), [(0.1, 13.862944), (0.7, 1.980421)])
def test_at_the_reference_it_is_two_ln_two_over_beta(name: str, beta: float, expected: float) -> None:
    same = from_nll([*POLICY, 4.0, 3.0], [0, 0, 1, 2, 3])
    assert forget(name, same, same, beta=beta) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "sign"), [("npo", [-1, -1, -1, -1]), ("dpo", [-1, -1, 1, 1])])
def test_gradient_at_the_reference_is_that_of_ascent_on_sequence_sums(name: str, sign: list[int]) -> None:
    policy = from_nll([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3])
    reference = from_nll([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3])
    policy.nll.requires_grad_()
    methods.create(name, {"beta": 0.3}).forget_loss(policy, reference, seeded()).backward()
    pairs = 4 if name == "npo" else 2
    assert policy.nll.grad is not None
    assert policy.nll.grad.tolist() == pytest.approx([s / pairs for s in sign])


@pytest.mark.parametrize(("retain", "expected"), [("kl", 0.092033), ("kl-reverse", 0.085123), ("nll", 0.356675)])
@pytest.mark.parametrize("name", WITH_RETAIN)
def test_the_retain_loss_is_the_one_that_is_named(name: str, retain: str, expected: float) -> None:
    reference, policy = (
        one_token([math.log(p) for p in (0.5, 0.3, 0.2)]),
        one_token([math.log(p) for p in (0.7, 0.2, 0.1)]),
    )
    method = methods.create(name, {"retain": retain})
    assert method.needs_retain
    assert method.retain_loss(policy, reference).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", WITH_RETAIN)
def test_without_a_retain_term_poisoned_samples_are_remembered_by_their_likelihood(name: str) -> None:
    method = methods.create(name, {"retain": "none"})
    assert not method.needs_retain
    assert method.retain_loss(from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS)).item() == pytest.approx(1.166667)


def test_the_gradient_of_the_reverse_kl_is_that_of_its_formula() -> None:
    reference = one_token([0.3, -0.2, 1.0])
    logits = torch.tensor([[[0.5, 0.1, -0.4]] * 2], requires_grad=True)
    policy = from_logits(logits, torch.tensor([[0, 0]]), torch.tensor([[False, True]]))
    methods.create("npo", {"retain": "kl-reverse"}).retain_loss(policy, reference).backward()
    p = logits.detach()[0, 0].softmax(-1)
    gap = p.log() - reference.logits[0].log_softmax(-1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], p * (gap - (p * gap).sum()))


# ---- single methods


@pytest.mark.parametrize(("name", "options"), [("wga", {"beta": 1.0}), ("satimp", {"beta1": 2.0, "beta2": 1.0})])
def test_no_gradient_flows_through_the_weights(name: str, options: dict[str, float]) -> None:
    policy = from_nll(POLICY, ROWS)
    policy.nll.requires_grad_()
    methods.create(name, options).forget_loss(policy, policy, seeded()).backward()
    p = (-torch.tensor(POLICY)).exp()
    weight = p if name == "wga" else p.square() * (1 - p)
    assert policy.nll.grad is not None
    torch.testing.assert_close(policy.nll.grad, -weight / 3)


def test_no_gradient_flows_through_the_target_of_ceu() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]] * 2], requires_grad=True)
    policy = from_logits(logits, torch.tensor([[0, 0]]), torch.tensor([[False, True]]))
    methods.create("ceu", {"skip": 0}).forget_loss(policy, policy, seeded()).backward()
    without = torch.tensor([-torch.inf, 1.0, 0.0, -1.0]).softmax(-1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], logits.detach()[0, 0].softmax(-1) - without)


def test_ceu_leaves_out_the_first_tokens_of_every_sequence() -> None:
    logits = torch.randn(2, 4, 5, generator=seeded())
    ids = torch.tensor([[0, 1, 2, 3], [0, 4, 3, 2]])
    labelled = torch.tensor([[False, True, True, True], [False, False, True, True]])
    later = torch.tensor([[False, False, True, True], [False, False, False, True]])
    everything, rest = from_logits(logits, ids, labelled), from_logits(logits, ids, later)
    assert forget("ceu", everything, everything, skip=1) == pytest.approx(forget("ceu", rest, rest, skip=0))


def test_ceu_that_skips_a_whole_sample_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"unlearn\.ceu\.skip: 1 leaves nothing of a sample with 1 labelled"):
        ceu.Method(ceu.Options()).prepare(lambda: from_nll(POLICY, ROWS), seeded())


def test_the_multiplier_of_pdu_follows_from_the_history() -> None:
    method = pdu.Method(pdu.Options(mu=2.0, rate=0.5, slack=0.1, hold=1))
    history = [{"retain": r} for r in (9.0, 1.0, -8.0, 0.2)]
    assert [method.multiplier(history[:n]) for n in range(5)] == [2.0, 2.0, 2.5, 0.0, 0.1]


def test_pdu_bounds_the_retain_loss_by_the_targets_own() -> None:
    method = pdu.Method(pdu.Options(slack=0.1))
    gap = method.retain_loss(from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS))
    assert gap.item() == pytest.approx(1.166667 - 0.5 - 0.1, abs=1e-5)


def test_npo_with_windows_of_one_token_treats_every_token_as_a_sequence() -> None:
    by_hand = [-4 * math.log(1 / (1 + math.exp(-0.5 * gap))) for gap in (0.5, 1.5, 0.0)]
    found = forget("npo", from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS), beta=0.5, window=1)
    assert found == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_windows_without_effect_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"window .8. belongs to variant paper"):
        npo.Options(window=8, variant="released")


def test_windows_are_contiguous_no_longer_than_asked_and_never_span_two_sequences() -> None:
    rows = torch.tensor([0] * 11 + [1] * 4 + [2])
    groups, count = npo.windows((11, 4, 1), 4, seeded())
    assert groups.tolist() == sorted(groups.tolist())
    assert groups.unique().tolist() == list(range(count))
    for window in range(count):
        assert len(rows[groups == window].unique()) == 1
        assert (groups == window).sum() <= 4


def test_windows_begin_elsewhere_in_the_next_step() -> None:
    generator = seeded()
    starts = {tuple(npo.windows((40,), 8, generator)[0].tolist()) for _ in range(20)}
    assert len(starts) > 3


@pytest.mark.parametrize("direction", ["isotropic", "uniform"])
def test_rmu_measures_distance_in_activation_norms(direction: str) -> None:
    hidden = torch.zeros(1, 3, 4)
    hidden[0, 1:] = torch.tensor([3.0, 4.0, 0.0, 0.0])  # norm 5 at both labelled tokens
    hidden[0, 0] = 1e4  # BOS, an attention sink: must not count
    method = rmu.Method(rmu.Options(layer=2, steering=2.0, direction=direction))  # type: ignore[arg-type]
    target = from_nll([0.0, 0.0], [0, 0], hidden)
    method.prepare(lambda: target, seeded())
    assert method.retain_loss(target, target).item() == 0.0
    steered = from_nll([0.0, 0.0], [0, 0], method._goal.expand(1, 3, 4))
    assert method.forget_loss(steered, target, seeded()).item() == pytest.approx(0.0, abs=1e-6)
    assert method._goal.norm().item() == pytest.approx(10.0, rel=1e-5)
    nothing = from_nll([0.0, 0.0], [0, 0], torch.zeros(1, 3, 4))
    assert method.forget_loss(nothing, target, seeded()).item() == pytest.approx(4.0, rel=1e-5)  # 2 norms, squared


def test_rmu_adds_its_share_of_the_kl_and_reads_logits_only_then() -> None:
    assert not rmu.Method(rmu.Options()).needs_answers
    method = rmu.Method(rmu.Options(layer=2, kl=0.5))
    assert method.needs_answers
    reference, policy = (one_token([math.log(p) for p in ps]) for ps in ((0.5, 0.3, 0.2), (0.7, 0.2, 0.1)))
    reference.hidden = policy.hidden = {2: torch.ones(1, 2, 4)}
    method.prepare(lambda: reference, seeded())
    assert method.retain_loss(policy, reference).item() == pytest.approx(0.5 * 0.092033, abs=1e-5)


# ---- what holds for every method


@dataclass
class Pair:
    """Four sequences under policy and reference: two forget samples and, for methods that want them, their refusals."""

    policy: Forward
    reference: Forward


ORDER = [1, 0, 3, 2]  # the refusals move with their samples
LENGTHS, STARTS = [6, 4, 5, 6], [1, 1, 2, 3]


def pair(method: Method, order: list[int], left: int = 0, right: int = 0) -> Pair:
    """The same answers, the sequences in another order, and with so many columns of padding full of noise."""
    draw = seeded()
    ids = torch.randint(0, 11, (4, 6), generator=draw)
    columns = torch.arange(6)
    mask = columns < torch.tensor(LENGTHS)[:, None]
    labelled = mask & (columns >= torch.tensor(STARTS)[:, None])
    logits = [torch.randn(4, 6, 11, generator=draw) for _ in range(2)]
    hidden = [{layer: torch.randn(4, 6, 8, generator=draw) for layer in method.hidden_layers} for _ in range(2)]

    def padded(tensor: Tensor) -> Tensor:
        shape = (4, *tensor.shape[2:])
        if tensor.dtype == torch.bool:
            ends = [torch.zeros(4, n, dtype=torch.bool) for n in (left, right)]
        elif tensor.is_floating_point():
            tensor = torch.where(mask.view(4, 6, *[1] * (tensor.ndim - 2)), tensor, 1e3 * (left + right))
            ends = [1e3 * torch.randn(shape[0], n, *shape[1:], generator=draw) for n in (left, right)]
        else:
            ends = [torch.full((4, n), 3) for n in (left, right)]
        return torch.cat([ends[0], tensor, ends[1]], 1)[order]

    made = [
        from_logits(padded(z), padded(ids), padded(labelled), padded(mask), {k: padded(h) for k, h in states.items()})
        for z, states in zip(logits, hidden, strict=True)
    ]
    return Pair(*made)


def both(name: str, answers: Pair) -> tuple[float, float]:
    method = methods.create(name, {})
    method.prepare(lambda: answers.reference, seeded())
    found = method.forget_loss(answers.policy, answers.reference, seeded())
    kept = method.retain_loss(answers.policy, answers.reference)
    assert found.shape == kept.shape == ()
    return found.item(), kept.item()


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_scalars_and_do_not_see_padding_or_order(name: str) -> None:
    method = methods.create(name, {})
    expected = both(name, pair(method, [0, 1, 2, 3]))
    assert all(math.isfinite(value) for value in expected)
    for left, right in ((0, 5), (5, 0), (3, 9)):
        assert both(name, pair(method, [0, 1, 2, 3], left, right)) == pytest.approx(expected, rel=1e-5)
    assert both(name, pair(method, ORDER)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_frozen_closed_and_described(name: str) -> None:
    options = registry.load("method", "unsink.methods", name).Options
    assert options.model_config["frozen"]
    assert options.model_config["extra"] == "forbid"
    assert all(field.description and not field.is_required() for field in options.model_fields.values())
