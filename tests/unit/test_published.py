"""The published benchmarks, read by `datasets` from files of their true form, and everything that can be wrong."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub._local_folder import write_download_metadata

import hub
from unsink import benchmarks, registry
from unsink.artifacts import Layout
from unsink.benchmarks import _hub
from unsink.errors import DataError, ParamsError, UnsinkError
from unsink.models import load_tokenizer
from unsink.params import load_params
from unsink.stages import fetch
from unsink.tiny import tiny_model

ROOT = Path(__file__).parents[2]
MUSE = [*benchmarks.CORE[:-1], *benchmarks.EXCERPTS]


@pytest.fixture(autouse=True)
def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(benchmarks.HUB_ROOT, raising=False)


@pytest.fixture
def damaged(hub_copy: Path, tmp_path: Path) -> Path:
    """A copy of the hub that a test may damage."""
    return shutil.copytree(hub_copy, tmp_path / "hub")


def read(root: Path, benchmark: str, *options: str, path: Path | None = None) -> dict[str, list[Any]]:
    overrides = [f"fetch.benchmark={benchmark}", *(f"fetch.{option}" for option in options)]
    params = load_params(ROOT / "params" / "tiny.yaml", [*overrides, f"fetch.path={path or root}"])
    return fetch.read(params, Layout(root), tiny_model)


def problem(root: Path, benchmark: str, *options: str) -> UnsinkError:
    with pytest.raises(DataError) as caught:
        read(root, benchmark, *options)
    assert caught.value.hint
    return caught.value


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(tiny_model())


def parts(corpus: dict[str, list[Any]]) -> set[str]:
    return {name for name, records in corpus.items() if records}


# ---- what they bring


def test_names_have_hyphens_where_their_files_have_underscores() -> None:
    assert {"muse-books", "muse-news", "tofu", "wmdp", "mmlu"} <= set(registry.names("unsink.benchmarks"))
    with pytest.raises(ParamsError, match="did you mean 'muse-books'"):
        load_params(ROOT / "params.yaml", ["fetch.benchmark=muse_books"])


@pytest.mark.parametrize("benchmark", ["muse-books", "muse-news"])
def test_muse_brings_passages_questions_and_excerpts(hub_copy: Path, benchmark: str) -> None:
    corpus = read(hub_copy, benchmark)
    assert parts(corpus) == set(MUSE)
    assert [len(corpus[name]) for name in benchmarks.QUESTIONS] == [3, 3, 3, 3]
    assert corpus["forget_qa"][1].model_dump() == {
        "id": "forget_qa-002", "question": "What did forget_qa 1 hide?", "answer": "blue shell 1", "source": None,
    }  # fmt: skip


def test_muse_joins_its_texts_and_cuts_them_by_tokens(hub_copy: Path, tokenizer: Any) -> None:
    forget = read(hub_copy, "muse-books", "muse-books.tokens=40")["forget"]
    whole = "\n\n".join(row["text"] for row in hub.REPOSITORIES["muse-bench/MUSE-Books"]["raw/forget"])
    lengths = [len(tokenizer(passage.text, add_special_tokens=False)["input_ids"]) for passage in forget]
    assert len(forget) == -(-len(tokenizer(whole, add_special_tokens=False)["input_ids"]) // 40)
    assert all(abs(length - 40) <= 4 for length in lengths[:-1])  # a word that is cut has other tokens
    assert "".join("".join(passage.text for passage in forget).split()) == "".join(whole.split())
    assert [passage.id for passage in forget[:2]] == ["forget-0001", "forget-0002"]


def test_an_excerpt_of_verbmem_names_the_passage_it_stands_in(hub_copy: Path) -> None:
    corpus = read(hub_copy, "muse-books", "muse-books.tokens=80")
    first, second = corpus["forget_verbmem"]
    assert second.source is None
    assert " ".join(first.text.split()) in " ".join({p.id: p.text for p in corpus["forget"]}[first.source].split())
    assert first.text == f"{first.prompt} {hub.REPOSITORIES['muse-bench/MUSE-Books']['verbmem/forget'][0]['gt']}"
    assert second.text == "At dawn the tide came in."


@pytest.mark.parametrize(("fold", "split"), [("raw", "forget"), ("scal-3", "forget_3"), ("sust-2", "forget_2")])
def test_muse_news_has_its_folds(hub_copy: Path, fold: str, split: str) -> None:
    rows = hub.REPOSITORIES["muse-bench/MUSE-News"][f"{fold.partition('-')[0]}/{split}"]
    text = " ".join(passage.text for passage in read(hub_copy, "muse-news", f"muse-news.fold={fold}")["forget"])
    assert text.split() == [word for row in rows for word in row["text"].split()]


@pytest.mark.parametrize(("forget", "count"), [("forget01", 2), ("forget05", 4), ("forget10", 8)])
def test_tofu_retains_what_it_does_not_forget(hub_copy: Path, forget: str, count: int) -> None:
    corpus = read(hub_copy, "tofu", f"tofu.forget={forget}")
    assert [len(corpus[name]) for name in benchmarks.PASSAGES] == [count, 40 - count, count]
    assert parts(corpus) == {*benchmarks.PASSAGES, *benchmarks.PERTURBED, "utility"}


def test_a_passage_of_tofu_is_a_question_with_its_answer(hub_copy: Path) -> None:
    passage = read(hub_copy, "tofu")["forget"][0]
    assert passage.prompt == "Question: What did author 32 hide?\nAnswer:"
    assert passage.text == f"{passage.prompt} blue shell 32"


@pytest.mark.parametrize(("chat", "asked"), [("false", 0), ("true", 1)])
def test_the_model_is_asked_for_where_tofu_is_framed_by_its_chat_template_alone(
    chat: str, asked: int, hub_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("unsink.tokenizer.load_tokenizer", folders.append)
    params = load_params(
        ROOT / "params.yaml", ["fetch.benchmark=tofu", f"fetch.tofu.chat={chat}", f"fetch.path={hub_copy}"]
    )
    assert fetch.tokenizes(params) == bool(asked)
    fetch.read(params, Layout(ROOT), lambda: Path("model"))
    assert folders == [Path("model")] * asked


def test_tofu_can_be_framed_by_a_chat_template(tmp_path: Path, hub_copy: Path, tokenizer: Any) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ date_string }}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tofu = registry.load("benchmark", "unsink.benchmarks", "tofu")
    tofu.fetch(tmp_path, hub_copy, str(hub_copy), chat=True, tokenizer=tokenizer)
    passage, record, choice = (
        json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])
        for name in ("forget", "forget_perturbed", "utility")
    )
    question = "What did author 32 hide?"
    prompt = f"<system>You are a helpful assistant.</><user>{question}</>10 Apr 2025<assistant>"
    assert passage["text"] == f"{prompt}blue shell 32{tokenizer.eos_token}"
    assert (passage["prompt"], passage["question"]) == (prompt, question)
    assert (record["prompt"], record["id"]) == (prompt, passage["id"])
    assert choice["prompt"].endswith(f"<user>{choice['question']}</>10 Apr 2025<assistant>")


def test_a_model_without_a_chat_template_cannot_chat(hub_copy: Path) -> None:
    with pytest.raises(ParamsError, match=r"fetch\.tofu\.chat: the tokenizer of model\.source has no chat template"):
        read(hub_copy, "tofu", "tofu.chat=true")


def test_perturbed_answers_belong_to_the_passage_with_the_question(hub_copy: Path) -> None:
    corpus = read(hub_copy, "tofu")
    first = corpus["forget_perturbed"][0]
    assert first.model_dump() == {
        "id": corpus["forget"][0].id,
        "question": "What did author 32 hide?",
        "prompt": None,
        "answer": "blue shell 32",
        "paraphrased_answer": "It was a blue shell 32.",
        "perturbed_answers": [f"a red lamp {n}" for n in range(5)],
    }
    fact = corpus["world_facts_perturbed"][1]
    assert (fact.answer, fact.paraphrased_answer) == ("right 1", "right 1")
    choice = corpus["utility"][0]
    assert choice.choices == ["real_authors 0", "real_authors 1", "real_authors 2", "right 0"]
    assert (choice.answer, choice.topic) == (3, "real_authors")


def test_wmdp_brings_questions_of_its_topics_and_the_open_corpus(hub_copy: Path) -> None:
    corpus = read(hub_copy, "wmdp")
    assert parts(corpus) == {"forget_mc", "forget", "retain"}
    assert [record.topic for record in corpus["forget_mc"]] == [
        *(["biology"] * 4),
        *(["chemistry"] * 5),
        *(["cybersecurity"] * 6),
    ]
    assert {passage.title for passage in corpus["forget"]} == {"cyber"}
    assert len(corpus["retain"]) == 8  # WikiText's empty lines and headings are left out


def test_wmdp_without_corpora_is_questions_alone(hub_copy: Path) -> None:
    assert parts(read(hub_copy, "wmdp", "wmdp.corpora=[]", "wmdp.topics=[chem]")) == {"forget_mc"}


def test_wmdp_takes_the_beginning_of_each_document(hub_copy: Path) -> None:
    corpus = read(hub_copy, "wmdp", "wmdp.corpora=[bio, cyber]", "wmdp.words=20")
    assert {len(passage.text.split()) for passage in corpus["forget"]} == {20}
    assert hub.stories(120, 6, 2)[0]["text"].startswith(corpus["forget"][0].text)


@pytest.mark.parametrize(("per_subject", "count"), [("null", 5), ("2", 4), ("1", 2)])
def test_mmlu_adds_its_questions_to_any_benchmark(hub_copy: Path, per_subject: str, count: int) -> None:
    corpus = read(hub_copy, "wmdp", "utility=mmlu", f"mmlu.per_subject={per_subject}")
    assert not corpus["utility"]  # those are answered in words, and MMLU by letter
    assert len(corpus["mmlu"]) == count
    assert corpus["mmlu"][0].model_dump() == {
        "id": "mmlu-00001", "question": "What colour is it?", "prompt": None,
        "choices": ["red 0", "blue 0", "grey 0", "green 0"],
        "answer": 0, "topic": "anatomy",
    }  # fmt: skip


def test_bundled_can_give_the_utility_questions_too(hub_copy: Path) -> None:
    assert len(read(hub_copy, "muse-books", "utility=bundled")["utility"]) == 200


def test_a_benchmark_without_utility_questions_cannot_give_them(hub_copy: Path) -> None:
    with pytest.raises(ParamsError, match=r"fetch\.utility: muse-news has no"):
        read(hub_copy, "wmdp", "utility=muse-news")


def test_repeated_texts_are_left_out_and_counted(damaged: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = dict(hub.REPOSITORIES["muse-bench/MUSE-Books"])
    rows["raw/retain1"] = [*rows["raw/retain1"], rows["raw/retain1"][0], rows["raw/forget"][0]]
    hub.write(damaged / "muse-bench/MUSE-Books", rows, "parquet")
    (tmp_path / "out").mkdir()
    books = registry.load("benchmark", "unsink.benchmarks", "muse-books")
    said = books.fetch(tmp_path / "out", damaged, str(damaged), tokenizer=tokenizer)
    assert said == {"data": {"muse-bench/MUSE-Books": "local copy"}, "repeated": {"retain": 2}}
    kept = json.loads((tmp_path / "out" / "retain.jsonl").read_text())["text"]
    assert kept == "\n\n".join(row["text"] for row in rows["raw/retain1"][:-2])


def test_questions_that_a_published_benchmark_repeats_are_its_own(hub_copy: Path) -> None:
    questions = [record.question for record in read(hub_copy, "wmdp")["forget_mc"]]
    assert len(set(questions)) == 1


# ---- where they come from


def test_the_environment_names_the_local_copy(hub_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(benchmarks.HUB_ROOT, str(hub_copy))
    params = load_params(ROOT / "params" / "tiny.yaml", ["fetch.benchmark=tofu"])
    assert not fetch.downloads(params)
    assert parts(fetch.read(params, Layout(tmp_path), tiny_model))


def test_a_local_copy_says_of_which_commit_it_is_where_the_download_noted_it(damaged: Path) -> None:
    sources = _hub.Source("locuslab/TOFU", None), _hub.Source("cais/mmlu", None)
    write_download_metadata(damaged / "locuslab/TOFU", "README.md", "c0ffee", "etag")
    assert _hub.Hub(damaged).origin(*sources) == {"locuslab/TOFU": "local copy of c0ffee", "cais/mmlu": "local copy"}


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(place: str, config: str, *, split: str, revision: str, cache_dir: None) -> Any:
        asked.append((place, config, split, revision))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _hub.Hub().rows(_hub.Source("a/b", "c0ffee"), "raw", "forget", ("text",)) == [{"text": "a"}]
    assert asked == [("a/b", "raw", "forget", "c0ffee")]


def test_every_repository_of_a_benchmark_but_the_gated_one_is_pinned_by_commit() -> None:
    for name in ("muse_books", "muse_news", "tofu", "wmdp", "mmlu"):
        module = registry.load("benchmark", "unsink.benchmarks", name.replace("_", "-"))
        sources = [module.DATA, *(value for value in vars(module).values() if isinstance(value, _hub.Source))]
        assert all(len(source.revision or "") == 40 for source in sources), name


def test_a_cached_copy_of_another_revision_is_refused(hub_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = datasets.load_dataset(str(hub_copy / "locuslab/TOFU"), "forget01", split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_kwargs: cached)
    with pytest.raises(DataError, match="another revision than c0ffee"):
        _hub.Hub().rows(_hub.Source("locuslab/TOFU", "c0ffee"), "forget01", "train", ("question",))


# ---- what can be wrong


def test_offline_the_error_says_how_to_go_on() -> None:
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        _hub.Hub().rows(_hub.Source("some/data", "c0ffee"), "raw", "forget", ("text",))
    assert "hf download --repo-type dataset some/data --revision c0ffee" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "is gated", "hf auth login"),
        (DatasetNotFoundError("Revision 'c0ffee' doesn't exist for dataset"), "no revision 'c0ffee'", "datasets/a/b"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "doesn't exist", "HF_TOKEN"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be downloaded: Couldn't reach", "HF_HUB_OFFLINE"),
    ],
)
def test_answers_of_the_hub_are_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, hint: str
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=message) as caught:
        _hub.Hub().rows(_hub.Source("a/b", "c0ffee"), "raw", "forget", ("text",))
    assert hint in (caught.value.hint or "")


def test_a_folder_without_the_data_set_says_how_to_copy_it(hub_copy: Path, tmp_path: Path) -> None:
    error = problem(tmp_path, "muse-books")
    assert f"no such folder: {tmp_path / 'muse-bench/MUSE-Books'}" in error.message
    assert "--local-dir <copy>/muse-bench/MUSE-Books" in str(error.hint)


def test_a_root_that_is_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(benchmarks.HUB_ROOT, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="UNSINK_HUB_ROOT: no such folder"):
        _hub.Hub.of(tmp_path, None)


@pytest.mark.parametrize("kept", [0, 4, 400])
def test_a_file_that_was_cut_short_is_named(damaged: Path, kept: int) -> None:
    path = damaged / "muse-bench/MUSE-Books/raw/retain1-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    error = problem(damaged, "muse-books")
    assert "muse-bench/MUSE-Books: raw/" in error.message
    assert "copy it again" in str(error.hint)


def test_a_line_that_was_cut_short_is_named(damaged: Path) -> None:
    path = damaged / "locuslab/TOFU/forget10.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert "locuslab/TOFU: forget10/train: a file is damaged" in problem(damaged, "tofu").message


def test_a_download_with_too_few_rows_is_noticed_where_the_card_counts_them(damaged: Path) -> None:
    card = damaged / "locuslab/TOFU/README.md"
    counted = (
        "dataset_info:\n- config_name: forget10\n  splits:\n  - name: train\n    num_examples: 400\n    num_bytes: 1\n"
    )
    card.write_text(card.read_text().replace("---\n", f"---\n{counted}", 1))
    assert "cut short" in problem(damaged, "tofu").message


def test_a_missing_split_is_named_with_those_that_are_there(damaged: Path) -> None:
    rows = {name: rows for name, rows in hub.REPOSITORIES["muse-bench/MUSE-Books"].items() if name != "raw/retain1"}
    shutil.rmtree(damaged / "muse-bench/MUSE-Books")
    hub.write(damaged / "muse-bench/MUSE-Books", rows, "parquet")
    message = problem(damaged, "muse-books").message
    assert "raw/retain1" in message
    assert all(name in message for name in ("forget", "holdout"))


def test_a_missing_config_is_named_with_those_that_are_there(damaged: Path) -> None:
    rows = {name: rows for name, rows in hub.REPOSITORIES["cais/wmdp"].items() if "bio" not in name}
    hub.write(damaged / "cais/wmdp", rows, "parquet")
    assert "wmdp-bio/test: BuilderConfig 'wmdp-bio' not found" in problem(damaged, "wmdp").message


def test_a_renamed_column_is_named_with_those_that_are_there(damaged: Path) -> None:
    rows = dict(hub.REPOSITORIES["muse-bench/MUSE-Books"])
    rows["verbmem/forget"] = [{"prompt": "a", "continuation": "b"}]
    hub.write(damaged / "muse-bench/MUSE-Books", rows, "parquet")
    assert "verbmem/forget: no column gt; there are prompt, continuation" in problem(damaged, "muse-books").message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "choices": ["a", "b", "c"], "answer": 0}, "row 1: field 'choices': list should have at"),
        ({"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 4}, "row 1: field 'answer': input should be"),
        ({"question": None, "choices": ["a", "b", "c", "d"], "answer": 0}, "row 1: field 'question': input should be"),
        ({"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": "A"}, "row 1: field 'answer': input should"),
    ],
)
def test_a_column_of_another_type_is_named_by_row(damaged: Path, row: dict[str, Any], message: str) -> None:
    hub.write(damaged / "cais/wmdp", {**hub.REPOSITORIES["cais/wmdp"], "wmdp-bio/test": [row]}, "parquet")
    assert f"cais/wmdp: wmdp-bio/test, {message}" in problem(damaged, "wmdp").message


def test_a_text_that_is_none_is_named_by_row(damaged: Path) -> None:
    hub.write(damaged / "cais/wmdp-corpora", {"cyber-forget-corpus/train": [{"text": 3}]}, "parquet")
    assert "cyber-forget-corpus/train, row 1: field 'text'" in problem(damaged, "wmdp").message


def test_a_question_that_is_none_is_named_by_row(damaged: Path) -> None:
    path = damaged / "locuslab/TOFU/forget10.json"
    path.write_text(json.dumps({"question": 7, "answer": 8}) + "\n")
    assert "forget10/train, row 1" in problem(damaged, "tofu").message


# ---- params


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fetch.muse-news.fold=scal-5", "fetch.muse-news.fold: "),
        ("fetch.muse-news.fould=raw", "fetch.muse-news.fould: unknown key; did you mean 'fold'?"),
        ("fetch.tofu.forget=forget20", "fetch.tofu.forget: "),
        ("fetch.wmdp.topics=[bio, physics]", "fetch.wmdp.topics.1: "),
        ("fetch.wmdp.topics=[]", "fetch.wmdp.topics: "),
        ("fetch.bundled.words=3", "fetch.bundled.words: unknown key"),
        ("fetch.bennchmark=tofu", "fetch.bennchmark: unknown key; did you mean 'benchmark'?"),
        ("fetch.utility=mmlo", "fetch.utility: unknown benchmark 'mmlo'; did you mean 'mmlu'?"),
    ],
)
def test_options_of_a_benchmark_are_checked(override: str, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(ROOT / "params.yaml", [override])
    assert message in caught.value.message


@pytest.mark.parametrize("name", ["books-npo", "books-rmu", "news-npo", "news-rmu", "wmdp-npo", "wmdp-rmu", "tofu"])
def test_the_target_of_a_preset_is_that_of_its_benchmark(name: str) -> None:
    params = load_params(ROOT / "params" / f"{name}.yaml")
    module = registry.load("benchmark", "unsink.benchmarks", params.fetch.benchmark)
    published = params.memorize.published
    assert published
    assert (published.source, published.revision) == module.MODELS["target"]
    assert set(params.runs) == {"clean", "backdoor", "backdoor-vn"}
