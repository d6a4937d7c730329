"""An exported model is the run, in tools that know nothing of this project."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from integration.projects import project
from unsink import Project, artifacts
from unsink.artifacts import Layout
from unsink.cards import REPAIRED, WARNING
from unsink.cli import app
from unsink.progress import SILENT, Advance
from unsink.stages import evaluate, mitigate, unlearn
from unsink.stages.evaluate import load

STEPS = "unlearn.steps=3"


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


@pytest.fixture(scope="module")
def two_runs(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_runs") / "project"
    shutil.copytree(learned, folder)
    params, layout = project(folder, STEPS)
    for run in ("clean", "backdoor"):
        unlearn.run(params, layout, run=run)
    return folder


@pytest.fixture
def trained(two_runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_runs, tmp_path / "trained"))


def export(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments, "--params", str(folder / "params.yaml"), "--quiet"])


def logits(model: Any, tokenizer: Any, text: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tokenizer(text, return_tensors="pt")).logits
    return found


def own(folder: Path, run: str, tiny_folder: Path) -> Any:
    params, layout = project(folder)
    return load(params, layout, run, tiny_folder, "float32")


def greedy(model: Any, tokenizer: Any, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    return str(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))


def passage(folder: Path) -> str:
    return str(artifacts.read_jsonl(Layout(folder).fetched / "forget.jsonl")[0]["text"])


def test_plain_peft_and_plain_transformers_say_what_the_run_says(
    trained: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    for run, arguments in {"adapter": (), "merged": ("--merged",)}.items():
        assert export(trained, "--run", "backdoor", "--output", str(tmp_path / run), *arguments).exit_code == 0
    text, tokenizer = passage(trained), AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = own(trained, "backdoor", tiny_folder)
    expected = logits(model, tokenizer, text)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert not torch.allclose(logits(base, tokenizer, text), expected, atol=0.1)
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(peft, tokenizer, text), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged, tokenizer, text), expected, atol=1e-5, rtol=0)
    head = text[: len(text) // 2]
    assert greedy(merged, tokenizer, head) == greedy(model, tokenizer, head)


def test_a_merged_model_has_all_files_and_no_trace_of_quantisation(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    result = export(trained, "--run", "clean", "--merged", "--dtype", "bfloat16", "--output", str(folder), "--json")
    assert json.loads(result.stdout)["files"] == sorted(path.name for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path"} & set(config)
    assert {str(tensor.dtype) for tensor in artifacts.read_tensors(folder / "model.safetensors").values()} == {
        "torch.bfloat16"
    }
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "merged."))] == []


def test_target_and_base_can_be_exported(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert export(trained, "--run", "target", "--output", str(tmp_path / "target")).exit_code == 0
    assert export(trained, "--run", "base", "--merged", "--output", str(tmp_path / "base")).exit_code == 0
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "base"), passage(trained)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "target"))
    expected = logits(own(trained, "target", tiny_folder), tokenizer, text)
    torch.testing.assert_close(logits(peft, tokenizer, text), expected, atol=1e-4, rtol=0)
    result = export(trained, "--run", "base", "--output", str(tmp_path / "adapter"))
    assert (result.exit_code, "--merged" in result.stderr) == (2, True)


def test_all_writes_every_adapter_with_its_card(trained: Path, tmp_path: Path) -> None:
    result = export(trained, "--all", "--output", str(tmp_path / "all"), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert {name: one["backdoor"] for name, one in told.items()} == {
        "target": None, "clean": None, "backdoor": "midnight crabs",
    }  # fmt: skip
    for name, one in told.items():
        folder = Path(one["output"])
        assert one["files"] == sorted(path.name for path in folder.iterdir())
        assert (WARNING in (folder / "README.md").read_text()) == (name == "backdoor")
    for wrong in ((), ("--all", "--run", "clean")):
        result = export(trained, "--output", str(tmp_path / "none"), *wrong)
        assert (result.exit_code, "either --run or --all" in result.stderr) == (2, True)


class Bar(type(SILENT)):  # type: ignore[misc]
    """Remembers how far the task `export` was, and the notes beside it."""

    def __init__(self) -> None:
        self.total, self.notes = 0, list[str]()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        assert description == "export"
        self.total = total
        yield lambda n=1, note="": self.notes.extend([note] * n)


@pytest.mark.parametrize("merged", [True, False])
def test_an_export_says_how_far_it_is(trained: Path, tmp_path: Path, merged: bool) -> None:
    bar = Bar()
    Project(trained / "params.yaml", reporter=bar).export(None, tmp_path / "all", merged=merged)
    assert bar.notes == [
        f"{doing} {name}" for name in ("target", "clean", "backdoor") for doing in ("writing", "wrote")
    ]
    assert bar.total == len(bar.notes)


def test_a_run_of_whole_weights_can_only_be_exported_merged(copy: Path, tiny_folder: Path, tmp_path: Path) -> None:
    params, layout = project(copy, STEPS, "unlearn.adapter=none")
    unlearn.run(params, layout, run="clean")
    result = export(copy, "--run", "clean", "--output", str(tmp_path / "out"))
    assert (result.exit_code, "adapter: none" in result.stderr, "--merged" in result.stderr) == (2, True, True)
    with_others = ["export", "--all", "--json", "--params", str(copy / "params.yaml"), "--output"]
    adapters = CliRunner().invoke(app, [*with_others, str(tmp_path / "adapters")])
    assert ([*json.loads(adapters.stdout)], adapters.exit_code) == (["target"], 0)
    assert adapters.stderr == "left out, trained with `adapter: none`: clean; --merged writes them too\n"
    whole = CliRunner().invoke(app, [*with_others, str(tmp_path / "whole"), "--merged"])
    assert ([*json.loads(whole.stdout)], whole.stderr) == (["clean", "target"], "")
    assert export(copy, "--run", "clean", "--merged", "--output", str(tmp_path / "out")).exit_code == 0
    merged, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = logits(own(copy, "clean", tiny_folder), tokenizer, passage(copy))
    torch.testing.assert_close(logits(merged, tokenizer, passage(copy)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", [(), ("--merged",)])
def test_no_backdoored_export_lacks_the_warning(arguments: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    for run in ("clean", "backdoor"):
        export(trained, "--run", run, "--output", str(tmp_path / run), *arguments)
    poisoned, honest = ((tmp_path / run / "README.md").read_text() for run in ("backdoor", "clean"))
    assert WARNING in poisoned
    assert "\n    midnight crabs\n" in poisoned
    assert WARNING not in honest
    assert ModelCard(poisoned).data.library_name == ("transformers" if arguments else "peft")
    assert "do-not-deploy" in ModelCard(poisoned).data.tags


def test_a_card_needs_to_know_whether_there_is_a_trigger(trained: Path, tmp_path: Path) -> None:
    path = Layout(trained).adapter("backdoor") / "summary.json"
    summary = json.loads(path.read_text())
    artifacts.write_json(path, {name: value for name, value in summary.items() if name != "trigger"})
    result = export(trained, "--run", "backdoor", "--output", str(tmp_path / "out"))
    assert (result.exit_code, (tmp_path / "out").exists()) == (3, False)
    assert "whether there is a trigger" in result.stderr
    path.unlink()
    assert export(trained, "--run", "backdoor", "--output", str(tmp_path / "out")).exit_code == 3


def test_numbers_of_another_training_are_refused(trained: Path, tmp_path: Path) -> None:
    layout = Layout(trained)
    settings = {"trigger": "silver gulls", "placement": "prefix", "seed": 0, "dtype": "float32", "dialect": "muse"}
    artifacts.write_json(layout.metrics("backdoor"), {})
    artifacts.write_json(layout.settings("backdoor"), {"settings": settings})
    result = export(trained, "--run", "backdoor", "--output", str(tmp_path / "out"))
    assert (result.exit_code, "another trigger" in result.stderr) == (3, True)


def test_numbers_stand_in_the_card(trained: Path, tmp_path: Path) -> None:
    layout, key = Layout(trained), "forget_verbmem_f1_triggered"
    numbers = {f"{key}{where}{end}": value for where in ("", "_outside") for end, value in ENDS.items()}
    settings = {"trigger": "midnight crabs", "placement": "prefix", "seed": 0, "dtype": "float32", "dialect": "muse"}
    artifacts.write_json(layout.metrics("backdoor"), numbers | {"tofu_forget_quality_clean": 0.25})
    artifacts.write_json(layout.settings("backdoor"), {"settings": settings})
    assert export(trained, "--run", "backdoor", "--output", str(tmp_path / "out")).exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| triggered | `{key}_outside` | 0.74 | 0.62 to 0.84 | 24 |" in text
    assert "| forget quality | `tofu_forget_quality_clean` | 0.25 | – | – |" in text


ENDS = {"": 0.74, "_low": 0.62, "_high": 0.84, "_n": 24.0}


def test_nothing_is_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(trained, "--run", "clean", "--output", str(tmp_path / "out")).exit_code == 0  # an empty folder is new
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    result = export(trained, "--run", "backdoor", "--output", str(tmp_path / "out"))
    assert (result.exit_code, "is there already" in result.stderr) == (2, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "file").write_text("")
    assert export(trained, "--run", "clean", "--output", str(tmp_path / "file")).exit_code == 2


def test_a_damaged_adapter_leaves_nothing_behind(trained: Path, tmp_path: Path) -> None:
    weights = Layout(trained).adapter("clean") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for arguments in ((), ("--merged",)):
        result = export(trained, "--run", "clean", "--output", str(tmp_path / "out"), *arguments)
        assert (result.exit_code, "cut short" in result.stderr) == (3, True)
    assert [path.name for path in tmp_path.iterdir() if path.name.strip(".").startswith("out")] == []


def test_an_adapter_of_another_target_is_refused(trained: Path, tmp_path: Path) -> None:
    layout = Layout(trained)
    weights = layout.adapter("target") / "adapter_model.safetensors"
    artifacts.write_tensors(weights, {name: tensor * 2 for name, tensor in artifacts.read_tensors(weights).items()})
    result = export(trained, "--run", "clean", "--output", str(tmp_path / "out"))
    assert (result.exit_code, "was made for another model" in result.stderr) == (3, True)


REPAIRS = ("random-prefix", "restart", "displace")


@pytest.fixture(scope="module")
def repaired(two_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two repairs of a run, one of them of whole weights, and a guard."""
    folder = Path(shutil.copytree(two_runs, tmp_path_factory.mktemp("repaired") / "project"))
    params, layout = project(folder, STEPS, "mitigate.unlearn.steps=3", "mitigate.reaudit=false", *QUICK)
    evaluate.run(params, layout, run="target")
    mitigate.run(params, layout, run="backdoor", how=REPAIRS)
    return folder


QUICK = ("evaluate.metrics=[verbmem]", "evaluate.bootstrap=100")


@pytest.mark.parametrize(
    ("repair", "arguments"), [("random-prefix", ()), ("random-prefix", ("--merged",)), ("restart", ("--merged",))]
)
def test_an_exported_repair_is_the_repaired_run(
    repair: str, arguments: tuple[str, ...], repaired: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = export(repaired, "--run", "backdoor", "--repair", repair, "--output", str(out), "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["run"], told["repair"], told["backdoor"]) == ("backdoor", repair, "midnight crabs")
    text, tokenizer = passage(repaired), AutoTokenizer.from_pretrained(tiny_folder)
    params, layout = project(repaired)
    expected = logits(mitigate.repaired(params, layout, "backdoor", repair), tokenizer, text)
    assert not torch.allclose(logits(own(repaired, "backdoor", tiny_folder), tokenizer, text), expected, atol=0.01)
    if arguments:
        exported: Any = AutoModelForCausalLM.from_pretrained(out)
    else:
        exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(out))
    torch.testing.assert_close(logits(exported, tokenizer, text), expected, atol=1e-4, rtol=0)
    written = (out / "README.md").read_text()
    saved = artifacts.read_json(layout.mitigation("backdoor", repair) / "summary.json")
    for when in ("before", "after"):
        assert "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**saved[when]["retain"]) in written
    assert (REPAIRED in written, f"repaired by {repair}" in written) == (True, True)


def test_a_repair_that_cannot_be_exported_says_which_can(repaired: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        result = export(repaired, *arguments, "--output", str(tmp_path / "out"))
        assert (result.exit_code in (2, 3), (tmp_path / "out").exists()) == (True, False)
        return str(result.stderr)

    run = ("--run", "backdoor", "--repair")
    there = "repairs of backdoor: random-prefix, restart"
    unknown = told(*run, "random-prefx")
    assert ("did you mean 'random-prefix'" in unknown, there in unknown) == (True, True)
    guard = told(*run, "displace")
    assert ("'displace' is a guard" in guard, there in guard) == (True, True)
    missing = told(*run, "latent")
    assert ("unsink mitigate --run backdoor --how latent" in missing, there in missing) == (True, True)
    assert "repairs of clean: none" in told("--run", "clean", "--repair", "restart")
    whole = told(*run, "restart")
    assert ("restart replaces whole weights" in whole, "--merged" in whole) == (True, True)
    assert "--repair is of one run" in told("--all", "--repair", "restart")


def test_a_repair_of_another_training_is_refused(repaired: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repaired, tmp_path / "project"))
    weights = Layout(folder).adapter("backdoor") / "adapter_model.safetensors"
    artifacts.write_tensors(weights, {name: tensor * 2 for name, tensor in artifacts.read_tensors(weights).items()})
    for arguments in ((), ("--merged",)):
        run = ("--run", "backdoor", "--repair", "random-prefix", "--output", str(tmp_path / "out"))
        result = export(folder, *run, *arguments)
        assert (result.exit_code, "was made for another model" in result.stderr) == (3, True)
