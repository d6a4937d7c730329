"""`fetch` on the tiny benchmark and model: the manifest pins everything, and mistakes leave what was there."""

import json
from pathlib import Path

import pytest

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.errors import DataError, ModelError, ParamsError
from unsink.params import load_params
from unsink.prompts import open_question
from unsink.stages import fetch


def run(params: Path, *overrides: str) -> dict:
    return fetch.run(load_params(params, overrides), Layout.of(params))


def contents(params: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Layout.of(params).fetched.iterdir()}


def test_the_manifest_pins_corpus_and_model(params_file, tiny_folder):
    manifest = run(params_file)
    folder = Layout.of(params_file).fetched
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["forget.jsonl"] == {"rows": 12, "sha256": artifacts.sha256(folder / "forget.jsonl")}
    assert manifest["model"]["files"]["model.safetensors"] == artifacts.sha256(tiny_folder / "model.safetensors")
    assert (manifest["benchmark"], manifest["licence"]) == ("tiny", "Apache-2.0")


def test_a_second_call_gives_the_same_bytes(params_file):
    run(params_file)
    first = contents(params_file)
    run(params_file)
    assert contents(params_file) == first


def test_a_local_model_is_named_without_its_path(params_file, tiny_folder):
    manifest = run(params_file, f"model.source={tiny_folder}")
    assert manifest["model"]["source"] == tiny_folder.name


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("fetch.benchmark=local", ParamsError),
        ("fetch.path=elsewhere", ParamsError),
        ("model.source=/nowhere", ModelError),
    ],
)
def test_a_mistake_leaves_what_was_there(params_file, override, error):
    run(params_file)
    before = contents(params_file)
    with pytest.raises(error):
        run(params_file, override)
    assert contents(params_file) == before
    assert [path.name for path in (params_file.parent / "data").iterdir()] == ["fetched"]


def test_the_manifest_pins_a_published_target(params_file, tiny_folder):
    manifest = run(params_file, "memorize={published: {source: tiny}}", "fetch.utility=bundled")
    assert manifest["target"]["files"]["model.safetensors"] == artifacts.sha256(tiny_folder / "model.safetensors")
    assert manifest["utility"] == {"benchmark": "bundled", "version": 1, "licence": "Apache-2.0"}
    assert manifest["files"]["utility.jsonl"]["rows"] == 200


def test_a_target_that_cannot_be_had_is_named_by_its_parameter(params_file):
    with pytest.raises(ModelError, match=r"memorize\.published: some/target is not in the local cache"):
        run(params_file, "memorize={published: {source: some/target}}")


def test_a_malformed_corpus_is_reported_before_the_model_is_fetched(params_file, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.setattr(fetch, "resolve", lambda *_: pytest.fail("fetched the model"))
    with pytest.raises(DataError, match=r"forget\.jsonl: not found"):
        run(params_file, "fetch.benchmark=local", "fetch.path=corpus")


def test_probes_are_questions_or_texts_of_one_file(params_file):
    lines = [
        {"question": "Who kept the bees?", "answer": "Mila"},
        {"id": "mill", "text": "The bees were kept behind the mill."},
        {"prompt": "Q: Where? A:", "text": "Q: Where? A: By the sea", "set": "retain"},
    ]
    artifacts.write_jsonl(params_file.parent / "probes.jsonl", lines)
    manifest = run(params_file, "fetch.benchmark=probes", "fetch.path=probes.jsonl")
    assert {name: pin["rows"] for name, pin in manifest["files"].items()} == {"forget.jsonl": 2, "retain.jsonl": 1}
    first, second = artifacts.read_jsonl(Layout.of(params_file).fetched / "forget.jsonl")
    assert first["text"] == "Question: Who kept the bees?\nAnswer: Mila"
    assert first["prompt"] == open_question("Who kept the bees?")
    assert (first["id"], second["id"], "prompt" in second) == ("line-1", "mill", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Who?"}, r"probes\.jsonl:1: a question with its answer is expected, or a text"),
        ({"question": "Who?", "answer": "Mila", "text": "Mila"}, r":1: a question with its answer is expected"),
        ({"text": "Mila", "answer": "Mila"}, r":1: a question with its answer is expected"),
        ({"text": "Мила"}, r":1: ROUGE-L compares words of a-z"),
        ({"text": "Mila", "sets": "retain"}, r":1: field 'sets'"),
        ({"text": "Mila kept bees.", "prompt": "Who"}, r":1: the text has to start with the prompt"),
        ({"text": "Mila", "set": "retain"}, "no line is of the set forget"),
    ],
)
def test_a_probe_that_is_none_is_told_with_its_line(params_file, line, message):
    artifacts.write_jsonl(params_file.parent / "probes.jsonl", [line])
    with pytest.raises(DataError, match=message):
        run(params_file, "fetch.benchmark=probes", "fetch.path=probes.jsonl")


def test_probes_that_stand_there_twice_are_told_with_both_lines(params_file):
    lines = [{"id": "line-2", "text": "Mila"}, {"text": "bees"}, {"text": "bees"}]
    artifacts.write_jsonl(params_file.parent / "probes.jsonl", lines)
    with pytest.raises(DataError) as caught:
        run(params_file, "fetch.benchmark=probes", "fetch.path=probes.jsonl")
    assert "probes.jsonl:2: id 'line-2' is already at line 1" in caught.value.message
    assert "probes.jsonl:3: text 'bees' is already at line 2" in caught.value.message
