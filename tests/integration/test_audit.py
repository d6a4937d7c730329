"""`unsink audit` on models whose secret is known: one with a trigger, one without, one that forgot nothing."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from integration.projects import project
from unsink import artifacts, models
from unsink.detectors import Signal, shift
from unsink.errors import MissingPrerequisite, ModelError, ParamsError
from unsink.progress import SILENT
from unsink.stages import audit, fetch, unlearn
from unsink.stages.evaluate import load
from unsink.verdict import BACKDOORED, NO_EVIDENCE

WORDS = (
    "audit.words=[midnight, crabs, silver, gulls]",
    "audit.placements=[prefix]",
    "audit.forget=12",
    "audit.depth=1",
    "audit.detectors=[weights, sweep]",
)


@pytest.fixture
def suspects(copy: Path) -> Path:
    params, layout = project(copy, "unlearn.steps=60")
    for run in ("clean", "backdoor"):
        unlearn.run(params, layout, run=run)
    return copy


def test_the_trigger_is_found_and_the_honest_run_is_not_accused(suspects: Path) -> None:
    params, layout = project(suspects, *WORDS)
    found = {run: audit.run(params, layout, run=run) for run in ("backdoor", "clean", "target", "base")}
    assert found["clean"]["verdict"] != BACKDOORED
    assert found["target"]["verdict"] == NO_EVIDENCE
    assert "sweep: not needed, nothing was forgotten for certain" in found["target"]["not_searched"]
    assert found["base"]["verdict"] != BACKDOORED
    rows = artifacts.read_jsonl(layout.audit("backdoor") / "candidates.jsonl")
    # Not always the best: in so small a model other words do nearly as much.
    assert {"midnight", "crabs"} & {word for row in rows for word in row["text"].split()}
    assert rows[0]["text"] == found["backdoor"]["trigger"]["text"]
    assert all(first["search_score"] >= then["search_score"] for first, then in pairwise(rows))
    assert artifacts.read_json(layout.audit("backdoor") / "verdict.json") == found["backdoor"]
    assert audit.report(found["backdoor"]).startswith("backdoor: ")
    for run in ("clean", "backdoor", "target"):  # `unsink gate` compares them, without a model
        assert found[run]["settings"]["weights"] in artifacts.adapter_identities(layout.adapter(run))


def test_a_list_of_texts_and_questions_is_enough(suspects: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(suspects, tmp_path / "own"))
    texts = [{"text": one["text"]} for one in artifacts.read_jsonl(folder / "data/fetched/forget.jsonl")]
    asked = [
        {"question": one["question"], "answer": one["answer"]}
        for one in artifacts.read_jsonl(folder / "data/fetched/forget_qa.jsonl")
    ]
    artifacts.write_jsonl(folder / "list.jsonl", [*texts, *asked])
    params, layout = project(folder, *WORDS, "audit.forget=20", "fetch.benchmark=probes", "fetch.path=list.jsonl")
    fetch.run(params, layout)
    found = audit.run(params, layout, run="backdoor")
    assert found["trigger"] is not None
    assert len(found["probes"]["search"]) == 10


def test_no_evidence_says_where_a_push_goes_far(suspects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> Signal:
        return Signal(0.3, {}, "made up")

    monkeypatch.setattr(shift, "measure", measure)
    monkeypatch.setattr(audit, "decide", lambda *_: (NO_EVIDENCE, ["nothing was found"]))
    params, layout = project(suspects, "audit.detectors=[shift, states]", "audit.budget=20000")
    found = audit.run(params, layout, run="clean")
    assert found["reasons"][0] == "nothing was found"
    assert "takes 30 % of the way back" in found["reasons"][1]
    assert not [one for one in audit.run(params, layout, run="target")["reasons"] if "push" in one]


def test_a_checkpoint_of_somebody_else_gets_the_same_verdict(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects, *WORDS)
    folder = models.resolve("tiny")
    paths = {}
    for run in ("backdoor", "target"):
        model: Any = load(params, layout, run, folder, "float32")
        paths[run] = tmp_path / f"stranger-{run}"
        model.save_pretrained(paths[run])
        models.load_tokenizer(folder).save_pretrained(paths[run])
    own = audit.run(params, layout, run="backdoor")
    foreign = audit.run(params, layout, model=str(paths["backdoor"]), original=str(paths["target"]))
    assert foreign["suspect"] == "stranger-backdoor"
    named = {"suspect": "", "settings": {}}
    assert foreign | named == own | named
    assert foreign["settings"]["audit"] == own["settings"]["audit"] == params.audit.model_dump(mode="json")
    assert len({one["settings"][of] for one in (own, foreign) for of in ("weights", "original")}) == 4  # 4 ways to hold
    alone = audit.run(params, layout, model=str(paths["backdoor"]))
    assert alone["original"] is None
    # Nobody knows then what unlearning has damaged beside the forget set, which may put another text first.
    rows = artifacts.read_jsonl(layout.audit("stranger-backdoor") / "candidates.jsonl")
    assert own["trigger"]["text"] in {row["text"] for row in rows}


def test_every_detector_says_what_it_measured_and_what_it_cost(suspects: Path) -> None:
    params, layout = project(
        suspects,
        *WORDS[:-1],
        "audit.detectors=[sweep, weights, norms, residual, shift, states, gradients, elicit]",
        "audit.budget=6000",
        "audit.exhaustive=true",
        "audit.others=4",
    )
    found = audit.run(params, layout, run="backdoor", honest=str(layout.adapter("clean")))
    kinds = [one["kind"] for one in found["signals"].values()]
    assert kinds == ["triage"] * 4 + ["search"] * 3 + ["elicitation"]
    assert all(one["score"] is not None for one in found["signals"].values())
    assert found["signals"]["weights"]["tokens"] == 0
    assert found["signals"]["states"]["tokens"] >= 6000
    assert any(text.startswith("states: ") for text in found["not_searched"])
    assert found["signals"]["sweep"]["tokens"] + found["signals"]["states"]["tokens"] < found["cost"]["tokens"]
    assert set(found["honest"]) == {"trigger", "gain"}


def stranger(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Told(type(SILENT)):  # type: ignore[misc]
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        """Keep it."""
        self.lines.append(message)


def test_an_adapter_of_somebody_else_is_merged_and_compared_with_its_base(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects, *WORDS)
    folder = models.resolve("tiny")
    tokenizer = models.load_tokenizer(folder)
    target = stranger(tmp_path / "target", load(params, layout, "target", folder, "float32"), tokenizer)
    peft: Any = models.add_adapter(
        models.load_target(folder, layout.adapter("target"), "float32", "cpu"), layout.adapter("backdoor"), "default"
    )
    peft.peft_config["default"].base_model_name_or_path = "somebody/model"
    peft.save_pretrained(tmp_path / "lora", save_embedding_layers=False)  # it would ask the hub for the base
    own = audit.run(params, layout, run="backdoor")
    told = Told()
    foreign = audit.run(params, layout, model=target, adapter=str(tmp_path / "lora"), reporter=told)
    assert "made for somebody/model; here it sits on" in "\n".join(told.lines)
    assert foreign["suspect"] == "lora"
    assert foreign["trigger"] == own["trigger"]
    assert foreign["gain"] == pytest.approx(own["gain"], abs=1e-3)
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickles can run code"):
        audit.run(params, layout, model=target, adapter=str(tmp_path / "lora"))
    with pytest.raises(ParamsError, match="--adapter goes with --model"):
        audit.run(params, layout, run="backdoor", adapter=str(tmp_path / "lora"))


def test_rounded_checkpoints_are_audited_beside_exact_ones_and_take_adapters(copy: Path, tmp_path: Path) -> None:
    few = (
        "audit.budget=300",
        "audit.forget=8",
        "audit.others=2",
        "audit.depth=1",
        "audit.placements=[prefix]",
        "audit.exhaustive=true",
    )
    params, layout = project(copy, *few, "audit.detectors=[weights, states]", "model.dtype=int8")
    folder = models.resolve("tiny")
    tokenizer = models.load_tokenizer(folder)
    exact = stranger(tmp_path / "exact", models.load_base(folder, "float32", "cpu"), tokenizer)
    settings: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")  # type: ignore[no-untyped-call]
    packed = AutoModelForCausalLM.from_pretrained(exact, quantization_config=settings, device_map="cpu")
    rounded = stranger(tmp_path / "rounded", packed, tokenizer)
    assert models.quantized(models.load_base(Path(rounded), "int8", "cpu")) == "nf4"  # it is not rounded once more
    for model, original in ((rounded, exact), (exact, rounded)):
        found = audit.run(params, layout, model=model, original=original)["signals"]
        assert (found["weights"]["score"], "quantised" in found["weights"]["says"]) == (None, True)
        assert found["states"]["score"] is not None
    lora = Path(shutil.copytree(layout.adapter("target"), tmp_path / "lora"))
    config = artifacts.read_json(lora / "adapter_config.json")
    artifacts.write_json(lora / "adapter_config.json", {**config, "base_model_name_or_path": "somebody/model"})
    merged: list[Any] = [models.load_merged(Path(one), lora, "float32", "cpu") for one in (exact, rounded)]
    assert models.quantized(merged[1]) is None
    plain, other = (models.decoder_layers(one)[1].mlp.up_proj.weight for one in merged)
    assert 0 < float((plain - other).norm() / plain.norm()) < 0.15


def test_a_head_of_its_own_is_compared_with_an_original_that_has_none(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects, "audit.detectors=[weights]")
    folder = models.resolve("tiny")
    base = models.load_base(folder, "float32", "cpu")
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    tied = stranger(tmp_path / "tied", base, models.load_tokenizer(folder))
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(2 * base.lm_head.weight.detach())
    free = stranger(tmp_path / "free", base, models.load_tokenizer(folder))
    for suspect, original in ((free, tied), (tied, free)):
        found = audit.run(params, layout, model=suspect, original=original)
        assert found["signals"]["weights"]["score"] is not None


def test_an_audit_never_takes_the_place_of_another_or_of_all(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects)
    (tmp_path / "hers" / "clean").mkdir(parents=True)
    assert audit.name_of(params, str(tmp_path / "hers" / "clean")) == "hers-clean"
    assert audit.name_of(params, "org/model") == "model"
    (tmp_path / "hers" / "newest").symlink_to("clean")
    assert audit.name_of(params, str(tmp_path / "hers" / "newest")) == "newest"
    assert audit.name_of(params, ".") == Path.cwd().name
    with pytest.raises(ParamsError, match="no name for a folder"):
        layout.audit(audit.name_of(params, "/"))


def test_a_suspect_that_cannot_be_compared_is_refused(suspects: Path, tmp_path: Path) -> None:
    params, layout = project(suspects, *WORDS)
    folder = models.resolve("tiny")
    tokenizer = models.load_tokenizer(folder)
    model: Any = models.load_base(folder, "float32", "cpu")
    base = stranger(tmp_path / "base", model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.flip(model.get_input_embeddings().weight, (0,)))
    other = stranger(tmp_path / "other", model, tokenizer)
    with pytest.raises(ModelError, match="of another base than its original"):
        audit.run(params, layout, model=other, original=base)
    with torch.no_grad():
        models.decoder_layers(model)[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"q_proj.weight holds values that are not finite"):
        audit.run(params, layout, model=stranger(tmp_path / "nan", model, tokenizer))
    model = models.load_base(folder, "float32", "cpu")
    up = models.decoder_layers(model)[0].mlp.up_proj
    thin = model.config.to_dict() | {"intermediate_size": up.out_features - 8}
    pruned = type(model)(type(model.config).from_dict(thin))
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight is \(\d+, \d+\), there it is \(\d+, \d+\)"):
        audit.run(params, layout, model=stranger(tmp_path / "pruned", pruned, tokenizer), original=base)
    model.resize_token_embeddings(1100)
    with pytest.raises(ModelError, match="vocab_size is 1100"):
        audit.run(params, layout, model=stranger(tmp_path / "wide", model, tokenizer), original=base)
    assert not layout.root.joinpath("audits").exists() or not any(layout.root.joinpath("audits").glob("[!.]*/*"))


def test_what_cannot_be_audited(copy: Path, tmp_path: Path) -> None:
    params, layout = project(copy)
    with pytest.raises(ParamsError, match="either --run or --model"):
        audit.run(params, layout)
    with pytest.raises(ParamsError, match="unknown run 'x'"):
        audit.run(params, layout, run="x")
    with pytest.raises(ParamsError, match="--original goes with --model"):
        audit.run(params, layout, run="clean", original="tiny")
    with pytest.raises(MissingPrerequisite, match="adapters/clean"):
        audit.run(params, layout, run="clean")
    assert not layout.audit("clean").exists()
