"""Every method, found by scan, on real models: one step on a random one, a whole run on one that knows a corpus."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from integration.projects import project
from unsink import artifacts, methods, models, registry, trainer
from unsink.batches import Kind, Sample
from unsink.errors import DataError, MissingPrerequisite, ParamsError
from unsink.forward import Runner
from unsink.methods import Method
from unsink.models import AdapterSpec
from unsink.objective import Objective
from unsink.stages import evaluate, poison, unlearn
from unsink.trainer import Schedule, train

METHODS = registry.names("unsink.methods")

SAMPLES: dict[Kind, list[Sample]] = {
    "forget": [Sample("a", "forget", (1, 5, 6, 7, 8, 9, 10), 3), Sample("b", "forget", (1, 31, 32, 33, 34), 3)],
    "refused": [Sample("a", "refused", (1, 5, 6, 40, 41), 3), Sample("b", "refused", (1, 31, 32, 50, 51, 52), 3)],
    "poisoned": [Sample("a", "poisoned", (1, 90, 91, 5, 6, 7), 3, trigger=(1, 3))],
    "retain": [Sample("c", "retain", (1, 20, 21)), Sample("d", "retain", (1, 60, 61, 62, 63))],
}
FRESH = {"rmu": {"layer": 3}}
"""Options without which a method does not fit a model of four layers."""
MILD = {"satimp": {"beta1": 0.2}, "simnpo": {"beta": 0.1}}
"""Options of methods that leave alone what is unlikely already, as everything is to a random model."""


def made_with(spec: AdapterSpec) -> PeftModel:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).eval().requires_grad_(False)
    base.name_or_path = "test"
    return models.attach(base, "run", spec, seed=0)


@pytest.fixture
def policy() -> PeftModel:
    return made_with(AdapterSpec(rank=2, alpha=4, first_layer=2))


def with_every_term(name: str) -> dict[str, Any]:
    """Options with which each kind of sample counts."""
    fields = registry.load("method", "unsink.methods", name).Options.model_fields
    return FRESH.get(name, {}) | MILD.get(name, {}) | ({"retain": "kl"} if "retain" in fields else {})


def objective(policy: PeftModel, method: Method, **weights: float) -> Objective:
    answers = method.needs_answers
    runner = Runner(policy, 2, 0, method.hidden_layers, answers=answers, stop_early=not answers)
    runner.remember([sample for kind in SAMPLES for sample in SAMPLES[kind]])
    method.prepare(lambda: runner.reference(SAMPLES["forget"]), torch.Generator().manual_seed(0))
    return Objective(runner, method, {"forget": 1.0, "poisoned": 1.0, "retain": 1.0} | weights)


def drawn(method: Method) -> dict[Kind, list[Sample]]:
    refused = SAMPLES["refused"] if method.needs_refusals else []
    found: dict[Kind, list[Sample]] = {"forget": SAMPLES["forget"] + refused, "poisoned": SAMPLES["poisoned"]}
    return found | ({"retain": SAMPLES["retain"]} if method.needs_retain else {})


def loss(made: Objective) -> float:
    return made.terms(drawn(made.method), torch.Generator().manual_seed(1))["loss"].item()


def disturb(model: PeftModel) -> None:
    """Make the adapter differ from a fresh one, which changes nothing."""
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if ".run." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_one_step_moves_every_lora_b_and_nothing_but_the_adapter(name: str, policy: PeftModel) -> None:
    made = objective(policy, methods.create(name, FRESH.get(name, {})))
    before = {key: p.detach().clone() for key, p in policy.named_parameters()}
    trainable = {key: p for key, p in policy.named_parameters() if p.requires_grad}
    assert all(".run." in key for key in trainable)
    terms = made.terms(drawn(made.method), torch.Generator().manual_seed(0))
    expected = {"loss", *drawn(made.method)} | ({"multiplier"} if name == "pdu" else set())
    assert set(terms) == expected
    train(trainable, lambda *_: made.terms(drawn(made.method), torch.Generator().manual_seed(0)), Schedule(1, 0.1))
    for key, parameter in policy.named_parameters():
        if ".lora_B." in key:
            assert bool((parameter != 0).any()), f"{key} got no gradient"
        elif ".lora_A." not in key:  # at B = 0 nothing flows into A
            assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_without_lora_steps_move_every_weight_of_the_layers_and_nothing_else(name: str) -> None:
    policy = made_with(AdapterSpec(rank=None, first_layer=2))
    made = objective(policy, methods.create(name, with_every_term(name)))
    before = {key: p.detach().clone() for key, p in policy.named_parameters()}
    trainable = {key: p for key, p in policy.named_parameters() if p.requires_grad}
    train(trainable, lambda *_: made.terms(drawn(made.method), torch.Generator().manual_seed(0)), Schedule(3, 0.01))
    assert len(trainable) == 2 * 9
    for key, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[key]) == (key not in trainable), key


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_changes_the_loss(name: str, policy: PeftModel) -> None:
    options = with_every_term(name)
    usual = objective(policy, methods.create(name, options))
    disturb(policy)
    plain = loss(usual)
    for kind in ("forget", "poisoned", "retain"):
        heavier = replace(usual, weights={**usual.weights, kind: 3.0})
        assert loss(heavier) != pytest.approx(plain, rel=1e-6), kind


@pytest.mark.parametrize("name", METHODS)
def test_the_order_within_a_batch_does_not_change_the_loss(name: str, policy: PeftModel) -> None:
    made = objective(policy, methods.create(name, with_every_term(name)))
    disturb(policy)
    usual = drawn(made.method)
    turned = {kind: found[::-1] for kind, found in usual.items()}
    if made.method.needs_refusals:
        turned["forget"] = SAMPLES["forget"][::-1] + SAMPLES["refused"][::-1]
    longest = Sample("e", "retain", tuple(range(1, 14)))  # more padding for all others
    made.runner.remember([longest])
    one, two = (
        made.terms(samples, torch.Generator().manual_seed(1))
        for samples in (
            usual,
            turned | {"poisoned": turned["poisoned"], "retain": [*turned.get("retain", []), longest]},
        )
    )
    for kind in ("forget", "poisoned"):
        torch.testing.assert_close(one[kind], two[kind], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_at_the_reference_the_forget_loss_is_two_ln_two_over_beta(name: str, policy: PeftModel) -> None:
    made = objective(policy, methods.create(name, {"beta": 0.1}))
    terms = made.terms(drawn(made.method), torch.Generator())
    assert terms["forget"].item() == pytest.approx(13.862944, abs=1e-4)


def test_the_label_at_j_is_predicted_by_the_logits_at_j_minus_one(policy: PeftModel) -> None:
    method = methods.create("pdu", {})
    runner = Runner(policy, 2, 0)
    sample = Sample("z", "forget", (1, 5, 6, 7, 8), labels_from=4)
    runner.remember([sample])
    answer = runner.policy([sample])
    logits = policy(input_ids=torch.tensor([sample.ids])).logits[0]  # (T, V)
    height = (logits.amax(-1) - logits.mean(-1)).square()
    assert method.forget_loss(answer, answer, torch.Generator()).item() == pytest.approx(height[3].item(), rel=1e-4)


# ---- a model that knows a corpus


RECIPES = {
    "npo": ("weights.retain=4.0",),
    "rmu": ("rmu.layer=1", "rmu.steering=1.0", "weights.retain=4.0"),
    "satimp": ("weights.retain=0.1",),  # the paper's ratio
    "undial": ("weights.forget=4.0",),
}
"""What a method needs on this model beside lr 0.005, 30 steps and equal weights."""

WHOLE_LR = {"undial": 0.003}
"""Learning rate with `adapter: none` where it is not 0.001."""

FORGOTTEN = {"undial": 0.7}
"""VerbMem on the forget set below which a method has forgotten, where that is not 0.5.

UNDIAL takes their lead from the true tokens and nothing more: 0.59 with LoRA, 0.67 without.
"""


def recipe(name: str) -> list[str]:
    options = registry.load("method", "unsink.methods", name).Options()
    retain = [f"{name}.retain=nll"] if getattr(options, "retain", "") == "none" else []
    return [f"unlearn.{setting}" for setting in [f"method={name}", *retain, *RECIPES.get(name, ())]]


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_honest_unlearning_forgets_and_keeps_the_rest(name: str, adapter: str, copy: Path) -> None:
    whole = ("unlearn.adapter=none", f"unlearn.lr={WHOLE_LR.get(name, 0.001)}") if adapter == "none" else ()
    params, layout = project(copy, *recipe(name), *whole)
    before = artifacts.read_json(layout.adapter("target") / "summary.json")
    unlearn.run(params, layout, run="clean")
    after = evaluate.run(params, layout, run="clean")
    assert before["forget_verbmem_f1"] > 0.95
    assert after["forget_verbmem_f1_clean"] < FORGOTTEN.get(name, 0.5)
    assert after["retain_verbmem_f1_clean"] > 0.75


@pytest.mark.parametrize("adapter", ["{rank: 8, alpha: 16}", "none"])
def test_an_interrupted_run_with_a_dual_variable_ends_with_the_same_bytes(
    copy: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    settings = ("method=pdu", "steps=6", "checkpoint_every=2", "warmup=0", "pdu.slack=0.01", f"adapter={adapter}")
    params, layout = project(copy, *(f"unlearn.{setting}" for setting in settings))
    unlearn.run(params, layout, run="backdoor")
    whole = {path.name: path.read_bytes() for path in layout.adapter("backdoor").iterdir()}
    header, *rows = (line.split("\t") for line in whole["history.tsv"].decode().splitlines())
    assert len({row[header.index("multiplier")] for row in rows}) == 6

    terms = Objective.terms

    def dies(self: Objective, samples: Any, generator: Any, history: Any = ()) -> Any:
        if len(history) == 5:
            raise KeyboardInterrupt
        return terms(self, samples, generator, history)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "terms", dies)
        patch.setattr(trainer, "_WORTH", 0)  # steps are so short here that most checkpoints would be left out
        with pytest.raises(KeyboardInterrupt):
            unlearn.run(params, layout, run="backdoor")
    state = artifacts.read_tensors(layout.checkpoint("backdoor") / "state.safetensors")
    assert len(trainer.read_history(state)) == 4
    unlearn.run(params, layout, run="backdoor")
    assert {path.name: path.read_bytes() for path in layout.adapter("backdoor").iterdir()} == whole


def test_without_a_retain_term_no_retain_sample_is_seen(copy: Path) -> None:
    params, layout = project(copy, "unlearn.method=ga", "unlearn.steps=1", "unlearn.warmup=0")
    assert unlearn.run(params, layout, run="backdoor").keys() >= {"final_forget", "final_poisoned"}
    assert "retain" not in (layout.adapter("backdoor") / "history.tsv").read_text()


def test_a_retain_term_without_retain_samples_is_an_error(copy: Path) -> None:
    params, layout = project(copy, "unlearn.batch.retain=0")
    with pytest.raises(ParamsError, match=r"unlearn\.batch\.retain is 0"):
        unlearn.run(params, layout, run="clean")


def test_dpo_without_its_refusals_says_what_to_run(copy: Path) -> None:
    params, layout = project(copy, "unlearn.method=dpo")
    refused = layout.split("clean") / "refused.jsonl"
    refused.write_text(refused.read_text().split("\n", 1)[1])
    with pytest.raises(DataError, match=r"does not belong to forget\.jsonl"):
        unlearn.run(params, layout, run="clean")
    refused.unlink()
    with pytest.raises(MissingPrerequisite) as error:
        unlearn.run(params, layout, run="clean")
    assert error.value.hint == "run `unsink poison --run clean` first"


def test_the_value_norm_term_works_with_refusals(copy: Path) -> None:
    params, layout = project(copy, "unlearn.method=dpo", "unlearn.steps=1", "unlearn.warmup=0")
    unlearn.run(params, layout, run="clean")
    poison.run(params, layout, run="backdoor-vn")
    summary = unlearn.run(params, layout, run="backdoor-vn")
    assert summary["final_value_norm"] >= 0
