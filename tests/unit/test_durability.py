"""Rounded weights, worked out by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unsink.durability import quantize, rounded


def test_weights_go_to_the_nearest_point_of_a_grid_that_ends_at_the_largest() -> None:
    found = rounded(torch.tensor([[3.0, -1.6, 0.4], [0.3, 0.0, -0.19]]), bits=3)  # steps of 1 and of 0.1
    torch.testing.assert_close(found, torch.tensor([[3.0, -2.0, 0.0], [0.3, 0.0, -0.2]]))


def test_each_group_of_inputs_has_its_own_scale_and_the_last_may_be_short() -> None:
    weight = torch.tensor([[1.0, 0.4, 0.1, 0.06, 0.02]])
    torch.testing.assert_close(rounded(weight, bits=2, group=2), torch.tensor([[1.0, 0.0, 0.1, 0.1, 0.02]]))


def test_a_row_of_zeros_stays() -> None:
    assert torch.equal(rounded(torch.zeros(2, 3), bits=8), torch.zeros(2, 3))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **shape)).eval()
    return made.requires_grad_(False)


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_weights_move_by_at_most_half_a_step_and_nothing_else_moves(model: PreTrainedModel, bits: int) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize(model, bits)
    for name, parameter in model.named_parameters():
        old = before[name]
        if parameter.dim() < 2 or "layers." not in name.replace(".h.", ".layers."):
            assert torch.equal(parameter, old), name
            continue
        inputs = 0 if model.config.model_type == "gpt2" else 1
        step = old.abs().amax(dim=inputs, keepdim=True) / (2 ** (bits - 1) - 1)  # of an output, so of its groups too
        assert not torch.equal(parameter, old), name
        assert ((parameter - old).abs() <= step / 2 + 1e-7).all(), name
        if bits == 8:
            whole = parameter / step
            torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
