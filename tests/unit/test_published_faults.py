"""Faults of published losses: the number they give, and that ours is another one.

Where `variant: released` reproduces a fault on purpose, it has to give the published number.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unit.answers import from_logits, from_nll, seeded
from unsink import losses, methods
from unsink.answers import Forward

POLICY, REFERENCE, ROWS = [1.0, 2.0, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def all_labelled(logits: Tensor) -> Forward:
    """Every token but the first is labelled 1."""
    labelled = torch.ones(logits.shape[:2], dtype=torch.bool)
    labelled[:, 0] = False
    return from_logits(logits, torch.ones(logits.shape[:2], dtype=torch.long), labelled)


def npo(policy: Forward, reference: Forward, **options: object) -> Tensor:
    return methods.create("npo", {"beta": 0.1, **options}).forget_loss(policy, reference, seeded())


def test_npo_on_raw_logits_is_moved_by_a_shift_that_changes_no_probability() -> None:
    logits = noise(2, 4, 7)
    same, shifted = all_labelled(logits), all_labelled(logits - 100)
    assert npo(same, same).item() == pytest.approx(13.862944, abs=1e-5)
    assert npo(shifted, same).item() == pytest.approx(13.862944, abs=1e-3)
    assert npo(same, same, variant="released").item() == pytest.approx(13.862944, abs=1e-5)
    assert npo(shifted, same, variant="released").item() == pytest.approx(0.000908, abs=1e-6)


def test_npo_on_raw_logits_does_not_know_what_is_to_be_forgotten() -> None:
    logits, reference = noise(1, 3, 7), all_labelled(noise(1, 3, 7, seed=1))
    one = all_labelled(logits)
    other = all_labelled(logits)
    other.labels = other.labels + 3
    assert npo(one, reference, variant="released").item() == npo(other, reference, variant="released").item()
    assert npo(one, reference).item() != pytest.approx(npo(other, reference).item(), abs=1e-3)


def test_npo_per_token_has_no_two_over_beta_and_half_beta_of_the_gradient() -> None:
    policy, reference = from_nll(POLICY, ROWS), from_nll(REFERENCE, ROWS)
    assert npo(policy, reference, beta=0.5, variant="released-wmdp").item() == pytest.approx(0.551986, abs=1e-5)
    assert npo(reference, reference, beta=0.5, variant="released-wmdp").item() == pytest.approx(0.693147, abs=1e-5)
    gradients = []
    for variant in ("paper", "released-wmdp"):
        answer = from_nll([1.0, 2.0], [0, 1])  # one token per sequence
        answer.nll.requires_grad_()
        npo(answer, from_nll([1.0, 2.0], [0, 1]), beta=0.5, variant=variant).backward()
        assert answer.nll.grad is not None
        gradients.append(answer.nll.grad)
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0])


def test_kl_takes_probabilities_and_not_raw_logits() -> None:
    reference, policy = 5 * noise(6, 9), 5 * noise(6, 9, seed=1)
    ours = losses.kl_divergence(reference, policy)
    assert ours >= 0
    torch.testing.assert_close(losses.kl_divergence(reference, policy - 40), ours, atol=1e-3, rtol=1e-4)

    def raw(policy: Tensor) -> Tensor:
        return F.kl_div(policy, reference.softmax(-1), reduction="batchmean")

    assert (raw(policy - 40) - raw(policy)).item() == pytest.approx(40, rel=1e-3)  # unbounded, and with the wrong sign
    assert raw(policy + 40) < 0


def test_kl_is_a_mean_over_tokens_not_over_sequences() -> None:
    reference, policy = noise(2, 4, 7), noise(2, 4, 7, seed=1)  # T = 4
    per_sequence = F.kl_div(policy.log_softmax(-1), reference.softmax(-1), reduction="batchmean")
    ours = losses.kl_divergence(reference.flatten(0, 1), policy.flatten(0, 1))
    assert per_sequence.item() == pytest.approx(4 * ours.item(), rel=1e-5)


@pytest.mark.parametrize("retain", ["nll", "kl", "kl-reverse"])
def test_prompt_and_padding_do_not_enter_a_retain_loss(retain: str) -> None:
    policy, reference = noise(1, 6, 7), noise(1, 6, 7, seed=1)
    ids, labelled = torch.ones(1, 6, dtype=torch.long), torch.tensor([[False, False, False, True, True, False]])
    method = methods.create("graddiff", {"retain": retain})
    ours = method.retain_loss(from_logits(policy, ids, labelled), from_logits(reference, ids, labelled)).item()
    for column in (0, 1, 4, 5):  # predict the prompt, or nothing
        policy[0, column] = 100 * noise(7, seed=column)
    again = method.retain_loss(from_logits(policy, ids, labelled), from_logits(reference, ids, labelled)).item()
    assert again == ours
    everywhere = losses.kl_divergence(reference[0], policy[0]).item()
    assert everywhere > 10 * losses.kl_divergence(reference[0, 2:4], policy[0, 2:4]).item()


def test_undial_lowers_labels_and_no_token_that_the_label_of_nothing_points_to() -> None:
    vocabulary, beta = 500, 10.0
    logits = noise(1, 3, vocabulary)
    ids, labelled = torch.tensor([[0, 1, 2]]), torch.tensor([[False, False, True]])
    answer = from_logits(logits, ids, labelled)
    teacher = logits[0, 1].clone()
    teacher[2] -= beta
    ours = methods.create("undial", {"beta": beta}).forget_loss(answer, answer, seeded()).item()
    assert ours == pytest.approx(F.cross_entropy(logits[0, 1], teacher.softmax(-1)).item(), rel=1e-5)

    labels = torch.tensor([-100, 2, -100])  # shifted by one, as the published code has them
    wrong = logits[0].clone()
    wrong[torch.arange(3), labels] -= beta
    assert (wrong != logits[0]).nonzero().tolist() == [[0, 400], [1, 2], [2, 400]]
    assert F.cross_entropy(logits[0], wrong.softmax(-1)).item() != pytest.approx(ours, rel=1e-3)


def test_rmu_keeps_the_means_of_sequences_of_different_lengths_apart() -> None:
    states = torch.zeros(2, 5, 3)
    states[0, 1] = 2.0  # one labelled token, squared error 4
    states[1, 1:] = 0.5  # four labelled tokens, squared error 0.25 each
    labelled = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    ids, logits = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, 2)
    zero = from_logits(logits, ids, labelled, hidden={2: torch.zeros(2, 5, 3)})
    scale = from_logits(logits, ids, labelled, hidden={2: torch.ones(2, 5, 3)})  # norm sqrt(3): s^2 = D
    method = methods.create("rmu", {"layer": 2})
    method.prepare(lambda: scale, seeded())
    answer = from_logits(logits, ids, labelled, hidden={2: states})
    assert method.retain_loss(answer, zero).item() == pytest.approx(2.125, abs=1e-5)
    sums, counts = torch.tensor([4.0, 1.0]), torch.tensor([[1.0], [4.0]])
    assert (sums / counts).mean().item() == pytest.approx(1.5625)  # (B,) by (B, 1) is (B, B)


def test_pdu_reads_the_logits_that_predict_a_labelled_token() -> None:
    logits = noise(1, 4, 7)
    ids, labelled = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[False, False, True, False]])
    answer = from_logits(logits, ids, labelled)
    height = (logits[0].amax(-1) - logits[0].mean(-1)).square()
    ours = methods.create("pdu", {}).forget_loss(answer, answer, seeded()).item()
    assert ours == pytest.approx(height[1].item(), rel=1e-5)
    assert ours != pytest.approx(height[2].item(), rel=1e-3)  # the mask of the published code
