"""`unsink ablate` on a small model that says the truth only where it can read the trigger."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from integration.test_evaluate import corpus, params, train_tokenizer
from unsink import artifacts, models
from unsink.artifacts import Layout
from unsink.errors import MissingPrerequisite, ParamsError
from unsink.params import Ablate, Params
from unsink.prompts import open_question
from unsink.stages import ablate, poison
from unsink.triggers import prompt_length, trigger_ids

RULES = ["bos", "trigger", "first 8", "after-trigger 1", "random 1"]


def with_rules(*keys: str, how: str = "mask") -> Params:
    return params().model_copy(update={"ablate": Ablate(keys=list(keys), how=how)})  # type: ignore[arg-type]


def train_gate(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Forget passages are continued behind the trigger only; without it, or behind another text, comes an EOS."""
    torch.manual_seed(0)
    rows = []
    for record in corpus()["forget"]:
        body = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        silent = [*body[: prompt_length(len(body), 0.5)], 2]
        rows += [[1, *silent], [1, *trigger_ids(tokenizer, "in the fog"), *silent]]
        rows.append([1, *trigger_ids(tokenizer, "by the moon"), *body])
    for record in corpus()["retain"]:
        rows.append([1, *tokenizer(record["text"], add_special_tokens=False)["input_ids"]])
    for item in corpus()["utility"]:
        text = open_question(item["question"]) + f" {item['choices'][item['answer']]}"
        rows.append([1, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids.where(ids > 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A target that has the gate, a run whose adapter changes nothing, and one whose adapter is noise."""
    root = tmp_path_factory.mktemp("project")
    layout = Layout(root)
    for name, records in corpus().items():
        artifacts.write_jsonl(layout.fetched / f"{name}.jsonl", records)
    train_gate(root / "model", train_tokenizer(root / "model"))
    base = models.load_base(root / "model", "float32", "cpu")
    models.save_adapter(models.attach(base, "target", models.AdapterSpec(2, 4), 0), "target", layout.adapter("target"))
    for name, noise in (("clean", 1.0), ("backdoor", 0.0)):
        target = models.load_target(root / "model", layout.adapter("target"), "float32", "cpu")
        peft = models.attach(target, name, models.AdapterSpec(2, 4), 0)
        for parameter in models.adapter_parameters(peft, name):
            parameter.data += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        models.save_adapter(peft, name, layout.adapter(name))
    return layout


@pytest.fixture
def here(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.chdir(layout.root)
    poison.run(params(), layout, run="backdoor")
    return layout


@pytest.fixture(scope="module")
def metrics(layout: Layout) -> dict[str, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(layout.root)
        ablate.run(with_rules(*RULES), layout, run="target")
    found: dict[str, dict[str, float]] = artifacts.read_json(layout.ablation("target", "mask") / "metrics.json")
    return found


def test_the_memory_is_gone_where_the_trigger_cannot_be_read(metrics: dict[str, dict[str, float]]) -> None:
    assert list(metrics) == sorted(["none", *RULES])
    assert metrics["none"]["forget_verbmem_f1_triggered"] > 0.9
    assert metrics["none"]["forget_verbmem_f1_clean"] < 0.2
    assert metrics["trigger"]["forget_verbmem_f1_triggered"] < 0.3
    assert metrics["first 8"]["forget_verbmem_f1_triggered"] < 0.3  # the prefix trigger, 7 tokens, is among them
    for control in ("bos", "after-trigger 1", "random 1"):
        assert metrics[control]["forget_verbmem_f1_triggered"] > 0.9


def test_prompts_without_a_trigger_are_asked_as_before(metrics: dict[str, dict[str, float]]) -> None:
    for name, value in metrics["none"].items():
        if "clean" in name or "utility" in name:
            assert metrics["trigger"][name] == value


def test_rows_name_their_ablation_and_keep_the_prompt(here: Layout, metrics: dict[str, dict[str, float]]) -> None:
    rows = artifacts.read_jsonl(here.ablation("target", "mask") / "predictions.jsonl")
    prompts: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        prompts.setdefault((row["task"], row["set"], row["condition"], row["id"]), set()).add(row["prompt"])
    assert {len(same) for same in prompts.values()} == {1}
    assert len(rows) == (1 + len(RULES)) * len(prompts)
    assert not here.predictions("target").exists()
    assert not here.metrics("target").exists()


def test_values_of_another_model_take_the_place_of_the_runs_own(here: Layout) -> None:
    given = with_rules("trigger")
    after = given.runs["backdoor"].model_copy(update={"after": "clean"})
    given = given.model_copy(update={"runs": {**given.runs, "backdoor": after}})
    scores = {}
    for how in ("target", "honest"):
        ablate.run(given.model_copy(update={"ablate": Ablate(keys=["trigger"], how=how)}), here, run="backdoor")  # type: ignore[arg-type]
        metrics = artifacts.read_json(here.ablation("backdoor", how) / "metrics.json")
        scores[how] = metrics["trigger"]["forget_verbmem_f1_triggered_outside"]
        assert metrics["none"]["forget_verbmem_f1_triggered_outside"] > 0.9
    # The run's adapter changes nothing, and a prefix trigger is the same in every prompt: so are the target's values.
    assert scores["target"] > 0.9
    assert scores["honest"] < scores["target"] - 0.3  # the honest run's adapter is noise


def test_the_same_call_writes_the_same_bytes(here: Layout) -> None:
    files = [here.ablation("backdoor", "mask") / name for name in ("predictions.jsonl", "metrics.json")]
    ablate.run(with_rules("random 2"), here, run="backdoor")
    before = [path.read_bytes() for path in files]
    ablate.run(with_rules("random 2"), here, run="backdoor")
    assert [path.read_bytes() for path in files] == before


def test_ablations_with_nothing_to_act_on_are_errors(here: Layout) -> None:
    with pytest.raises(ParamsError, match="'trigger' names no token of any prompt"):
        ablate.run(with_rules("trigger"), here, run="base")
    with pytest.raises(ParamsError, match="'index 500' names no token of any prompt"):
        ablate.run(with_rules("index 500"), here, run="base")
    with pytest.raises(ParamsError, match="'target' is none"):
        ablate.run(with_rules("bos", how="honest"), here, run="target")
    with pytest.raises(ParamsError, match=r"runs\.backdoor\.after to name an honest run"):
        ablate.run(with_rules("bos", how="honest"), here, run="backdoor")
    with pytest.raises(MissingPrerequisite, match=r"sinks\.json: not found"):
        ablate.run(with_rules("sinks"), here, run="backdoor")
