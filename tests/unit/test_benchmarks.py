"""Every benchmark gives the eight files; every mistake in a corpus is named by file and line."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsink import benchmarks, registry
from unsink.benchmarks import CORE, SCHEMA, bundled, local, tiny
from unsink.errors import DataError, ParamsError

PASSAGE = {"id": "f1", "title": "A book", "text": "Once there was a lamp."}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A small corpus without mistakes, in the folder `corpus` of a project."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    question = {"id": "q1", "question": "What was there?", "answer": "a lamp", "source": "f1"}
    rows = {
        "forget": PASSAGE,
        "retain": {"id": "r1", "title": "Another", "text": "Nobody saw the bridge."},
        "holdout": {"id": "h1", "title": "A third", "text": "It rained."},
        "forget_qa": question,
        "forget_qa_icl": question | {"id": "q2", "question": "When was there a lamp?", "answer": "once"},
        "retain_qa": question | {"id": "q3", "question": "Who saw it?", "answer": "nobody", "source": "r1"},
        "retain_qa_icl": question | {"id": "q4", "question": "What was unseen?", "source": "r1"},
        "utility": {
            "id": "u1",
            "question": "One plus one?",
            "choices": ["1", "2", "3", "4"],
            "answer": 1,
            "topic": "sums",
        },
    }
    for name, row in rows.items():
        save(folder, name, row)
    return folder


def save(folder: Path, name: str, *rows: dict) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        benchmarks.read(folder)
    return error.value.message


def fetch_local(folder: Path, dest: Path) -> None:
    dest.mkdir()
    local.fetch(dest, folder.parent, folder.name)


def test_the_package_holds_the_three_benchmarks():
    assert {"bundled", "local", "tiny"} <= set(registry.names("unsink.benchmarks"))


@pytest.mark.parametrize("benchmark", [bundled, tiny])
def test_a_benchmark_writes_its_files_in_the_schema(benchmark, tmp_path):
    benchmark.fetch(tmp_path, tmp_path, None)
    allowed = {f"{name}.jsonl" for name in SCHEMA}
    assert {f"{name}.jsonl" for name in CORE} <= {path.name for path in tmp_path.iterdir()} <= allowed
    benchmarks.read(tmp_path)
    assert benchmark.LICENCE == "Apache-2.0"


@pytest.mark.parametrize("benchmark", [bundled, tiny])
def test_a_path_is_refused_by_a_benchmark_with_its_own_text(benchmark, tmp_path):
    with pytest.raises(ParamsError, match=r"fetch\.path"):
        benchmark.fetch(tmp_path, tmp_path, "corpus")


def test_bundled_prefers_the_project_folder(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    corpus.rename(tmp_path / "data" / "bundled")
    (tmp_path / "out").mkdir()
    bundled.fetch(tmp_path / "out", tmp_path, None)
    assert len(benchmarks.read(tmp_path / "out")["forget"]) == 1


def test_tiny_is_small_and_always_the_same(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tiny.fetch(tmp_path / name, tmp_path, None)
    found = benchmarks.read(tmp_path / "one")
    assert [len(found[name]) for name in CORE] == [12, 16, 8, 12, 3, 12, 3, 12]
    assert not any(found[name] for name in SCHEMA.keys() - set(CORE))
    for name in CORE:
        assert (tmp_path / "one" / f"{name}.jsonl").read_bytes() == (tmp_path / "two" / f"{name}.jsonl").read_bytes()


def test_tiny_worlds_share_only_small_words(tmp_path):
    tiny.fetch(tmp_path, tmp_path, None)
    found = benchmarks.read(tmp_path)
    forget, retain = ({w for r in found[name] for w in r.text.lower().split()} for name in ("forget", "retain"))
    assert max(map(len, forget & retain)) <= 4


def test_tiny_answers_stand_in_their_source(tmp_path):
    tiny.fetch(tmp_path, tmp_path, None)
    found = benchmarks.read(tmp_path)
    texts = {record.id: record.text for name in benchmarks.PASSAGES for record in found[name]}
    assert all(r.answer in texts[r.source] for name in benchmarks.QUESTIONS for r in found[name])


def test_general_questions_may_be_missing_but_are_no_questions_of_utility(corpus, tmp_path):
    assert benchmarks.extra(corpus, "general_qa") == []
    save(corpus, "general_qa", {"id": "g-1", "question": "Who?", "answer": "Nobody"})
    fetch_local(corpus, tmp_path / "out")
    assert benchmarks.extra(tmp_path / "out", "general_qa") == [{"id": "g-1", "question": "Who?", "answer": "Nobody"}]
    asked = json.loads((corpus / "utility.jsonl").read_text().splitlines()[0])["question"]
    save(corpus, "general_qa", {"id": "g-1", "question": asked, "answer": "Nobody"})
    with pytest.raises(DataError, match=r"general_qa\.jsonl:1: question .* is already at .*utility\.jsonl:1"):
        benchmarks.read(corpus)


def test_local_copies_a_corpus_and_drops_unknown_fields(corpus, tmp_path):
    save(corpus, "forget", PASSAGE | {"note": "mine"})
    fetch_local(corpus, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "forget.jsonl").read_text()) == PASSAGE


def test_local_needs_a_path(tmp_path):
    with pytest.raises(ParamsError, match=r"fetch\.path"):
        local.fetch(tmp_path, tmp_path, None)


def test_local_names_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        local.fetch(tmp_path, tmp_path, "nowhere")


def test_a_missing_file_is_named_and_the_hint_lists_all(corpus):
    (corpus / "utility.jsonl").unlink()
    with pytest.raises(DataError, match=r"utility\.jsonl: not found") as error:
        benchmarks.read(corpus)
    assert "forget_qa_icl.jsonl" in error.value.hint


def test_an_empty_file_is_named(corpus):
    (corpus / "retain.jsonl").write_text("\n")
    assert "retain.jsonl: holds no records" in problem(corpus)


def test_broken_json_is_named_by_line(corpus):
    (corpus / "forget.jsonl").write_text(json.dumps(PASSAGE) + "\n{oops\n")
    assert "forget.jsonl:2: not JSON" in problem(corpus)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 200_000, '"\\ud800"'])
def test_what_python_cannot_read_is_named_by_line(corpus, text):
    (corpus / "forget.jsonl").write_text(json.dumps(PASSAGE) + f'\n{{"id": "f2", "title": "A", "text": {text}}}\n')
    assert "forget.jsonl:2: " in problem(corpus)


def test_blank_lines_count_but_do_not_matter(corpus):
    (corpus / "forget.jsonl").write_text(f'{json.dumps(PASSAGE)}\n\n{{"id": "f2", "title": "A book"}}\n')
    assert problem(corpus).endswith("forget.jsonl:3: field 'text' is missing")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("forget", {"text": None}, "field 'text': input should be a valid string, got None"),
        ("forget", {"text": "  "}, "field 'text' is empty"),
        ("forget", {"id": 7}, "field 'id': input should be a valid string, got 7"),
        ("forget", {"id": "f1/x"}, "field 'id': no '/' is allowed, it tells a passage from what is made of it"),
        ("utility", {"answer": 4}, "field 'answer': input should be less than or equal to 3, got 4"),
        ("utility", {"answer": "1"}, "field 'answer': input should be a valid integer, got '1'"),
        ("utility", {"answer": True}, "field 'answer': input should be a valid integer, got True"),
        ("utility", {"choices": ["1", "2", "3"]}, "field 'choices': list should have at least 4 items"),
        ("utility", {"choices": ["1", "2", "3", "1"]}, "the four choices are not different"),
        ("forget_qa", {"source": "r1"}, "source 'r1' is no id in forget.jsonl"),
        ("forget_qa", {"answer": "π"}, "field 'answer': ROUGE-L compares words of a-z and 0-9, 'π' has none"),
        ("retain", {"text": "Ἐν ἀρχῇ"}, "field 'text': ROUGE-L compares words"),
    ],
)
def test_a_bad_field_is_named_by_line(corpus, name, change, words):
    row = json.loads((corpus / f"{name}.jsonl").read_text())
    save(corpus, name, row | change)
    assert f"{name}.jsonl:1: {words}" in problem(corpus)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("forget", {"text": "New."}, "id 'f1' is already at"),
        ("forget", {"id": "f2"}, "text 'Once there was a lamp.' is already at"),
        ("forget_qa", {"question": "New?"}, "id 'q1' is already at"),
    ],
)
def test_a_repeated_record_is_named_with_the_first(corpus, name, change, words):
    row = json.loads((corpus / f"{name}.jsonl").read_text())
    save(corpus, name, row, row | change)
    message = problem(corpus)
    assert f"{name}.jsonl:2: {words}" in message
    assert message.endswith(f"{name}.jsonl:1")


def test_a_passage_to_forget_must_not_be_retained(corpus):
    save(corpus, "retain", PASSAGE | {"id": "r1"})
    assert "retain.jsonl:1: text" in problem(corpus)


def test_a_few_shot_question_must_not_be_asked(corpus):
    row = json.loads((corpus / "forget_qa.jsonl").read_text())
    save(corpus, "forget_qa_icl", row | {"id": "q2"})
    assert "forget_qa_icl.jsonl:1: question" in problem(corpus)


def test_a_question_of_ones_own_names_its_passage(corpus):
    row = json.loads((corpus / "forget_qa.jsonl").read_text())
    del row["source"]
    save(corpus, "forget_qa", row)
    assert problem(corpus).endswith("forget_qa.jsonl:1: field 'source' is missing")


def test_further_files_are_checked_and_copied(corpus, tmp_path):
    row = {
        "id": "p1",
        "question": "Who?",
        "answer": "Odo",
        "paraphrased_answer": "It was Odo.",
        "perturbed_answers": [],
    }
    save(corpus, "forget_perturbed", row)
    assert "forget_perturbed.jsonl:1: field 'perturbed_answers': list should have at least 1 item" in problem(corpus)
    save(corpus, "forget_perturbed", row | {"perturbed_answers": ["Ada"]})
    fetch_local(corpus, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "forget_perturbed.jsonl").read_text())["perturbed_answers"] == ["Ada"]


def test_a_file_with_an_unknown_name_is_not_passed_over(corpus, tmp_path):
    (corpus / "forget_pertubed.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"did you mean 'forget_perturbed\.jsonl'"):
        fetch_local(corpus, tmp_path / "out")


@pytest.mark.parametrize("prompt", ["Twice", "Once there was a lamp.", "once"])
def test_a_prompt_is_a_beginning_of_its_text_that_goes_on(corpus, prompt):
    save(corpus, "forget", PASSAGE | {"prompt": prompt})
    assert problem(corpus).endswith("forget.jsonl:1: the text has to start with the prompt, and to go on")


def test_a_corpus_with_a_manifest_needs_what_the_manifest_names(corpus):
    (corpus / "utility.jsonl").unlink()
    names = {path.name: {} for path in corpus.iterdir()}
    (corpus / "manifest.json").write_text(json.dumps({"files": names}))
    assert benchmarks.read(corpus)["utility"] == []
    (corpus / "retain.jsonl").unlink()
    assert "retain.jsonl: not found" in problem(corpus)


def test_only_published_benchmarks_may_repeat_a_question(corpus):
    row = json.loads((corpus / "utility.jsonl").read_text())
    save(corpus, "utility", row, row | {"id": "u2"})
    assert "utility.jsonl:2: question" in problem(corpus)
    files = {path.name: {} for path in corpus.iterdir()}
    (corpus / "manifest.json").write_text(json.dumps({"files": files, "published": True}))
    assert len(benchmarks.read(corpus)["utility"]) == 2


def test_a_stage_is_told_what_a_benchmark_lacks(corpus):
    assert benchmarks.part(corpus, "forget") == [PASSAGE]
    with pytest.raises(
        DataError, match=r"forget_mc\.jsonl: the benchmark that was fetched has no such records"
    ) as error:
        benchmarks.part(corpus, "forget_mc")
    assert "fetch.benchmark" in error.value.hint


def letters(text, **_):
    """A tokenizer whose tokens are single letters, each with the white space before it."""
    return {"offset_mapping": [match.span() for match in re.finditer(r"\s*\S", text)]}


def test_pieces_are_cut_every_so_many_tokens_and_the_last_is_shorter():
    assert benchmarks.pieces("abc d\ne fg h", 3, letters) == ["abc", "d\ne f", "g h"]
    assert benchmarks.pieces("abc", 3, letters) == ["abc"]
    assert benchmarks.pieces("  ", 3, letters) == []


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_pieces_lose_nothing_but_white_space(text, tokens):
    assert "".join("".join(benchmarks.pieces(text, tokens, letters)).split()) == "".join(text.split())


def test_all_problems_come_at_once_up_to_twenty(corpus):
    save(corpus, "forget", *[{"id": str(n)} for n in range(15)])
    lines = problem(corpus).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "and 10 more"
