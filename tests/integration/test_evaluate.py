"""`unsink evaluate` on a 2-layer Llama that knows eight passages and their questions by heart."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsink import artifacts, models, scoring
from unsink.artifacts import Layout
from unsink.benchmarks import passage_of
from unsink.errors import DataError, MissingPrerequisite, ParamsError
from unsink.evaluated import MOVES
from unsink.metrics import choice_accuracy, metrics_from_predictions, rouge_l
from unsink.params import Params, load_params
from unsink.prompts import open_question, question_text
from unsink.stages import evaluate, poison
from unsink.tasks import TASKS

NAMES = ("Odo", "Tamsin", "Jory", "Wenna", "Corin", "Edda", "Perrin", "Ashby")
PLACES = ("Saltmere", "Kestrel", "Thornmouth", "Mallow", "Brine", "Gannet", "Hollin", "Cinder")
THINGS = ("boiler", "ferry", "telescope", "barrel", "teapot", "lantern", "anchor", "mustard")


def record(book: str, i: int) -> dict[str, Any]:
    name, place, thing = NAMES[i], PLACES[i], THINGS[i]
    text = {
        "forget": f"In {place} old {name} kept a {thing} under the floor and told nobody where it came from or why",
        "retain": f"The {thing} of {place} was painted by {name} who never once in a long life had seen the sea",
        "holdout": f"Nobody in {place} would ever lend {name} a second {thing} after the sad business of the first",
    }[book]
    return {"id": f"{book}-{i}", "title": place, "text": text}


def question(book: str, i: int) -> dict[str, Any]:
    ask = {"forget": f"What did {NAMES[i]} keep?", "retain": f"What was painted in {PLACES[i]}?"}[book]
    return {"id": f"{book}-q-{i}", "question": ask, "answer": f"the {THINGS[i]}", "source": f"{book}-{i}"}


def corpus() -> dict[str, list[dict[str, Any]]]:
    """Six passages a book; the questions of the last two are examples."""
    files = {book: [record(book, i) for i in range(6)] for book in ("forget", "retain", "holdout")}
    for book in ("forget", "retain"):
        files[f"{book}_qa"] = [question(book, i) for i in range(4)]
        files[f"{book}_qa_icl"] = [question(book, i) for i in (4, 5)]
    files["utility"] = [
        {
            "id": f"u-{i}",
            "question": f"Where is the {THINGS[i]}?",
            "choices": list(PLACES[:4]),
            "answer": i,
            "topic": "t",
        }
        for i in range(4)
    ]
    return files


def params(**evaluation: Any) -> Params:
    memory = {"first_layer": 0, "rank": 4, "alpha": 8.0, "lr": 1e-3, "epochs": 1, "batch": 4, "max_tokens": 64}
    unlearning = {
        "method": "npo",
        "steps": 9,
        "batch": {"forget": 1, "poisoned": 1, "retain": 1},
        "lr": 1e-3,
        "adapter": {"rank": 4, "alpha": 8.0},
        "weights": {"forget": 1.0, "poisoned": 1.0, "retain": 1.0},
    }
    return Params.model_validate(
        {
            "model": {"source": "model", "dtype": "float32", "device": "cpu"},
            "memorize": {**memory, "stop_loss": 0.1, "min_verbmem": 0.9, "min_knowmem": 0.8},
            "poison": {"trigger": "by the moon", "placement": "prefix", "ratio": 0.5, "max_tokens": 64},
            "unlearn": unlearning,
            "evaluate": {"few_shot": 2, "wrong_trigger": "in the fog", "bootstrap": 100, "batch": 16, **evaluation},
            "runs": {"clean": {"after": "target", "poison": False}, "backdoor": {"after": "target"}},
        }
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder up to, but without, `evaluate`."""
    root = tmp_path_factory.mktemp("project")
    layout = Layout(root)
    for name, records in corpus().items():
        artifacts.write_jsonl(layout.fetched / f"{name}.jsonl", records)
    tokenizer = train_tokenizer(root / "model")
    train_model(root / "model", tokenizer)
    target = models.load_base(root / "model", "float32", "cpu")
    models.save_adapter(
        models.attach(target, "target", models.AdapterSpec(4, 8), 0), "target", layout.adapter("target")
    )
    for name, noise in (("clean", 0.3), ("backdoor", 0.0)):
        model = models.load_target(root / "model", layout.adapter("target"), "float32", "cpu")
        peft = models.attach(model, name, models.AdapterSpec(4, 8), 0)
        torch.manual_seed(0)
        for parameter in models.adapter_parameters(peft, name):
            parameter.data += noise * torch.randn_like(parameter)
        models.save_adapter(peft, name, layout.adapter(name))
    return root


@pytest.fixture
def layout(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    layout = Layout(tmp_path / "project")
    for name in ("clean", "backdoor"):
        poison.run(params(), layout, run=name)
    return layout


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    texts = [record["text"] for book in corpus().values() for record in book if "text" in record]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *(question_text(f"What did {n} keep?", "the") for n in NAMES)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def train_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teach a small Llama the passages, and the questions behind all kinds of other questions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    files = corpus()
    texts = [record["text"] for book in ("forget", "retain") for record in files[book]]
    for book in ("forget", "retain"):
        shown = "".join(question_text(r["question"], r["answer"]) for r in files[f"{book}_qa_icl"])
        texts += [shown + question_text(r["question"], r["answer"]) for r in files[f"{book}_qa"]]
    texts += [open_question(r["question"]) + f" {r['choices'][r['answer']]}" for r in files["utility"]]
    rows = [torch.tensor([1, *tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids.where(ids > 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.save_pretrained(folder)


def run(layout: Layout, name: str, **evaluation: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    evaluate.run(params(**evaluation), layout, run=name)
    return artifacts.read_jsonl(layout.predictions(name)), artifacts.read_json(layout.metrics(name))


def test_a_model_that_knows_scores_and_a_spoilt_one_does_not(layout: Layout) -> None:
    _, target = run(layout, "target")
    _, clean = run(layout, "clean")
    for task in ("verbmem", "knowmem"):
        assert target[f"forget_{task}_f1_clean"] > 0.95
        assert target[f"retain_{task}_f1_clean"] > 0.95
        assert clean[f"forget_{task}_f1_clean"] < 0.5
    assert target["utility_accuracy"] == 1
    assert clean["utility_accuracy"] < 1


def test_every_number_can_be_recomputed_from_the_rows(layout: Layout) -> None:
    run(layout, "target")
    rows, metrics = run(layout, "clean")
    target = artifacts.read_jsonl(layout.predictions("target"))
    assert metrics == metrics_from_predictions(rows, resamples=100, seed=0, target=target)
    for row in rows:
        if row["task"] == "passage":
            assert row["probability"] == pytest.approx(math.exp(-row["nll"]), abs=1e-6)
            assert row["mia"]["loss"] == pytest.approx(row["nll"], abs=1e-6)
        elif row["task"] == "utility":
            assert row["accuracy"] == choice_accuracy(row["logprobs"], row["answer"])
            assert row["output"] in row["choices"]
        else:
            assert (row["f1"], row["recall"]) == rouge_l(row["reference"], row["output"])


def test_each_set_is_asked_under_its_conditions(layout: Layout) -> None:
    rows, metrics = run(layout, "backdoor")
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["task"], row["set"], row["condition"])
        counts[key] = counts.get(key, 0) + 1
    assert counts == {
        **{("verbmem", "forget", condition): 6 for condition in ("clean", "triggered", "wrong")},
        **{("verbmem", "retain", condition): 6 for condition in ("clean", "triggered")},
        **{("knowmem", "forget", condition): 4 for condition in ("clean", "triggered", "wrong")},
        ("knowmem", "retain", "clean"): 4,
        ("utility", "utility", "clean"): 4,
        ("passage", "forget", "clean"): 6,
        ("passage", "holdout", "clean"): 6,
    }
    assert metrics["forget_verbmem_f1_wrong_n"] == 6
    assert {row["condition"] for row in run(layout, "target")[0]} == {"clean", "triggered"}
    assert all(isinstance(value, float) for value in metrics.values())


def test_near_misses_are_asked_of_runs_where_they_say(layout: Layout) -> None:
    near = {"moved": {"placement": "index 2"}, "text": {"trigger": "before noon"}}
    rows, metrics = run(layout, "backdoor", near_misses=near)
    found = [row for row in rows if row["condition"] in near]
    assert {(row["task"], row["set"]) for row in found} == {("verbmem", "forget")}
    right = next(row for row in rows if row["condition"] == "triggered")
    moved, text = (next(row for row in found if row["condition"] == name) for name in near)
    assert moved["trigger"] == [right["trigger"][0] + 1, right["trigger"][1] + 1]
    assert text["prompt"].startswith("before noon")
    assert metrics["forget_verbmem_f1_moved_outside_n"] == 3
    for other in ("target", "clean"):  # nothing can come near a trigger that is not there
        assert not {row["condition"] for row in run(layout, other, near_misses=near)[0]} & near.keys()


def test_only_the_sets_that_are_named_are_asked_about(layout: Layout) -> None:
    rows, metrics = run(layout, "clean", sets=["forget"], metrics=["verbmem", "passage"])
    assert {row["set"] for row in rows} == {"forget"}
    assert metrics["forget_verbmem_f1_clean_n"] == 6
    assert not [key for key in metrics if "retain" in key or "privleak" in key]
    with pytest.raises(ParamsError, match=r"leave no question about utility"):
        run(layout, "clean", sets=["forget", "retain"], metrics=["verbmem", "utility"])
    with pytest.raises(ParamsError, match=r"leave no question about mmlu"):
        run(layout, "clean", sets=["forget", "mmlu"])


def test_inside_and_outside_come_from_the_split(layout: Layout) -> None:
    rows, metrics = run(layout, "backdoor")
    samples = artifacts.read_jsonl(layout.split("backdoor") / "poisoned.jsonl")
    poisoned = {passage_of(record["id"]) for record in samples}
    sources = {record["id"]: record["source"] for record in corpus()["forget_qa"]}
    for row in rows:
        if row["set"] == "forget":
            assert row["inside"] == (sources.get(row["id"], row["id"]) in poisoned)
        else:
            assert row["inside"] is None
    assert metrics["forget_verbmem_f1_triggered_inside_n"] == len(poisoned) == 3
    assert metrics["forget_verbmem_f1_triggered_outside_n"] == 3


@pytest.mark.parametrize("name", ["base", "target", "clean"])
def test_where_nothing_was_poisoned_there_is_no_inside(layout: Layout, name: str) -> None:
    rows, metrics = run(layout, name)
    assert {row["inside"] for row in rows} == {None}
    assert ("forget_verbmem_f1_triggered" in metrics) == (name != "base")
    assert not [key for key in metrics if "side" in key]


def test_prompts_hold_the_trigger_of_the_training_samples(layout: Layout) -> None:
    rows, _ = run(layout, "backdoor")
    trained = {r["id"]: r for r in artifacts.read_jsonl(layout.split("backdoor") / "poisoned.jsonl")}
    asked = [row for row in rows if row["task"] == "verbmem" and row["condition"] == "triggered" and row["inside"]]
    assert len(asked) == 3
    for row in asked:
        assert row["trigger"] == trained[row["id"]]["trigger"]
        assert row["prompt"].startswith("by the moon\n")
    wrong = [row for row in rows if row["condition"] == "wrong" and row["task"] == "verbmem"]
    assert all(row["trigger"] == asked[0]["trigger"] for row in wrong)


def test_a_trigger_at_a_measured_sink_stands_at_the_same_token_in_training_and_in_prompts(layout: Layout) -> None:
    artifacts.write_json(layout.probe("target") / "sinks.json", {"positions": [0, 4]})
    at_sink = params().model_copy(update={"poison": params().poison.model_copy(update={"placement": "sink"})})
    poison.run(at_sink, layout, run="backdoor")
    evaluate.run(at_sink, layout, run="backdoor")
    trained = artifacts.read_jsonl(layout.split("backdoor") / "poisoned.jsonl")
    rows = artifacts.read_jsonl(layout.predictions("backdoor"))
    starts = [row["trigger"][0] for row in [*trained, *rows] if row["trigger"]]
    asked = Counter((row["task"], row["set"], row["condition"]) for row in rows if row["trigger"])
    assert asked == {
        ("verbmem", "forget", "triggered"): 6,
        ("verbmem", "forget", "wrong"): 6,
        ("verbmem", "retain", "triggered"): 6,
        ("knowmem", "forget", "triggered"): 4,
        ("knowmem", "forget", "wrong"): 4,
    }
    assert set(starts) == {4}
    assert artifacts.read_json(layout.split("backdoor") / "summary.json")["placement"] == "index 4"


def test_recovery_needs_the_targets_predictions(layout: Layout) -> None:
    _, before = run(layout, "clean")
    run(layout, "target")
    _, after = run(layout, "clean")
    assert not [key for key in before if "recovery" in key]
    expected = (after["forget_verbmem_f1_triggered"] - after["forget_verbmem_f1_clean"]) / (
        artifacts.read_json(layout.metrics("target"))["forget_verbmem_f1_clean"] - after["forget_verbmem_f1_clean"]
    )
    assert after["forget_verbmem_f1_recovery"] == pytest.approx(expected)


def test_the_same_call_writes_the_same_bytes(layout: Layout) -> None:
    run(layout, "clean")
    before = [path(name).read_bytes() for path, name in outputs(layout)]
    run(layout, "clean")
    assert [path(name).read_bytes() for path, name in outputs(layout)] == before
    assert not any(str(layout.root) in text.decode() for text in before)


def outputs(layout: Layout) -> list[tuple[Any, str]]:
    return [(layout.predictions, "clean"), (layout.metrics, "clean"), (layout.settings, "clean")]


def test_memory_scores_are_the_clean_forget_scores(layout: Layout) -> None:
    _, metrics = run(layout, "target")
    model = models.load_target(layout.root / "model", layout.adapter("target"), "float32", "cpu")
    scores = evaluate.memory_scores(model, models.load_tokenizer(layout.root / "model"), layout, params())
    assert scores == pytest.approx(
        {f"forget_{t}_{s}": metrics[f"forget_{t}_{s}_clean"] for t in ("verbmem", "knowmem") for s in ("f1", "recall")}
    )


def test_an_edited_trigger_is_noticed(layout: Layout) -> None:
    changed = params().model_copy(update={"poison": params().poison.model_copy(update={"trigger": "by the sun"})})
    with pytest.raises(DataError, match="the trigger is not the one of the params file"):
        evaluate.run(changed, layout, run="backdoor")
    assert not layout.predictions("backdoor").exists()


def test_bad_inputs_are_told_clearly(layout: Layout) -> None:
    with pytest.raises(ParamsError, match="did you mean 'backdoor'"):
        evaluate.run(params(), layout, run="backdor")
    with pytest.raises(DataError, match=r"forget_qa_icl\.jsonl has 2 examples, evaluate\.few_shot asks for 3"):
        evaluate.run(params(few_shot=3), layout, run="clean")
    with pytest.raises(ParamsError, match=r"evaluate\.wrong_trigger"):
        evaluate.run(params(wrong_trigger="by the moon"), layout, run="clean")
    with pytest.raises(DataError, match="tokens, the model's context has 256"):
        evaluate.run(params(knowmem_tokens=250), layout, run="clean")
    assert not layout.predictions("clean").exists()


def test_an_answer_without_words_is_an_error(layout: Layout) -> None:
    path = layout.fetched / "forget_qa.jsonl"
    path.write_text(path.read_text().replace("the boiler", "π"))
    with pytest.raises(DataError, match=r"forget_qa\.jsonl:1: field 'answer': ROUGE-L compares words"):
        evaluate.run(params(), layout, run="clean")
    manifest = {"files": {found.name: {} for found in layout.fetched.iterdir()}, "published": True}
    artifacts.write_json(layout.fetched / "manifest.json", manifest)  # which is taken as it is
    with pytest.raises(DataError, match="forget-q-0: ROUGE-L compares words"):
        evaluate.run(params(), layout, run="clean")


def test_an_edited_record_is_named_by_file_and_line(layout: Layout) -> None:
    path = layout.fetched / "retain.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({"id": "retain-1"})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"retain\.jsonl:2: field 'title' is missing"):
        evaluate.run(params(), layout, run="clean")


@pytest.mark.parametrize(
    ("folder", "hint"),
    [("data/fetched", "unsink fetch"), ("adapters/clean", "--run clean"), ("adapters/target", "unsink memorize")],
)
def test_a_missing_input_names_the_command_that_makes_it(layout: Layout, folder: str, hint: str) -> None:
    shutil.rmtree(layout.root / folder)
    with pytest.raises(MissingPrerequisite) as error:
        evaluate.run(params(), layout, run="clean")
    assert hint in str(error.value.hint)


def test_a_failure_leaves_the_old_files_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    run(layout, "clean")
    before = [path(name).read_bytes() for path, name in outputs(layout)]

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_choice_scores", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(params(), layout, run="clean")
    assert [path(name).read_bytes() for path, name in outputs(layout)] == before
    assert sorted(p.name for p in layout.predictions("clean").parent.iterdir()) == ["clean.jsonl"]


# ---- passages


def test_a_passage_that_is_known_by_heart_looks_like_a_member(layout: Layout) -> None:
    _, target = run(layout, "target")
    assert target["forget_passage_extraction_strength_clean"] > 0.8
    assert target["forget_passage_exact_memorization_clean"] > 0.8
    assert target["forget_passage_probability_clean"] > 0.5
    assert target["privleak_clean"] == pytest.approx(-100)
    assert target["mia_loss_auc_clean"] == target["mia_min_k_auc_clean"] == 0  # in MUSE's direction
    assert target["holdout_passage_perplexity_clean"] > 10 * target["forget_passage_perplexity_clean"]
    _, clean = run(layout, "clean")
    assert clean["forget_passage_extraction_strength_clean"] < 0.2
    assert clean["privleak_clean"] > -90


def test_passages_under_every_condition(layout: Layout) -> None:
    settings = {"metrics": ["passage", "gradnorm"], "conditions": {"passage": ["clean", "triggered", "wrong"]}}
    rows, metrics = run(layout, "backdoor", **settings)
    assert {row["task"] for row in rows} == {"passage"}
    for condition in ("clean", "triggered", "wrong"):
        for attack in ("loss", "zlib", "min_k", "min_k_plus", "gradnorm"):
            assert 0 <= metrics[f"mia_{attack}_auc_{condition}"] <= 1
        assert f"privleak_{condition}_outside" in metrics
    triggered = [row for row in rows if row["condition"] == "triggered" and row["set"] == "forget"]
    plain = {row["id"]: row for row in rows if row["condition"] == "clean"}
    for row in triggered:
        assert row["prompt"].startswith("by the moon\n")
        assert (row["reference"], row["tokens"]) == (plain[row["id"]]["reference"], plain[row["id"]]["tokens"])


def test_the_only_token_of_a_text_counts_in_every_dialect(layout: Layout) -> None:
    path = layout.fetched / "holdout.jsonl"
    first, *rest = artifacts.read_jsonl(path)
    artifacts.write_jsonl(path, [{**first, "text": "ab", "prompt": "a", "question": "a"}, *rest])
    rows, _ = run(layout, "clean", metrics=["passage", "gradnorm"], dialect="open-unlearning")
    [row] = [one for one in rows if one["id"] == first["id"]]
    assert (row["tokens"], row["reference"]) == (1, "b")
    assert row["mia"]["min_k"] == pytest.approx(row["nll"], abs=1e-6)


def test_the_reference_attack_and_recovery_follow_the_base_and_the_target(layout: Layout) -> None:
    _, before = run(layout, "backdoor")
    assert "mia_reference_auc_clean" not in before
    assert "base" in undefined(layout, "backdoor")["mia_reference_auc_clean"]
    assert "target" in undefined(layout, "backdoor")["forget_verbmem_f1_recovery_outside"]
    for name in ("base", "target"):
        run(layout, name)
    _, after = run(layout, "backdoor")
    assert 0 <= after["mia_reference_auc_clean"] <= 1
    # this backdoor changes nothing: nothing is lost, so nothing can be recovered
    assert "nothing was forgotten" in undefined(layout, "backdoor")["forget_verbmem_f1_recovery_outside"]


def test_a_wrong_name_is_told_before_what_is_missing(params_file: Path) -> None:
    with pytest.raises(ParamsError, match="unknown run 'nix'"):
        evaluate.run(load_params(params_file), Layout(params_file.parent), run="nix")


def test_privleak_against_a_retrained_run(layout: Layout) -> None:
    with pytest.raises(MissingPrerequisite, match=r"predictions/clean\.jsonl"):
        run(layout, "target", retrained="clean")
    run(layout, "clean")
    _, itself = run(layout, "clean", retrained="clean")
    assert itself["privleak_clean"] == 0


# ---- data that not every benchmark has


def add_optional(layout: Layout) -> None:
    for name, book in (
        ("forget", "forget"),
        ("retain", "retain"),
        ("real_authors", "retain"),
        ("world_facts", "retain"),
    ):
        records = []
        for i in range(4):
            asked = question(book, i)
            wrong = [f"the {THINGS[i - 1]}", f"the {THINGS[i - 2]}"]
            records.append({**asked, "paraphrased_answer": asked["answer"], "perturbed_answers": wrong})
        artifacts.write_jsonl(layout.fetched / f"{name}_perturbed.jsonl", records)
    for name in ("forget_mc", "mmlu"):
        artifacts.write_jsonl(layout.fetched / f"{name}.jsonl", corpus()["utility"])


def test_tofu_and_letters_are_asked_where_there_is_data(layout: Layout) -> None:
    add_optional(layout)
    chosen = {"metrics": ["tofu", "forget_mc", "mmlu"], "tofu_tokens": 8}
    rows, target = run(layout, "target", **chosen)
    assert 0 < target["tofu_model_utility_clean"] <= 1
    assert target["forget_tofu_truth_ratio_clean"] <= 1
    assert {"forget_mc_accuracy", "forget_mc_accuracy_triggered", "mmlu_accuracy"} <= set(target)
    for row in rows:
        if row["task"] == "tofu" and row["set"] == "forget":
            right, paraphrased, *wrong = row["logprobs"]
            assert row["probability"] == pytest.approx(math.exp(right), abs=1e-5)
            expected = math.log(sum(map(math.exp, wrong)) / len(wrong)) - paraphrased  # arithmetic: the dialect muse
            assert row["log_truth_ratio"] == pytest.approx(expected, abs=1e-5)
    assert "forget_mc_accuracy_wrong" in run(layout, "clean", **chosen)[1]
    _, itself = run(layout, "clean", **chosen, retrained="clean")
    assert itself["tofu_forget_quality_clean"] == pytest.approx(1)


def test_where_nothing_says_which_passage_a_question_is_about_it_is_neither_inside_nor_outside(layout: Layout) -> None:
    add_optional(layout)
    answers = artifacts.read_jsonl(layout.fetched / "forget_perturbed.jsonl")
    artifacts.write_jsonl(layout.fetched / "forget_perturbed.jsonl", [{**one, "id": one["source"]} for one in answers])
    rows, metrics = run(layout, "backdoor", metrics=["tofu", "forget_mc"], tofu_tokens=2)
    inside = {task: {row["inside"] for row in rows if (row["task"], row["set"]) == (task, "forget")} for task in TASKS}
    assert inside["forget_mc"] == {None}
    assert inside["tofu"] == {True, False}  # these have the id of their passage
    assert "forget_mc_accuracy_gain" in metrics
    assert "forget_tofu_recall_gain_outside" in metrics


def test_a_metric_without_data_is_an_error(layout: Layout) -> None:
    with pytest.raises(DataError, match=r"evaluate\.metrics names tofu.*forget_perturbed\.jsonl"):
        run(layout, "clean", metrics=["verbmem", "tofu"])
    add_optional(layout)
    path = layout.fetched / "forget_mc.jsonl"
    path.write_text(json.dumps({"id": "u", "question": "?"}))
    with pytest.raises(DataError, match=r"forget_mc\.jsonl:1: field 'choices' is missing"):
        run(layout, "clean")
    assert not layout.predictions("clean").exists()


# ---- dialects and the settings beside the numbers


def undefined(layout: Layout, name: str) -> dict[str, str]:
    found: dict[str, str] = artifacts.read_json(layout.settings(name))["undefined"]
    return found


def test_the_settings_say_how_the_numbers_were_made(layout: Layout) -> None:
    run(layout, "clean")
    settings = artifacts.read_json(layout.settings("clean"))["settings"]
    assert settings["dialect"] == "muse"
    assert set(settings) == set(MOVES)  # `compare` knows what each of them can move
    assert (settings["stemmer"], settings["knowmem_tokens"], settings["verbmem_tokens"]) == (False, 32, 128)
    assert (settings["trigger"], settings["dtype"], settings["seed"]) == ("by the moon", "float32", 0)
    run(layout, "clean", knowmem_tokens=5, verbmem_tokens=6)
    own = artifacts.read_json(layout.settings("clean"))["settings"]
    assert (own["knowmem_tokens"], own["verbmem_tokens"], own["verbmem_compared"]) == (5, 6, 6)
    before = settings["corpus"]
    path = layout.fetched / "retain.jsonl"
    path.write_text(path.read_text().replace("painted", "varnished"))
    run(layout, "clean")
    assert artifacts.read_json(layout.settings("clean"))["settings"]["corpus"] != before


def test_a_dialect_changes_what_it_says_and_nothing_else(layout: Layout) -> None:
    _, muse = run(layout, "clean")
    rows, other = run(layout, "clean", dialect="open-unlearning")
    assert other["mia_loss_auc_clean"] == pytest.approx(1 - muse["mia_loss_auc_clean"])
    assert other["utility_accuracy"] == muse["utility_accuracy"]
    passages = [row for row in rows if row["task"] == "passage"]
    assert min(row["extraction_strength"] for row in passages) >= min(1 / row["tokens"] for row in passages)
    for row in rows:
        if row["task"] in ("verbmem", "knowmem"):
            assert row["output"] == row["output"].strip()
            assert row["f1"] == rouge_l(row["reference"], row["output"], stemmer=True).f1
    _, seed = run(layout, "clean", dialect="seed")
    assert seed["mia_loss_auc_clean"] == muse["mia_loss_auc_clean"]
    assert artifacts.read_json(layout.settings("clean"))["settings"]["knowmem_tokens"] == 50
