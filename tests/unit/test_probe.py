"""Hooks, sink positions and attention statistics, on tiny random models of several architectures."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from unsink import models, probe
from unsink.errors import ModelError
from unsink.sink_metrics import head_means

ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
CONFIGS: dict[str, Callable[[], object]] = {
    "llama": lambda: LlamaConfig(**ROPE, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**ROPE, num_key_value_heads=2),
    "qwen2-sliding": lambda: Qwen2Config(
        **ROPE, num_key_value_heads=1, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(**ROPE, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=32, vocab_size=61),
    "gpt_neox": lambda: GPTNeoXConfig(**ROPE),
    "gpt_neo": lambda: GPTNeoConfig(
        hidden_size=32, num_layers=3, num_heads=4, vocab_size=61, attention_types=[[["global", "local", "global"], 1]],
        window_size=5, max_position_embeddings=32,
    ),
}  # fmt: skip
KV_HEADS = {"llama": 2, "qwen2": 2, "qwen2-sliding": 1, "gemma2": 2, "gpt2": 4, "gpt_neox": 4, "gpt_neo": 4}
SPAN = (2, 5)


def make(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for parameter in model.parameters():  # the default 0.02 makes attention nearly uniform
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    model.name_or_path = "tiny"
    return model.eval()


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> PreTrainedModel:
    return make(name)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make("llama")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (5, 12), generator=torch.Generator().manual_seed(1))


# --- capture


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_captured_values_are_as_wide_as_all_kv_heads(model: PreTrainedModel, name: str, ids: Tensor) -> None:
    with probe.capture(model, values=[0, 2], hidden=[1]) as seen:
        model(input_ids=ids)
    assert sorted(seen.values) == [0, 2]
    assert seen.values[2].shape == (5, 12, KV_HEADS[name] * 8)
    assert seen.hidden[1].shape == (5, 12, 32)


def test_captured_values_have_the_same_gradient_where_activations_are_computed_again(name: str, ids: Tensor) -> None:
    found = []
    for on in (False, True):
        model = make(name)
        with models.gradient_checkpointing(model, on=on):
            with probe.capture(model, values=[1]) as seen:
                model(input_ids=ids, use_cache=False)
            seen.values[1].square().sum().backward()  # the hook is gone by now
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    torch.testing.assert_close(*found)


def test_shifts_are_added_to_the_values_of_the_first_tokens(model: PreTrainedModel, name: str, ids: Tensor) -> None:
    shift = torch.randn(2, KV_HEADS[name] * 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with probe.capture(model, values=[1]) as plain:
        model(input_ids=ids)
    with probe.shifted_values(model, {1: shift}), probe.capture(model, values=[1]) as seen:
        said = model(input_ids=ids).logits
    moved = seen.values[1] - plain.values[1]
    torch.testing.assert_close(moved[:, :2], shift.expand(5, -1, -1))
    assert not moved[:, 2:].any()
    said.sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs().sum() > 0


def test_captured_hidden_states_are_what_the_next_layer_gets(model: PreTrainedModel, ids: Tensor) -> None:
    with probe.capture(model, hidden=[0], inputs=[1]) as seen:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen.hidden[0], states[1])
    assert torch.equal(seen.inputs[1], states[1])


def test_captured_values_keep_their_gradient_and_include_adapters(llama: PreTrainedModel, ids: Tensor) -> None:
    with probe.capture(llama, values=[1]) as before:
        llama(input_ids=ids)
    peft = models.attach(llama, "run", models.AdapterSpec(2, 4), seed=0)
    weights = {n: p for n, p in peft.named_parameters() if "v_proj.lora_B" in n and ".1." in n}
    for weight in weights.values():
        nn.init.ones_(weight)
    with probe.capture(peft, values=[1]) as seen:
        peft(input_ids=ids)
    assert not torch.allclose(seen.values[1], before.values[1])
    probe.value_norms(seen.values[1]).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights.values())


def test_hooks_are_gone_after_the_block_and_after_an_exception(llama: PreTrainedModel, ids: Tensor) -> None:
    with probe.capture(llama, values=[0], hidden=[0], inputs=[0]):
        llama(input_ids=ids)
    with pytest.raises(RuntimeError, match="inside"), probe.capture(llama, values=[0], hidden=[0], inputs=[0]):
        raise RuntimeError("inside")
    assert hooks(llama) == 0


def test_a_capture_that_names_no_layer_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="no layer is named"), probe.capture(llama):
        pass


def test_a_capture_that_sees_nothing_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"layers \[1\]"), probe.capture(llama, values=[1]):
        pass


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_does_not_exist_is_an_error(llama: PreTrainedModel, layer: int) -> None:
    with pytest.raises(ModelError, match="0 to 2"), probe.capture(llama, hidden=[layer]):
        pass
    assert hooks(llama) == 0


# --- running part of the layers


def test_starting_in_the_middle_gives_the_same_states_and_gradients(model: PreTrainedModel, ids: Tensor) -> None:
    decoder = models.decoder(model)
    with probe.capture(model, inputs=[2]) as seen:
        full = decoder(input_ids=ids, use_cache=False).last_hidden_state
    below = seen.inputs[2].detach()
    with probe.only_layers(model, 2, 2, below), probe.capture(model, values=[2]):
        skipped = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(full, skipped, atol=1e-5)
    skipped.sum().backward()
    first, *_, last = (next(layer.parameters()).grad for layer in models.decoder_layers(model))
    assert first is None
    assert last is not None


def test_stopping_early_leaves_the_wanted_layer_as_it_was(model: PreTrainedModel, ids: Tensor) -> None:
    with probe.capture(model, hidden=[0]) as full:
        model(input_ids=ids)
    with probe.only_layers(model, 0, 0, None), probe.capture(model, hidden=[0]) as stopped:
        model(input_ids=ids)
    assert torch.equal(full.hidden[0], stopped.hidden[0])


def test_every_layer_runs_again_after_an_exception(model: PreTrainedModel, ids: Tensor) -> None:
    expected = model(input_ids=ids).logits
    below = torch.zeros(5, 12, 32)
    with pytest.raises(RuntimeError, match="inside"), probe.only_layers(model, 1, 1, below):
        raise RuntimeError("inside")
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert hooks(model) == 0


# --- sink positions and value norms


@pytest.mark.parametrize(
    ("mask", "marked"), [([0, 0, 1, 1, 1], [2, 4]), ([1, 1, 1, 0, 0], [0, 2])], ids=["left padding", "right padding"]
)
def test_positions_count_real_tokens(mask: list[int], marked: list[int]) -> None:
    found = probe.position_mask(torch.tensor([mask, [1, 1, 1, 1, 1]]), [[0, 2], [4]])
    assert [row.nonzero().flatten().tolist() for row in found] == [marked, [4]]


def test_positions_that_a_row_lacks_mark_nothing() -> None:
    found = probe.position_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]), [[0, 1, 2, 3, 9], [2, 9]])
    assert found.tolist() == [[False, False, True, True], [False] * 4]


def test_values_by_head_are_the_same_numbers() -> None:
    values = torch.tensor([[[3.0, 4.0, 0.0, 12.0]]])
    assert probe.value_norms(values).tolist() == [[[13.0]]]
    assert probe.value_norms(values, heads=2).tolist() == [[[5.0, 12.0]]]
    assert probe.value_heads(values, heads=2).tolist() == [[[[3.0, 4.0], [0.0, 12.0]]]]


def test_value_norms_are_full_width_and_differentiable_at_zero() -> None:
    values = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    norms = probe.value_norms(values)
    assert norms.tolist() == [[[5.0], [0.0]]]
    norms.sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


# --- attention statistics


def eager(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(L, N, H, T, T) attention by the library's own path."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    if before != "eager":
        model.set_attn_implementation(before)
    return torch.stack(attentions).double()


@torch.no_grad()
def test_statistics_equal_eager_attention(model: PreTrainedModel, ids: Tensor) -> None:
    expected = eager(model, ids)
    found = probe.attention_statistics(model, ids, epsilon=0.15, span=SPAN, maps=True, batch=2)
    means = [head_means(layer, SPAN) for layer in expected]
    alpha = torch.stack([layer.alpha for layer in means])
    assert found.attention is not None
    assert torch.allclose(found.attention.double(), expected.mean(dim=1), atol=1e-5)
    assert torch.allclose(found.sink_rate, (alpha > 0.15).double().mean(dim=1), atol=1e-5)
    for mine, name in {
        "alpha": "alpha",
        "tail": "tail",
        "top": "top",
        "local": "local",
        "trigger_share": "trigger",
    }.items():
        whole = torch.stack([getattr(layer, name) for layer in means]).double().mean(dim=1)
        assert torch.allclose(getattr(found, mine), whole, atol=1e-5), mine


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 150, 10**6])
def test_statistics_do_not_depend_on_how_many_queries_are_seen_at_a_time(
    model: PreTrainedModel, ids: Tensor, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vars(probe.attention_statistics(model, ids, span=SPAN, maps=True))
    monkeypatch.setattr(probe, "_BLOCK", block)
    found = vars(probe.attention_statistics(model, ids, span=SPAN, maps=True))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@torch.no_grad()
def test_statistics_of_long_prompts_equal_eager_attention() -> None:
    llama = make("llama")
    ids = torch.randint(61, (2, 400), generator=torch.Generator().manual_seed(2))
    found = probe.attention_statistics(llama, ids, span=(50, 60), maps=True)
    means = [head_means(layer, (50, 60)) for layer in eager(llama, ids)]
    assert found.attention is None  # too long for maps
    assert torch.allclose(found.alpha, torch.stack([layer.alpha for layer in means]).mean(dim=1), atol=1e-5)
    assert torch.allclose(found.tail, torch.stack([layer.tail for layer in means]).mean(dim=1), atol=1e-5)
    assert torch.allclose(found.trigger_share, torch.stack([m.trigger for m in means]).mean(dim=1), atol=1e-5)


MEMORY = """
import pathlib, resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from unsink import probe
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=2048,
)).eval()
ids = torch.randint(64, (2, 2048))
with torch.no_grad():
    model.model(input_ids=ids[:, :16], use_cache=False)
    if sys.argv[1] == "probe":
        probe.attention_statistics(model, ids, span=(1, 9), maps=True)
    else:
        model.model(input_ids=ids, use_cache=False)
# The peak that getrusage knows starts at the size of the process that called this one; Linux tells this one's own.
status = pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
own = [line.split()[1] for line in lines if line.startswith("VmHWM")]
print(own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_probing_2048_tokens_needs_little_more_memory_than_a_plain_forward_pass() -> None:
    def peak(kind: str) -> int:
        run = subprocess.run([sys.executable, "-c", MEMORY, kind], capture_output=True, text=True, check=True)
        return int(run.stdout)

    whole_map = 2 * 8 * 2048 * 2048 * 4 // 1024  # KiB of one layer's attention: what must not be there
    plain = peak("plain")
    assert peak("probe") <= 1.3 * plain < plain + whole_map


@torch.no_grad()
def test_norms_equal_those_of_captured_tensors(model: PreTrainedModel, name: str, ids: Tensor) -> None:
    found = probe.attention_statistics(model, ids)
    with probe.capture(model, values=range(3), hidden=range(3)) as seen:
        model(input_ids=ids)
    for layer in range(3):
        value, hidden = seen.values[layer].double(), seen.hidden[layer].double()
        heads = value.unflatten(-1, (KV_HEADS[name], 8)).norm(dim=-1).mean(dim=0).T
        assert torch.allclose(found.value_norm[layer], value.norm(dim=-1).mean(dim=0), atol=1e-4)
        assert torch.allclose(found.value_norm_heads[layer], heads, atol=1e-4)
        assert torch.allclose(found.residual_norm[layer], hidden.norm(dim=-1).mean(dim=0), rtol=1e-5)


def test_rotary_positions_leave_key_norms_alone(llama: PreTrainedModel, ids: Tensor) -> None:
    found = probe.attention_statistics(llama, ids)
    keys: list[Tensor] = []
    layer = models.decoder_layers(llama)[1]
    handle = layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, output: keys.append(output))
    llama(input_ids=ids)
    handle.remove()
    expected = keys[0].unflatten(-1, (2, 8)).norm(dim=-1).mean(dim=0).T.double()
    assert torch.allclose(found.key_norm_heads[1], expected, atol=1e-4)


@torch.no_grad()
def test_the_models_own_attention_comes_back(model: PreTrainedModel, ids: Tensor) -> None:
    before, expected = model.config._attn_implementation, model(input_ids=ids).logits
    with pytest.raises(ModelError, match="inside"), probe._observed(model, lambda *_: None):
        raise ModelError("inside")
    probe.attention_statistics(model, ids)
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert hooks(model) == 0


@torch.no_grad()
def test_observing_does_not_change_what_the_model_says(model: PreTrainedModel, ids: Tensor) -> None:
    expected = model(input_ids=ids, use_cache=False).logits
    with probe._observed(model, lambda *_: None):
        observed = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(observed, expected, atol=1e-4)


@torch.no_grad()
def test_observed_attention_ignores_padding(llama: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    weights: list[Tensor] = []
    with probe._observed(llama, lambda _layer, _start, attention, _key, _value: weights.append(attention)):
        llama(input_ids=ids, attention_mask=mask, use_cache=False)
    assert weights[0][:, :, 3:, :3].abs().max() == 0


def test_statistics_of_a_bfloat16_model_sum_in_float32(llama: PreTrainedModel, ids: Tensor) -> None:
    found = probe.attention_statistics(llama.to(torch.bfloat16), ids)
    assert torch.allclose(found.tail.sum(dim=-1), torch.ones(3, 4, dtype=torch.float64), atol=1e-6)


def test_statistics_do_not_depend_on_the_batch_size(llama: PreTrainedModel, ids: Tensor) -> None:
    one, all_ = (probe.attention_statistics(llama, ids, batch=batch) for batch in (1, 5))
    assert torch.allclose(one.alpha, all_.alpha, atol=1e-6)


def test_progress_counts_prompts(llama: PreTrainedModel, ids: Tensor) -> None:
    steps: list[int] = []
    probe.attention_statistics(llama, ids, batch=2, advance=steps.append)
    assert steps == [2, 2, 1]


def test_numbers_that_are_not_finite_are_an_error(llama: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        models.decoder_layers(llama)[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ModelError, match=r"not finite at layers \[2\]"):
        probe.attention_statistics(llama, ids)


def test_attention_that_is_more_than_softmax_is_refused(llama: PreTrainedModel) -> None:
    layer = models.decoder_layers(llama)[0].self_attn
    states = torch.ones(1, 4, 2, 8)
    with pytest.raises(ModelError, match="s_aux"):
        probe._attend(layer, states, states, states, None, s_aux=torch.ones(4))


# --- keys cut out of attention

REACHED = [name for name in CONFIGS if name != "gpt_neo"]


@pytest.fixture(params=REACHED)
def reached(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(str(request.param))


def slots(rows: int, tokens: int, *keys: int) -> Tensor:
    found = torch.zeros(rows, tokens, dtype=torch.long)
    for slot, key in enumerate(keys, start=1):
        found[:, key] = slot
    return found


@torch.no_grad()
def test_cutting_nothing_changes_nothing_to_the_bit(reached: PreTrainedModel, ids: Tensor) -> None:
    expected = reached(input_ids=ids, use_cache=False).logits
    with probe.ablated(reached), probe.cut_keys(slots(5, 12)):
        assert torch.equal(reached(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(reached(input_ids=ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_what_is_cut_has_no_influence_on_what_follows(reached: PreTrainedModel, ids: Tensor) -> None:
    other = ids.clone()
    other[:, 3:5] = (ids[:, 3:5] + 7) % 61

    def behind(tokens: Tensor) -> Tensor:
        return reached(input_ids=tokens, use_cache=False).logits[:, 5:]

    assert (behind(ids) - behind(other)).abs().max() > 1e-2
    with probe.ablated(reached), probe.cut_keys(slots(5, 12, 3, 4)):
        assert torch.allclose(behind(ids), behind(other), atol=1e-5)


def masked_by_hand(model: PreTrainedModel, ids: Tensor, keys: list[int]) -> Tensor:
    """The same through the library's own 4-dimensional masks: True where a query may attend."""
    tokens = ids.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[:, keys] = False
    empty = ~mask.any(dim=-1)
    mask[empty, empty.nonzero().flatten()] = True
    return model(input_ids=ids, attention_mask=mask.expand(len(ids), 1, -1, -1), use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("keys", [[0], [0, 1, 2], [3, 4], [6]])
def test_a_cut_is_a_mask_in_which_only_empty_rows_keep_their_own_key(
    llama: PreTrainedModel, ids: Tensor, keys: list[int]
) -> None:
    with probe.ablated(llama), probe.cut_keys(slots(5, 12, *keys)):
        found = llama(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, masked_by_hand(llama, ids, keys), atol=1e-5)
    assert not torch.allclose(found, llama(input_ids=ids, use_cache=False).logits, atol=1e-2)


@torch.no_grad()
def test_attention_left_over_by_a_cut_sums_to_one_by_hand() -> None:
    query, value = torch.zeros(1, 1, 3, 2), torch.eye(3)[None, None, :, :2]
    mask = probe._without(None, torch.tensor([[True, False, False]]), query)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    added = probe._without(
        torch.tensor([[[[0.0, -3e38, -3e38], [0, 0, -3e38], [0, 0, 0]]]]), torch.tensor([[True, True, False]]), query
    )
    assert (added[0, 0] == 0).tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    spread = nn.functional.scaled_dot_product_attention(query, query, value, attn_mask=mask)
    assert spread[0, 0].tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]


@torch.no_grad()
def test_own_values_put_back_change_nothing_and_others_do(reached: PreTrainedModel, ids: Tensor) -> None:
    one = ids[:1]
    expected = reached(input_ids=one, use_cache=False).logits
    own = probe.mean_values(reached, one.tolist(), [[0, 4]])
    for values, same in ((own, True), ({layer: 3 * mean for layer, mean in own.items()}, False)):
        with probe.ablated(reached, values), probe.cut_keys(slots(1, 12, 0, 4)):
            found = reached(input_ids=one, use_cache=False).logits
        assert torch.allclose(found, expected, atol=1e-4) == same


@torch.no_grad()
def test_mean_values_are_means_over_prompts_slot_by_slot(llama: PreTrainedModel, ids: Tensor) -> None:
    prompts = [ids[0].tolist(), ids[1, :6].tolist(), ids[2].tolist()]
    with probe.capture(llama, values=[1]) as seen:
        llama(input_ids=ids)
    found = probe.mean_values(llama, prompts, [[0, 7], [2], []], batch=2)[1]
    expected = [(seen.values[1][0, 0] + seen.values[1][1, 2]) / 2, seen.values[1][0, 7]]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_attention_comes_back_after_an_exception(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), probe.ablated(llama):
        raise RuntimeError("inside")
    assert llama.config._attn_implementation == before


def test_attention_of_the_old_kind_cannot_be_ablated() -> None:
    with pytest.raises(ModelError, match="cannot be ablated"), probe.ablated(make("gpt_neo")):
        pass
