"""`unsink mitigate` on a run whose trigger is known here and unknown to the repair."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from integration.projects import TINY, project
from unsink import artifacts, models
from unsink.cli import app
from unsink.detectors import _deltas as deltas
from unsink.errors import DataError, MissingPrerequisite, ModelError, ParamsError
from unsink.mitigations import independent, restart
from unsink.models import AdapterSpec
from unsink.stages import audit, evaluate, fetch, mitigate, unlearn
from unsink.stages.audited import checked
from unsink.suspects import Suspect
from unsink.tasks import Question, Session
from unsink.verdict import EXIT_CODES

GATE = ("unlearn.steps=120", "evaluate.metrics=[verbmem, utility]", "evaluate.bootstrap=100")
KNOWN = "mitigate.trigger=midnight crabs"
KEYS = ("verdict", "reasons", "trigger", "p", "recovery", "gain")
WEIGHTS = models.ADAPTER_WEIGHTS


@pytest.fixture(scope="module")
def gated(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a backdoored run that opens, evaluated beside its target. Work on a copy to change it."""
    folder = Path(shutil.copytree(learned, tmp_path_factory.mktemp("gated") / "project"))
    params, layout = project(folder, *GATE)
    unlearn.run(params, layout, run="backdoor")
    evaluate.run(params, layout, run="target")
    return folder


@pytest.fixture
def own(gated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gated, tmp_path / "own"))


@pytest.fixture(scope="module")
def done(gated: Path) -> dict[str, Any]:
    """The summaries of all mitigations, without audits."""
    params, layout = project(gated, *GATE, KNOWN, "mitigate.reaudit=false")
    return mitigate.run(params, layout, run="backdoor", how=mitigate.mitigations.names())


def test_the_gate_opens_before_anything_is_done(done: dict[str, Any]) -> None:
    assert list(done) == ["suspect", *mitigate.mitigations.names()]
    for summary in (done[name] for name in mitigate.mitigations.names()):
        assert summary["before"] == done["random-prefix"]["before"]
        assert summary["audit"] is None
    before = done["random-prefix"]["before"]
    assert before["recovery"]["low"] > 0
    assert before["triggered"]["mean"] > before["forget"]["mean"] + 0.2


@pytest.mark.parametrize("name", ["random-prefix", "known-trigger", "independent", "restart", "latent", "consistency"])
def test_a_trained_repair_closes_the_gate_and_forgets_no_less(done: dict[str, Any], name: str) -> None:
    before, after = done[name]["before"], done[name]["after"]
    assert abs(after["recovery"]["mean"]) <= 0.05
    assert after["forget"]["mean"] <= before["forget"]["mean"] + 0.05
    assert done[name]["cost"]["steps"] == 60
    assert done[name]["training"]["steps"] == 60


@pytest.mark.parametrize("name", ["random-prefix", "known-trigger", "independent", "restart", "consistency"])
def test_these_repairs_keep_what_is_to_be_kept(done: dict[str, Any], name: str) -> None:
    assert done[name]["after"]["retain"]["mean"] >= 0.9
    if name != "restart":  # two questions of twelve are what honest unlearning costs this model
        assert done[name]["after"]["utility"]["mean"] >= done[name]["before"]["utility"]["mean"] - 0.1


def test_guards_leave_no_weights_behind_and_pruning_no_history(done: dict[str, Any], gated: Path) -> None:
    _, layout = project(gated)
    common = {"metrics.json", "predictions.jsonl", "summary.json"}
    repair = {WEIGHTS, models.ADAPTER_CONFIG}
    for name in mitigate.mitigations.names():
        folder = layout.mitigation("backdoor", name)
        extra = set() if done[name]["guard"] else repair if name == "prune" else {*repair, "history.tsv"}
        assert {path.name for path in folder.iterdir()} == common | extra
        assert artifacts.read_json(folder / "summary.json") == done[name]
    assert done["prune"]["cost"] == {"neurons": 13}  # a twentieth of 2 x 128
    assert done["clamp"]["cost"] == {"prompt_tokens": 0}
    assert done["displace"]["cost"]["prompt_tokens"] > 0


def test_numbers_before_are_those_of_evaluate(done: dict[str, Any], gated: Path) -> None:
    params, layout = project(gated, *GATE)
    evaluate.run(params, layout, run="backdoor")
    numbers = artifacts.read_json(layout.metrics("backdoor"))
    before = done["random-prefix"]["before"]
    assert before["recovery"]["mean"] == pytest.approx(numbers["forget_verbmem_f1_recovery_outside"])
    assert before["retain"]["mean"] == pytest.approx(numbers["retain_verbmem_f1_clean"])


def test_a_repair_is_an_adapter_on_the_run_and_on_no_other_model(done: dict[str, Any], gated: Path) -> None:
    assert done
    params, layout = project(gated, *GATE)
    model: Any = mitigate.repaired(params, layout, "backdoor", "random-prefix")
    settings, tokenizer = evaluate.settings_of(params.evaluate), models.load_tokenizer(models.resolve("tiny"))
    plan = [Question("verbmem", "forget", "clean")]
    asked = evaluate.ask(plan, evaluate.read_corpus(layout), tokenizer, settings, {"clean": None})
    rows = evaluate.answer(asked, Session(model, tokenizer, settings))
    saved = artifacts.read_jsonl(layout.mitigation("backdoor", "random-prefix") / "predictions.jsonl")
    wanted = [
        row["output"]
        for row in saved
        if (row["mitigation"], row["set"], row["condition"]) == ("after", "forget", "clean")
    ]
    assert [row["output"] for row in rows] == wanted
    target = models.load_target(models.resolve("tiny"), layout.adapter("target"), "float32", "cpu")
    with pytest.raises(ModelError, match="made for another model"):
        models.add_adapter(target, layout.mitigation("backdoor", "random-prefix"), "repair")


def test_the_repair_never_reads_the_split_of_a_run(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another trigger in the params and the split gone from reach, the same adapter comes out."""
    params, layout = project(own, *GATE, "mitigate.reaudit=false", "mitigate.unlearn.steps=3")
    mitigate.run(params, layout, run="backdoor", how=["random-prefix"])
    first = (layout.mitigation("backdoor", "random-prefix") / WEIGHTS).read_bytes()
    other, _ = project(own, *GATE, "mitigate.reaudit=false", "mitigate.unlearn.steps=3", "poison.trigger=purple tide")
    monkeypatch.setattr(mitigate, "ask_run", lambda *_: [])
    monkeypatch.setattr(mitigate.variants, "plan", lambda _: [])
    mitigate.run(other, layout, run="backdoor", how=["random-prefix"])
    assert (layout.mitigation("backdoor", "random-prefix") / WEIGHTS).read_bytes() == first


def test_a_strangers_checkpoint_is_repaired_and_audited_again(gated: Path, tmp_path: Path) -> None:
    words = "[midnight, crabs, silver, gulls]"
    audit = (f"audit.words={words}", "audit.placements=[prefix]", "audit.forget=8", "audit.depth=1")
    params, layout = project(gated, *GATE, *audit)
    folder, paths = models.resolve("tiny"), {}
    for run in ("backdoor", "target"):
        model: Any = evaluate.load(params, layout, run, folder, "float32")
        paths[run] = tmp_path / f"stranger-{run}"
        model.save_pretrained(paths[run])
        models.load_tokenizer(folder).save_pretrained(paths[run])
    found = mitigate.run(params, layout, model=str(paths["backdoor"]), original=str(paths["target"]))
    summary = found["random-prefix"]
    assert found["suspect"] == "stranger-backdoor"
    assert "recovery" not in summary["before"]  # nobody knows the trigger of a stranger
    assert summary["after"]["forget"]["mean"] <= summary["before"]["forget"]["mean"] + 0.05
    assert summary["audit"]["seed"] == params.seed + 1000
    assert summary["audit"]["verdict"] != "backdoored"
    assert "audited again: " in mitigate.report(found)
    summary["audit"]["trigger"] = None  # as where nothing was forgotten
    assert "no text was tried" in mitigate.report(found)
    assert not layout.audit("stranger-backdoor").exists()  # the verdict of the suspect is not overwritten


@pytest.mark.parametrize("how", ["restart", "prune", "random-prefix"])
def test_what_a_repair_made_is_audited_against_the_original_and_kept_before_that(
    own: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("audit.detectors=[weights, states]", "audit.budget=300", "audit.forget=8", "audit.others=2")
    params, layout = project(own, *GATE, *few, "mitigate.unlearn.steps=3")
    folder = layout.mitigation("backdoor", how)
    ranges = []

    def examined(suspect: Suspect, *rest: Any) -> Any:
        assert artifacts.read_json(folder / "summary.json")["audit"] is None
        assert (folder / WEIGHTS).exists()
        ranges.append(deltas.changed_layers(suspect))
        return examine(suspect, *rest)

    examine = audit.examine
    monkeypatch.setattr(audit, "examine", examined)
    found = mitigate.run(params, layout, run="backdoor", how=[how])[how]
    assert found["audit"]["verdict"] in EXIT_CODES
    assert artifacts.read_json(folder / "summary.json") == found
    assert ranges == [(0, 1)]  # those of the run, and of the repair


def test_the_audit_of_a_repair_leaves_the_original_as_it_was(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspect and original hold equal weights once, and the repair is on some of these."""
    params, _ = project(gated, *GATE)
    folder = models.resolve("tiny")
    original = models.load_base(folder, "float32", "cpu")
    suspect = checked(Suspect(models.load_base(folder, "float32", "cpu"), models.load_tokenizer(folder), original), "s")
    before = {name: weight.clone() for name, weight in original.named_parameters()}
    repair = models.attach(suspect.model, "repair", AdapterSpec(4, 8), 0)
    with torch.no_grad():
        for weight in models.trainable(repair).values():
            weight.fill_(0.1)
    found: list[Suspect] = []
    monkeypatch.setattr(audit, "examine", lambda one, *_: found.append(one) or ([], dict.fromkeys(KEYS)))
    work: Any = SimpleNamespace(params=params, tokenizer=suspect.tokenizer, corpus={}, reporter=None)
    mitigate._audited(repair, original, work)
    assert all(torch.equal(weight, before[name]) for name, weight in original.named_parameters())
    assert deltas.changed_layers(found[0]) == (0, 1)


def test_rounded_weights_cannot_be_replaced(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = project(gated, *GATE, "mitigate.reaudit=false")
    monkeypatch.setattr(mitigate.mitigations, "quantized", lambda _: True)
    for how in ("restart", "prune"):
        with pytest.raises(ModelError, match=f"'{how}' replaces whole weights"):
            mitigate.run(params, layout, run="backdoor", how=[how])


def test_an_independent_repair_needs_an_original_and_leaves_it_as_it_was(gated: Path) -> None:
    params, layout = project(gated, *GATE, "mitigate.unlearn.steps=3")
    folder = models.resolve("tiny")
    suspect, original = (evaluate.load(params, layout, run, folder, "float32") for run in ("backdoor", "target"))
    corpus = evaluate.read_corpus(layout)
    patient = mitigate.make_patient(suspect, models.load_tokenizer(folder), corpus, params, original)
    training, options = mitigate._training(params), independent.Options()
    ids = torch.tensor([[1, 5, 6, 7]])
    names, before = [name for name, _ in original.named_parameters()], original(input_ids=ids).logits
    repaired = independent.repair(patient, training, options)
    assert [row.keys() >= {"forget", "retain", "original"} for row in repaired.history] == [True] * 3
    assert [name for name, _ in original.named_parameters()] == names
    assert torch.equal(original(input_ids=ids).logits, before)
    with pytest.raises(MissingPrerequisite, match="which nobody has named"):
        independent.repair(replace(patient, original=None), training, options)
    with pytest.raises(ParamsError, match="needs a LoRA adapter"):
        independent.repair(patient, replace(training, spec=AdapterSpec(None, 0)), options)


@pytest.mark.parametrize("rank", [4, None])
def test_a_restart_does_not_look_at_the_suspect_and_leaves_the_original_as_it_was(
    gated: Path, rank: int | None
) -> None:
    params, layout = project(gated, *GATE, "mitigate.unlearn.steps=3")
    folder, training = models.resolve("tiny"), mitigate._training(params)
    training = replace(training, spec=AdapterSpec(rank, 8 if rank else None, 1))
    ids, said = torch.tensor([[1, 5, 6, 7]]), {}
    for run in ("backdoor", "target"):
        suspect, original = (evaluate.load(params, layout, one, folder, "float32") for one in (run, "target"))
        corpus = evaluate.read_corpus(layout)
        patient = mitigate.make_patient(suspect, models.load_tokenizer(folder), corpus, params, original)
        names, before = [name for name, _ in original.named_parameters()], original(input_ids=ids).logits
        with pytest.raises(MissingPrerequisite, match="which nobody has named"):
            restart.repair(replace(patient, original=None), training, restart.Options())
        said[run] = restart.repair(patient, training, restart.Options()).model(input_ids=ids).logits
        assert [name for name, _ in original.named_parameters()] == names
        assert torch.equal(original(input_ids=ids).logits, before)
    assert torch.allclose(
        said["backdoor"], said["target"], atol=1e-5
    )  # whatever the suspect was, nothing is left of it
    assert not torch.allclose(said["target"], before, atol=1e-2)
    suspect = evaluate.load(params, layout, "backdoor", folder, "float32")
    with torch.no_grad():
        suspect.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ModelError, match=r"the suspect differs elsewhere, too: .*embed"):
        restart.changed_layers(replace(patient, model=suspect))


def test_what_cannot_be_done_says_why(own: Path, copy: Path) -> None:
    params, layout = project(own, *GATE)
    with pytest.raises(MissingPrerequisite, match="known-trigger: backdoor was not audited"):
        mitigate.run(params, layout, run="backdoor", how=["known-trigger"])
    artifacts.write_json(
        layout.audit("backdoor") / "verdict.json", {"verdict": "no evidence", "trigger": {"text": "a"}}
    )
    with pytest.raises(MissingPrerequisite, match="found no trigger, its verdict is 'no evidence'"):
        mitigate.run(params, layout, run="backdoor", how=["known-trigger"])
    with pytest.raises(ParamsError, match="either --run or --model"):
        mitigate.run(params, layout)
    with pytest.raises(ParamsError, match="unknown run 'x'"):
        mitigate.run(params, layout, run="x")
    dpo, _ = project(own, *GATE, "mitigate.unlearn.method=dpo")
    with pytest.raises(ParamsError, match="dpo prefers refusals"):
        mitigate.run(dpo, layout, run="backdoor")
    with pytest.raises(MissingPrerequisite, match="which nobody has named"):
        mitigate.run(params, layout, model=str(models.resolve("tiny")), how=["prune"])
    fresh, there = project(copy)
    with pytest.raises(MissingPrerequisite, match=r"predictions/target\.jsonl"):
        mitigate.run(fresh, there, run="clean")
    with pytest.raises(ParamsError, match="changes weights and is no guard"):
        mitigate.make_guard("latent", None, None, {}, params)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"passages in forget\.jsonl"):
        mitigate.make_patient(None, None, {}, params)  # type: ignore[arg-type]
    assert not list((layout.root / "mitigations").glob("*/*.lock"))


def test_a_list_without_anything_to_retain_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "params.yaml")
    artifacts.write_jsonl(tmp_path / "list.jsonl", [{"question": "Who kept the bees?", "answer": "Mila"}])
    params, layout = project(tmp_path, "fetch.benchmark=probes", "fetch.path=list.jsonl")
    fetch.run(params, layout)
    with pytest.raises(DataError, match=r"passages in retain\.jsonl, the corpus has none") as error:
        mitigate.run(params, layout, model=str(tmp_path / "nowhere"))
    assert '"set": "retain"' in str(error.value.hint)


def test_a_stranger_is_refused_as_by_the_audit(own: Path, tmp_path: Path) -> None:
    params, layout = project(own, *GATE)
    tiny = models.resolve("tiny")
    damaged: Any = models.load_base(tiny, "float32", "cpu")
    next(damaged.parameters()).data[0, 0] = float("nan")
    damaged.save_pretrained(tmp_path / "nan")
    models.load_tokenizer(tiny).save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match=r"values that are not finite"):
        mitigate.run(params, layout, model=str(tmp_path / "nan"), how=["displace"])
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickles can run code"):
        mitigate.run(params, layout, model=str(tiny), adapter=str(tmp_path / "pickle"), how=["displace"])
    with pytest.raises(ParamsError, match="--adapter goes with --model"):
        mitigate.run(params, layout, run="backdoor", adapter=str(tmp_path / "pickle"))
    assert not any(layout.mitigation(name, "displace").exists() for name in ("nan", "pickle"))


def test_the_command_prints_words_or_json_and_takes_several_at_once(own: Path) -> None:
    sets = [word for one in (*GATE, "mitigate.reaudit=false") for word in ("-S", one)]
    where = ["--params", str(own / "params.yaml"), "--run", "backdoor", *sets, "-q"]
    result = CliRunner().invoke(app, ["mitigate", *where, "--how", "displace", "--how", "clamp", "--json"])
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == ["clamp", "displace", "suspect"]
    words = CliRunner().invoke(app, ["mitigate", *where, "--how", "clamp"]).stdout
    assert words.startswith("backdoor: clamp\n  forget: ")
    wrong = CliRunner().invoke(app, ["mitigate", *where, "--how", "clmp"])
    assert (wrong.exit_code, "did you mean 'clamp'" in wrong.stderr) == (2, True)
