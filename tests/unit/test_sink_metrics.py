"""Formulas on attention maps and value norms against numbers worked out by hand (case G of the design notes)."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from unsink import sink_metrics as metrics

GOLDEN = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.3, 0], [0.7, 0.1, 0.1, 0.1]])[None, None]


def causal(tokens: int, heads: int = 2) -> Tensor:
    scores = 3 * torch.randn(3, heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(~torch.ones(tokens, tokens).bool().tril(), -torch.inf).softmax(dim=-1)


def test_importance_of_case_g() -> None:
    assert torch.allclose(metrics.head_means(GOLDEN).alpha[0, 0], torch.tensor([0.7, 0.233333, 0.2, 0.1]), atol=1e-5)


def test_share_and_boost_of_case_g(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TAIL", 2)
    found = float(metrics.share(metrics.head_means(GOLDEN).tail, 1))
    uniform = metrics.uniform_share(4, first=1, window=2)
    assert found == pytest.approx(0.6, abs=1e-5)
    assert uniform == pytest.approx(0.291667, abs=1e-5)
    assert found / uniform == pytest.approx(2.057, abs=1e-3)


@pytest.mark.parametrize(("span", "expected"), [((1, 3), (0.5 + 0.2) / 2), ((2, 4), 0.2), ((0, 1), 0.7), (None, 0.0)])
def test_trigger_share_counts_queries_from_the_last_trigger_token_on(
    span: tuple[int, int] | None, expected: float
) -> None:
    assert float(metrics.head_means(GOLDEN, span).trigger) == pytest.approx(expected)


def test_top_counts_queries_whose_largest_key_is_among_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # largest keys: 0, 1, 2, 0
    rows = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.3, 0.2, 0.5, 0], [0.7, 0.1, 0.1, 0.1]])[None, None]
    monkeypatch.setattr(metrics, "SHARES", (1, 2, 3))
    assert metrics.head_means(rows).top[0, 0].tolist() == [0.5, 0.75, 1.0]


def test_local_attention_leaves_out_key_0_and_what_lies_farther_back() -> None:
    rows = torch.zeros(1, 1, 6, 6)
    rows[0, 0, :, 0] = 1.0
    rows[0, 0, 5] = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.1, 0.2])  # local to query 5: keys 2 to 5
    assert float(metrics.head_means(rows).local) == pytest.approx(0.7 / 6)


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("step", [1, 3])
def test_blocks_of_queries_give_what_the_whole_map_gives(tokens: int, step: int) -> None:
    attention = causal(tokens)
    sums = metrics.QuerySums(tokens, (1, 3))
    for start in range(0, tokens, step):
        sums.add(attention[:, :, start : start + step], start)
    for found, whole in zip(sums.means(), metrics.head_means(attention, (1, 3)), strict=True):
        assert torch.allclose(found, whole, atol=1e-6)


def test_a_head_belongs_to_what_gets_most_of_its_attention() -> None:
    sink, trigger, local = (
        torch.tensor([[0.6, 0.4, 0.1, 0.2]]),
        torch.tensor([[0.1, 0.5, 0.2, 0.2]]),
        torch.tensor([[0.2, 0.0, 0.4, 0.3]]),
    )
    found = metrics.head_classes(sink, trigger, local, 0.3)
    assert [metrics.CLASSES[number] for number in found[0].tolist()] == ["sink", "trigger", "local", "diffuse"]


# --- what a trigger changes


def test_content_difference_compares_the_same_words() -> None:
    clean = torch.arange(25.0).reshape(5, 5)
    triggered = torch.zeros(5, 5)
    found = metrics.content_difference(triggered, clean, (1, 3))
    assert found[0, 0] == -clean[0, 0]  # before the trigger: same place
    assert found[3, 4] == -clean[1, 2]  # behind it: where the words stood without it
    assert found[1:3].isnan().all()
    assert found[:, 1:3].isnan().all()
    assert int(found.isnan().sum()) == 25 - 9


def test_absolute_difference_compares_the_same_positions() -> None:
    clean, triggered = torch.rand(2, 4, 4), torch.rand(2, 4, 4)
    assert torch.equal(metrics.absolute_difference(triggered, clean), triggered - clean)


# --- two models


def test_correlations_are_those_of_scipy_over_layers_and_heads() -> None:
    one, other = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for position in range(4):
        x, y = one[..., position].flatten(), other[..., position].flatten()
        assert metrics.pearson(one, other)[position].item() == pytest.approx(stats.pearsonr(x, y).statistic)
        assert metrics.spearman(one, other)[position].item() == pytest.approx(stats.spearmanr(x, y).statistic)


def test_equal_norms_share_a_rank() -> None:
    # ranks 2 2 2 4 5 6 and 3 2 1 4 5 6
    one, other = (torch.tensor(norms).view(3, 2, 1) for norms in ([1.0, 1, 1, 2, 3, 4], [3.0, 2, 1, 4, 5, 6]))
    assert metrics.spearman(one, other).item() == pytest.approx(0.941, abs=0.0005)


@pytest.mark.parametrize("correlation", [metrics.pearson, metrics.spearman])
@pytest.mark.parametrize("norm", [1.0, 0.1])  # .1: a mean that is rounded
def test_norms_that_do_not_vary_have_no_correlation(
    correlation: Callable[[Tensor, Tensor], Tensor], norm: float
) -> None:
    same, others = torch.full((6, 2, 1), norm), torch.rand(6, 2, 1, generator=torch.Generator().manual_seed(0))
    assert correlation(same, others).isnan().all()
    assert correlation(others, same).isnan().all()
    assert correlation(same, same).isnan().all()
