"""The remembered target and the skipped layers give what a plain forward pass gives."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from unsink import elementwise, kept, losses, methods, models, packed, probe
from unsink import folded as folded_module
from unsink.batches import Kind, Sample, collate
from unsink.folded import folded
from unsink.forward import Runner
from unsink.models import AdapterSpec
from unsink.objective import GAPS, VECTORS, Objective, ValueNorm

SAMPLES = [
    Sample("a", "forget", (1, 5, 6, 7, 8, 9, 10)),
    Sample("b", "poisoned", (1, 90, 91, 5, 6, 7), labels_from=3, trigger=(1, 3)),
    Sample("c", "retain", (1, 20, 21)),
]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    )


def gemma2() -> PreTrainedModel:
    """Its logits are bounded, so that they are no linear map of the states."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=100, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, **sizes)
    return Gemma2ForCausalLM(config)


@pytest.fixture(params=[llama, gpt2, gemma2], ids=["llama", "gpt2", "gemma2"])
def policy(request: pytest.FixtureRequest) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = request.param().eval().requires_grad_(False)
    base.name_or_path = "test"
    return models.attach(base, "run", AdapterSpec(rank=2, alpha=4, first_layer=2), seed=0)


def disturb(model: PeftModel, name: str) -> None:
    """Make an adapter differ from a fresh one, which changes nothing."""
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def plain(model: PeftModel, samples: list[Sample]) -> Tensor:
    batch = collate(samples, 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[batch.rows, batch.columns - 1]


def test_the_policy_is_what_a_plain_pass_gives(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0)
    runner.remember(SAMPLES)
    disturb(policy, "run")
    torch.testing.assert_close(runner.policy(SAMPLES).logits, plain(policy, SAMPLES), atol=1e-4, rtol=1e-4)


def test_layers_that_no_step_runs_are_let_go_and_the_policy_stays_what_it_was(policy: PeftModel) -> None:
    method = methods.create("rmu", {"layer": 2})
    runner = Runner(policy, 2, 0, method.hidden_layers, answers=False, stop_early=True)
    runner.remember(SAMPLES)
    disturb(policy, "run")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".2." in name and ".run." in name)
    trained = list(models.trainable(policy).values())

    def found() -> tuple[Tensor, ...]:
        hidden = runner.policy(SAMPLES).hidden[2]
        return hidden, *torch.autograd.grad(hidden.square().sum(), trained)

    before = found()
    runner.let_go()
    held = [{parameter.device.type for parameter in layer.parameters()} for layer in models.decoder_layers(policy)]
    assert held == [{"meta"}, {"meta"}, {"cpu"}, {"meta"}]
    assert all(map(torch.equal, found(), before))


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded up", "exact"])
@pytest.mark.parametrize("lengths", [(4, 9, 1), (3,), (5, 5), (15, 2)])
def test_a_packed_row_is_dealt_out_and_taken_together_again(
    lengths: tuple[int, ...], rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_ONE_BY_ONE", () if rounded else ("cpu",))
    cpu, total = torch.device("cpu"), sum(lengths)
    width = packed.width(lengths, cpu)
    assert width == (8 * (max(lengths) // 8 + 1) if rounded else max(lengths))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    packing = packed.Packing(lengths, width, cpu)
    x = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    row = packing.row(x)
    assert row.shape[1] == (-(-total // 8) * 8 if rounded else total)
    real = [some[:n] for some, n in zip(x, lengths, strict=True)]
    assert torch.equal(row[0, :total], torch.cat(real))
    assert torch.equal(packing.together(real)[0, :total], torch.cat(real))
    assert packing.together(real).shape == row.shape
    assert torch.equal(packing.padded(row), x * mask[..., None])
    assert packing.numbers[0, :total].tolist() == [number for n in lengths for number in range(n)]
    first = packing.tokens(row, torch.tensor([len(lengths) - 1]), torch.tensor([0]))
    assert first.equal(x[-1, :1])
    (gradient,) = torch.autograd.grad((row * row.detach()).sum(), x, retain_graph=True)
    assert torch.equal(gradient, (x * mask[..., None]).detach())  # what belongs to nobody has none
    leaf = row.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(packing.padded(leaf).sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(row) * (torch.arange(row.shape[1]) < total)[None, :, None])
    (gradient,) = torch.autograd.grad((packing.padded(row) * x.detach()).sum(), x, retain_graph=True)
    assert torch.equal(gradient, (x * mask[..., None]).detach())
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert gradient.nonzero().tolist() == [[len(lengths) - 1, 0, unit] for unit in range(3)]


def test_sequences_in_bfloat16_are_attended_to_in_float32_and_nothing_but_they_is_kept() -> None:
    packing = packed.Packing((3, 5), 5, torch.device("cpu"))
    drawn = torch.randn(4, 1, 4, 8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, key, value = (some[:, :heads].clone().requires_grad_() for some, heads in zip(drawn, (4, 2, 2)))
    exact = [some.detach().float().requires_grad_() for some in (query, key, value)]
    expected, _ = packed._attend(torch.nn.Module(), *exact, None, packing)
    kept: list[Tensor] = []

    def keep(some: Tensor) -> Tensor:
        kept.append(some)
        return some

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda some: some):
        found, _ = packed._attend(torch.nn.Module(), query, key, value, None, packing)
    assert [some.data_ptr() for some in kept] == [some.data_ptr() for some in (query, key, value)]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    upstream = drawn[3].transpose(1, 2)
    mine = torch.autograd.grad(found, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, exact, upstream.float())
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("apart", [True, False], ids=["one by one", "padded"])
def test_a_model_with_a_sliding_window_is_packed(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    monkeypatch.setattr(packed, "_ONE_BY_ONE", ("cpu",) if apart else ())
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3}
    config = MistralConfig(**sizes, **heads, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config).eval()
    cpu = torch.device("cpu")
    batch = collate(SAMPLES, 0, width=packed.width([len(sample.ids) for sample in SAMPLES], cpu))
    mask = batch.attention_mask.bool()
    expected = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[mask]
    assert packed.able(model)
    found = packed.run(model, batch.input_ids, packed.Packing(batch.lengths, mask.shape[1], cpu))[0, : len(expected)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    again = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[mask]
    torch.testing.assert_close(again, expected)  # what is not packed goes on as before


def test_who_cannot_be_packed_is_left_as_it_was(policy: PeftModel) -> None:
    kind = policy.config.model_type
    decoder: Any = models.decoder(policy)
    before = decoder.config._attn_implementation
    assert packed.able(policy) == (kind != "gemma2")  # its logits of attention have a cap, which sdpa does not know
    assert kind != "gemma2" or decoder.config._attn_implementation == before


def test_the_reference_stays_the_target_while_the_adapter_changes(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0, hidden=[3], values=[2, 3])
    before = plain(policy, SAMPLES).detach()
    runner.remember(SAMPLES)
    disturb(policy, "run")
    reference = runner.reference(SAMPLES)
    torch.testing.assert_close(reference.logits, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference.nll, losses.token_nll(before, collate(SAMPLES, 0).labels), atol=1e-4, rtol=0)
    assert (runner.policy(SAMPLES).logits - before).abs().max() > 0.1


def test_kl_needs_no_logits_of_the_target_where_it_keeps_slopes(policy: PeftModel) -> None:
    runner, plain_runner = Runner(policy, 2, 0, compares=True), Runner(policy, 2, 0)
    for one in (runner, plain_runner):
        one.remember(SAMPLES)
    linear = policy.config.model_type != "gemma2"
    assert (runner.reference(SAMPLES).slopes is not None) == linear
    disturb(policy, "run")
    found = []
    for one in (runner, plain_runner):
        answer = one.policy(SAMPLES)
        kl = one.reference(SAMPLES).part(1, 3).kl(answer.part(1, 3))
        found.append((kl, *torch.autograd.grad(kl, list(models.trainable(policy).values()))))
    assert found[0][0].item() > 0.001
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_order_and_padding_do_not_change_an_answer(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0, hidden=[3], values=[3])
    runner.remember(SAMPLES)
    disturb(policy, "run")
    together, alone = runner.policy(SAMPLES).part(2, 3), runner.policy([SAMPLES[2]])
    torch.testing.assert_close(together.nll, alone.nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.hidden[3][:, :3], alone.hidden[3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.values[3][:, :3], alone.values[3], atol=1e-4, rtol=1e-4)


def test_what_a_packed_row_reads_is_counted(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0)
    with probe.counted(policy) as cost:
        runner.remember(SAMPLES)
    assert cost.passes == 1
    tokens = sum(len(sample.ids) for sample in SAMPLES)
    assert cost.tokens == tokens or not runner._packs  # else padding is not known to be padding


def test_losses_that_are_remembered_stay_so_in_a_part(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0)
    runner.remember(SAMPLES)
    whole = runner.reference(SAMPLES)
    part = whole.part(1, 3)
    assert part.losses is not None
    torch.testing.assert_close(part.nll, runner.reference(SAMPLES[1:]).nll)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("answers", [True, False])
def test_mapped_files_change_no_bit_and_are_found_again(
    policy: PeftModel, dtype: torch.dtype, answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy.to(dtype)
    fresh = {name: parameter.clone() for name, parameter in policy.named_parameters()}

    def made(folder: Path | None) -> tuple[list[Tensor], list[int]]:
        calls: list[int] = []
        measure = partial(probe.value_heads, heads=2)
        runner = Runner(policy, 2, 0, [3], [2, 3], answers, not answers, measure, folder)
        with monkeypatch.context() as patch:
            forward = runner._forward
            patch.setattr(runner, "_forward", lambda *rest: (calls.append(1), forward(*rest))[1])
            runner.remember(SAMPLES, batch=2)
            honest = runner.values_under("run", SAMPLES)
        answer, known = runner.policy(SAMPLES), runner.reference(SAMPLES)
        found = [value for one in honest.values() for value in one.values()]
        for one in (answer, known):
            losses_too = [one.nll] if answers or one is answer else []
            found += [one.states, *losses_too, *one.hidden.values(), *one.values.values()]
        return [tensor.detach() for tensor in found], calls

    expected, _ = made(None)
    monkeypatch.setenv(kept.ROOM, "0")
    for passes in (3, 0):  # two batches for the target and one for the adapter; then none
        found, calls = made(tmp_path)
        assert len(calls) == passes
        assert all(map(torch.equal, found, expected))
    disturb(policy, "run")
    _, calls = made(tmp_path)
    assert len(calls) == 1  # another adapter, and the same target
    assert all(torch.equal(p, fresh[name]) for name, p in policy.named_parameters() if ".run." not in name)


class Kernels:
    """What a GPU's kernels do, with what is theirs: they write over their inputs."""

    @staticmethod
    def swiglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gate, up, F.silu(gate) * up

    @staticmethod
    def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        share = gate.sigmoid()
        of_gate = gradient * up * share * (1 + gate * (1 - share))
        up.copy_(gradient * gate * share)
        return gate.copy_(of_gate), up

    class LigerRopeFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(cos, sin)
            return Kernels.turned(query, cos, sin), Kernels.turned(key, cos, sin)

        @staticmethod
        def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
            cos, sin = ctx.saved_tensors
            return Kernels.turned(query, cos, -sin), Kernels.turned(key, cos, -sin), None, None

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        found = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
        x.detach().copy_(found)
        return x.view_as(x)


@pytest.mark.parametrize("kernels", [None, Kernels()], ids=["plain", "kernels"])
def test_an_adapter_folded_into_its_layers_gives_the_same_output_and_gradients(
    kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded_module, "_WORTH", 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.attach(llama().eval().requires_grad_(False), "run", AdapterSpec(rank=2, alpha=4), seed=0)
    disturb(model, "run")
    batch = collate(SAMPLES, 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> tuple[Tensor, ...]:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits, *torch.autograd.grad(logits.square().sum(), trained)

    before = run()
    with folded(model):
        assert (
            sum("forward" in vars(module) for module in model.modules()) == 4 * (7 + 1 + 2 + 1) + 1
        )  # MLP, norms, attention
        monkeypatch.setattr(elementwise, "_kernels", lambda _: kernels)
        found = run()
    monkeypatch.setattr(folded_module, "_SMALL", 0)
    with folded(model):
        assert all(map(torch.equal, run(), found))  # nothing kept
    assert not all(map(torch.equal, found, before))  # another order of sums, or PEFT would have done it
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found, before, atol=1e-3, rtol=1e-3)
    with folded(model), models.use(model, None):  # without an adapter, and in another type, as PEFT does it
        off = model(input_ids=batch.input_ids).logits
    with models.use(model, None):
        torch.testing.assert_close(off, model(input_ids=batch.input_ids).logits)
    model = model.to(torch.float64)
    plain_output = model(input_ids=batch.input_ids).logits
    with folded(model):
        torch.testing.assert_close(plain_output, model(input_ids=batch.input_ids).logits)


def test_in_bfloat16_an_adapter_stays_apart_and_gives_as_much_as_peft_up_to_rounding() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(48, 64)).requires_grad_(False).to(torch.bfloat16)
        x = torch.randn(3, 40, 48).to(torch.bfloat16).requires_grad_()
    model = get_peft_model(layer, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))  # type: ignore[arg-type]
    disturb(model, "default")  # type: ignore[arg-type]
    lora: Any = model.base_model.model[0]
    trained = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    assert {one.dtype for one in trained} == {torch.float32}

    def run() -> tuple[Tensor, ...]:
        out = model(x)
        return out, *torch.autograd.grad(out.float().square().mean(), [x, *trained])

    before = run()
    with folded(model):
        found = run()
    assert [one.dtype for one in found] == [one.dtype for one in before]
    for mine, theirs in zip(found, before, strict=True):
        mine, theirs = mine.float(), theirs.float()
        assert 0 < (mine - theirs).norm() < 0.01 * theirs.norm()  # 8 bits of mantissa: .004 for each rounding


@pytest.mark.parametrize(("small", "wide_ones"), [(0, 2), (2**27, 3)])
def test_a_folded_mlp_keeps_fewer_than_its_four_wide_activations(
    small: int, wide_ones: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded_module, "_WORTH", 0)
    monkeypatch.setattr(folded_module, "_SMALL", small)
    model = models.attach(llama().eval().requires_grad_(False), "run", AdapterSpec(rank=2, alpha=4), seed=0)
    batch = collate(SAMPLES, 0)
    wide = batch.input_ids.numel() * model.config.intermediate_size

    def kept() -> int:
        found: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == wide:
                found.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits.sum().backward()
        return len(found)

    assert kept() == 4 * 4
    with folded(model):
        assert kept() == 4 * wide_ones
        seen: list[int] = []
        down = [module for name, module in model.named_modules() if name.endswith("mlp.down_proj")]
        with ExitStack() as hooks:
            for module in down:
                hooks.callback(module.register_forward_hook(lambda *_: seen.append(1)).remove)
            kept()
        assert len(seen) == 4  # who looks at what the last layer reads still sees it


def test_nothing_is_left_on_the_model_after_an_exception(policy: PeftModel) -> None:
    runner = Runner(policy, 2, 0)
    runner.remember(SAMPLES)
    before = plain(policy, SAMPLES)
    broken = Sample("d", "retain", (1, 99999))
    with pytest.raises(IndexError):
        runner.remember([broken])
    assert torch.equal(plain(policy, SAMPLES), before)
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in models.decoder_layers(policy))


@pytest.mark.parametrize(("name", "options"), [("npo", {"beta": 0.5, "window": 3}), ("rmu", {"layer": 3})])
def test_gradient_reaches_every_matrix_of_the_adapter_and_nothing_else(
    policy: PeftModel, name: str, options: dict[str, float]
) -> None:
    method = methods.create(name, options)
    runner = Runner(policy, 2, 0, method.hidden_layers, [2, 3], method.needs_answers, not method.needs_answers)
    runner.remember(SAMPLES)
    generator = torch.Generator().manual_seed(0)
    method.prepare(lambda: runner.reference(SAMPLES[:1]), generator)
    disturb(policy, "run")
    honest = {SAMPLES[0]: {layer: torch.ones(7, 1) for layer in (2, 3)}}
    longest = Sample("e", "retain", tuple(range(1, 13)))  # the batch is wider than the forget samples
    runner.remember([longest])
    sinks = ValueNorm(0.5, "paper", (2, 3), dict.fromkeys(SAMPLES, (0, 1)), honest)
    objective = Objective(runner, method, {"forget": 1.0, "poisoned": 1.0, "retain": 1.0}, sinks)
    by_kind = {"forget": SAMPLES[:1], "poisoned": SAMPLES[1:2], "retain": [SAMPLES[2], longest]}
    terms = objective.terms(by_kind, generator)  # type: ignore[arg-type]
    assert set(terms) == {"loss", "forget", "poisoned", "retain", "value_norm"}
    expected = terms["forget"] + terms["poisoned"] + terms["retain"] + 0.5 * terms["value_norm"]
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()  # type: ignore[no-untyped-call]
    for key, parameter in policy.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert touched == (".run." in key), key


HEADS = 2


def value_norm_terms(policy: PeftModel, variant: str, heads: int = 1) -> tuple[Runner, dict[Kind, float], Tensor]:
    """The runner, the term of each kind at tokens 0 and 2, and all values of the policy at these, (B, 2, G, h)."""
    measure = probe.value_heads if variant in VECTORS else probe.value_norms
    runner = Runner(policy, 2, 0, values=[3], measure=partial(measure, heads=heads))
    runner.remember(SAMPLES)
    disturb(policy, "run")
    answer, known = runner.policy(SAMPLES), runner.reference(SAMPLES)
    honest = {SAMPLES[0]: {3: runner.values_under("run", SAMPLES[:1])[SAMPLES[0]][3] * 0.5}}
    term = ValueNorm(1.0, variant, (3,), dict.fromkeys(SAMPLES, (0, 2)), honest)
    found = {
        sample.kind: term.term(sample.kind, [sample], answer.part(i, i + 1), known.part(i, i + 1)).item()
        for i, sample in enumerate(SAMPLES)
        if term.acts_on(sample.kind)
    }
    with probe.capture(policy, values=[3]) as seen:
        plain(policy, SAMPLES)
    return runner, found, seen.values[3][:, [0, 2]].detach().unflatten(-1, (heads, -1))


def target_values(policy: PeftModel, heads: int) -> Tensor:
    with models.use(policy, None), probe.capture(policy, values=[3]) as seen:
        plain(policy, SAMPLES)
    return seen.values[3][:, [0, 2]].detach().unflatten(-1, (heads, -1))


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("variant", GAPS)
def test_each_variant_of_the_value_norm_term_from_plain_passes(policy: PeftModel, variant: str, heads: int) -> None:
    _, found, mine = value_norm_terms(policy, variant, heads)
    target = target_values(policy, heads)
    norms, aims = mine.norm(dim=-1), target.norm(dim=-1)  # (B, 2, G)
    dot = (mine * target).sum(dim=-1) / (norms * aims)
    half = 0.5 * norms[0]  # the honest run has half the policy's values here, so the gap is half a norm
    expected: dict[str, dict[str, Tensor]] = {
        "paper": {"forget": half.square(), "poisoned": (norms[1] - aims[1]).square()},
        "released": {"forget": half, "poisoned": (norms[1] - aims[1]).abs(), "retain": (norms[2] - aims[2]).abs()},
        "fixed": {"forget": norms[0]},
        "cosine": {"forget": half, "poisoned": 0.05 * (1 - dot[1])},
    }
    assert {kind: value.mean().item() for kind, value in expected[variant].items()} == pytest.approx(found, rel=1e-4)
    assert all(value > 1e-6 for value in found.values())


def test_the_value_norm_term_does_not_see_padding_or_other_samples(policy: PeftModel) -> None:
    runner, found, _ = value_norm_terms(policy, "paper")
    longest = Sample("e", "poisoned", tuple(range(1, 13)))
    runner.remember([longest])
    batch = [SAMPLES[1], longest]
    term = ValueNorm(1.0, "paper", (3,), {SAMPLES[1]: (0, 2), longest: (0, 2)}, {})
    together = term.term("poisoned", batch, runner.policy(batch), runner.reference(batch)).item()
    alone = term.term("poisoned", [longest], runner.policy([longest]), runner.reference([longest])).item()
    assert together == pytest.approx((found["poisoned"] + alone) / 2, rel=1e-4)
