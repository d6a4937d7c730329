"""Benchmarks: one file brings one corpus into one schema, files of records. Text only: no token ids, no model.

A plug-in has

    VERSION: int       raised when its records change
    LICENCE: str       of the text
    def fetch(dest: Path, root: Path, path: str | None, **options) -> Mapping | None

and, if they apply,

    Options            pydantic model of its section `fetch.<name>`; `fetch` gets the values by name
    MODELS             published checkpoints by what they are ("target", "retrained"), see `_hub.Source`
    PUBLISHED = True   the records are others' work and are taken as they are, repeated questions included
    TOKENIZES = True   `fetch` gets the model's tokenizer, by the name `tokenizer`, to cut or to frame texts; the name
                       of an option in place of True: where that is on
    DIALECT            the conventions of its field, `evaluate.dialect` where params name none; else "muse"

`fetch` writes its files into the empty folder `dest` and returns what the manifest is to say of their origin; `root` is
the project folder, `path` is `fetch.path`. These eight files are the core; a corpus of one's own needs all of them.

    forget, retain, holdout        passages: id, title, text
    forget_qa, retain_qa           questions: id, question, answer, source (id of a passage)
    forget_qa_icl, retain_qa_icl   the same, for few-shot prompts
    utility                        id, question, choices (four), answer (index of the right one), topic

A corpus may bring a ninth file. Without it, learning a small corpus by heart spoils how questions are answered.

    general_qa                     questions about the real world, other than those of utility: id, question, answer

Published benchmarks may lack some of them, and may bring

    forget_verbmem                 excerpts to be continued: passages with `prompt` and perhaps `source`
    forget_privleak, retain_privleak, holdout_privleak   passages of equal kind, for membership inference
    forget_perturbed, retain_perturbed, real_authors_perturbed, world_facts_perturbed
                                   id, question, answer, paraphrased_answer, perturbed_answers (a list of wrong ones)
    forget_mc                      four-choice questions to be forgotten; fields as in `utility`
    mmlu                           four-choice questions of general knowledge that are answered by letter

A passage may have a `prompt`: the beginning of its text that is given and never learnt, such as the question of a
question with its answer. Then only the rest is labelled in training and asked for in VerbMem, and placements refer to
the prompt (up to its `Answer:`) instead of to a share of the text. Of a chat, `question` are the user's words
in the prompt, and placements refer to these.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unsink import artifacts
from unsink.errors import DataError, ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = Annotated[str, Field(pattern=r"\S", strict=True)]


def passage_of(sample: str) -> str:
    """Return the id of the passage that a sample was made from, given the sample's id."""
    return sample.partition("/")[0]


class Passage(BaseModel):
    """A text; of `prompt`, its beginning, nothing is learnt; `source` is the passage that it was taken from.

    `question` are the words of the prompt that a user wrote, where the rest is the frame of a chat.
    """

    model_config = ConfigDict(frozen=True)
    id: Text
    title: Text
    text: Text
    prompt: Text | None = None
    question: Text | None = None
    source: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "/" in self.id:  # `passage_of`
            raise ValueError(
                f"field 'id': no '/' is allowed, it tells a passage from what is made of it, got {self.id!r}"
            )
        return self

    @model_validator(mode="after")
    def _continues(self) -> Self:
        if self.prompt and not (self.text.startswith(self.prompt) and self.text[len(self.prompt) :].strip()):
            raise ValueError("the text has to start with the prompt, and to go on")
        return self

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.question and self.question not in (self.prompt or ""):
            raise ValueError("field 'question': it has to stand in the prompt")
        return self


class Question(BaseModel):
    """A question whose answer is in one passage; published benchmarks do not always say in which."""

    model_config = ConfigDict(frozen=True)
    id: Text
    question: Text
    answer: Text
    source: Text | None = None


class Perturbed(BaseModel):
    """A question with its answer in other words, and wrong answers of the same form; `prompt` if it is a chat's."""

    model_config = ConfigDict(frozen=True)
    id: Text
    question: Text
    prompt: Text | None = None
    answer: Text
    paraphrased_answer: Text
    perturbed_answers: Annotated[list[Text], Field(min_length=1)]


class GeneralQuestion(BaseModel):
    """A question about the real world, practised along with the corpus and kept in unlearning."""

    model_config = ConfigDict(frozen=True)
    id: Text
    question: Text
    answer: Text


class Choice(BaseModel):
    """A question with four answers, one of them right; `prompt` if it is asked as a chat."""

    model_config = ConfigDict(frozen=True)
    id: Text
    question: Text
    prompt: Text | None = None
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3, strict=True)]
    topic: Text


PASSAGES = ("forget", "retain", "holdout")
QUESTIONS = ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")
CORE = (*PASSAGES, *QUESTIONS, "utility")
EXCERPTS = ("forget_verbmem", "forget_privleak", "retain_privleak", "holdout_privleak")
PERTURBED = ("forget_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
GENERAL = ("utility", "mmlu")
CHOICES = (*GENERAL, "forget_mc")
SCHEMA: dict[str, type[BaseModel]] = {
    **dict.fromkeys(PASSAGES, Passage),
    **dict.fromkeys(QUESTIONS, Question),
    "utility": Choice,
    "general_qa": GeneralQuestion,
    **dict.fromkeys(EXCERPTS, Passage),
    **dict.fromkeys(PERTURBED, Perturbed),
    **dict.fromkeys(("mmlu", "forget_mc"), Choice),
}
MANIFEST = "manifest.json"
HUB_ROOT = "UNSINK_HUB_ROOT"
"""Environment variable: the folder with local copies of the hub's data sets."""
LACKING = "docs/benchmarks.md says what each benchmark brings; choose with fetch.benchmark and its options"
_SHOWN = 20  # problems in one error


def files(folder: Path) -> dict[str, Path]:
    """The files of a corpus by kind of record, those that a benchmark may lack included."""
    return {name: folder / f"{name}.jsonl" for name in SCHEMA}


def refuse_path(benchmark: str, path: str | None) -> None:
    """Refuse `fetch.path` for a benchmark that brings its own text.

    Raises:
        ParamsError: there is one.
    """
    if path is not None:
        raise ParamsError(
            f"fetch.path: {path!r} is set, but benchmark '{benchmark}' brings its own text",
            "remove fetch.path, or set fetch.benchmark: local",
        )


def write(dest: Path, corpus: Mapping[str, Iterable[BaseModel]]) -> None:
    """Write the files of a corpus; what has no records gets none, nor do fields without a value."""
    for name, path in files(dest).items():
        if rows := [record.model_dump(exclude_none=True) for record in corpus.get(name, ())]:
            artifacts.write_jsonl(path, rows)


def part(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one file that a stage cannot do without.

    Raises:
        MissingPrerequisite: nothing was fetched.
        DataError: the benchmark has no such records, or the file is malformed.
    """
    path = files(artifacts.require(folder))[name]
    if not path.exists() and name not in _expected(folder).names:
        raise DataError(
            f"{path}: the benchmark that was fetched has no such records",
            LACKING,
        )
    return artifacts.read_jsonl(path)


def extra(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one file that a stage can do without; [] where the benchmark has none."""
    path = files(folder)[name]
    return artifacts.read_jsonl(path) if path.exists() else []


class _Row(NamedTuple):
    where: str  # file:line
    record: Any


class _Expected(NamedTuple):
    names: Sequence[str]  # the files that have to be there
    published: bool


def _expected(folder: Path) -> _Expected:
    """What the manifest says that `fetch` wrote; a folder without one is somebody's own and needs the core."""
    path = folder / MANIFEST
    manifest = artifacts.read_json(path) if path.is_file() else None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return _Expected(CORE, published=False)
    return _Expected([Path(name).stem for name in manifest["files"]], bool(manifest.get("published")))


def read(folder: Path) -> dict[str, list[BaseModel]]:
    """Read and check a corpus: the core, or what its manifest names; fields outside the schema are dropped.

    Returns:
        The records by file, for every file of the schema; none where the benchmark has none.

    Raises:
        DataError: a file is missing, empty or malformed, or records contradict each other; every problem with its
            file and line.
    """
    problems: list[str] = []
    expected = _expected(folder)
    there = {name for name, path in files(folder).items() if name in expected.names or path.exists()}
    rows = {
        name: _read_file(path, SCHEMA[name], problems) if name in there else [] for name, path in files(folder).items()
    }
    if not problems:  # what follows needs whole records
        problems = [*_repeated(rows), *_unknown_sources(rows)]
        problems += [] if expected.published else [*_careless(rows)]
    if problems:
        rest = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        shown = "\n".join([*problems[:_SHOWN], *rest])
        raise DataError(shown, f"mend {folder}; it needs {', '.join(f'{name}.jsonl' for name in expected.names)}")
    return {name: [row.record for row in found] for name, found in rows.items()}


def _read_file(path: Path, schema: type[BaseModel], problems: list[str]) -> list[_Row]:
    if not path.is_file():
        problems.append(f"{path}: not found")
        return []
    try:
        raw = artifacts.read_jsonl(path)
    except DataError as error:
        problems.append(error.message)
        return []
    rows = []
    for number, record in zip(line_numbers(path), raw, strict=True):
        where = f"{path}:{number}"
        try:
            rows.append(_Row(where, schema.model_validate(record)))
        except ValidationError as error:
            problems += [f"{where}: {sentence}" for sentence in sentences(error)]
    return rows


def line_numbers(path: Path) -> list[int]:
    """Numbers of the lines that `artifacts.read_jsonl` does not skip as blank."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


def sentences(error: ValidationError) -> list[str]:
    """The problems of one record in words: the field, what is wrong, the value."""
    return [_sentence(detail) for detail in error.errors()]


def _sentence(detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if not field:
        return str(detail["msg"].removeprefix("Value error, "))
    if detail["type"] == "missing":
        return f"field '{field}' is missing"
    if detail["type"] == "string_pattern_mismatch":
        return f"field '{field}' is empty"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"field '{field}': {message}, got {detail['input']!r:.60}"


def _repeated(rows: Mapping[str, list[_Row]]) -> list[str]:
    """Ids that occur twice, and passages: one in two files would be both forgotten and kept."""
    passages, questions = [rows[name] for name in PASSAGES], [rows[name] for name in QUESTIONS]
    others = [[rows[name]] for name in SCHEMA if name not in (*PASSAGES, *QUESTIONS)]
    return [
        *_twice(passages, "id"),
        *_twice(passages, "text"),
        *(problem for group in (questions, *others) for problem in _twice(group, "id")),
    ]


def _careless(rows: Mapping[str, list[_Row]]) -> list[str]:
    """What an author did not mean: questions twice or without their passage, equal choices, text without words."""
    return [
        *_twice([rows[name] for name in QUESTIONS], "question"),
        *_twice([rows["utility"], rows["general_qa"]], "question"),
        *(problem for name in CHOICES if name != "utility" for problem in _twice([rows[name]], "question")),
        *(
            f"{row.where}: field 'source' is missing"
            for name in QUESTIONS
            for row in rows[name]
            if row.record.source is None
        ),
        *(
            f"{row.where}: the four choices are not different: {row.record.choices}"
            for name in CHOICES
            for row in rows[name]
            if len(set(row.record.choices)) < len(row.record.choices)
        ),
        *(
            f"{row.where}: field '{field}': ROUGE-L compares words of a-z and 0-9, {value!r:.60} has none"
            for field, names in (("text", PASSAGES), ("answer", (*QUESTIONS, *PERTURBED)))
            for name in names
            for row in rows[name]
            if not re.search("[a-z0-9]", (value := getattr(row.record, field)).lower())
        ),
    ]


def _twice(groups: Iterable[list[_Row]], field: str) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for row in (row for group in groups for row in group):
        value = getattr(row.record, field)
        if value in first:
            problems.append(f"{row.where}: {field} {value!r:.60} is already at {first[value]}")
        first.setdefault(value, row.where)
    return problems


def _unknown_sources(rows: Mapping[str, list[_Row]]) -> list[str]:
    problems = []
    for name in (*QUESTIONS, "forget_verbmem"):
        book = name.split("_")[0]
        known = {row.record.id for row in rows[book]} | {None}
        problems += [
            f"{row.where}: source {row.record.source!r} is no id in {book}.jsonl"
            for row in rows[name]
            if row.record.source not in known
        ]
    return problems


def pieces(text: str, tokens: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """A long text cut every so many tokens, the last piece shorter; joined they are the text, but for white space.

    A piece that is tokenised alone may come out a token longer or shorter: its first word has lost what stood before.

    Args:
        text: all of it.
        tokens: of each piece, without special ones.
        tokenizer: one that knows where its tokens stand in the text.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in found["offset_mapping"]]
    edges = [*starts[tokens::tokens], len(text)]
    return [piece for start, end in pairwise([0, *edges]) if (piece := text[start:end].strip())]


def distinct(corpus: Mapping[str, Sequence[Passage]]) -> tuple[dict[str, list[Passage]], dict[str, int]]:
    """Passages without repetitions of an earlier text, in the order given, and how many were left out of each file."""
    seen: set[str] = set()
    kept: dict[str, list[Passage]] = {name: [] for name in corpus}
    for name, passages in corpus.items():
        for passage in passages:
            if passage.text not in seen:
                seen.add(passage.text)
                kept[name].append(passage)
    return kept, {name: len(corpus[name]) - len(kept[name]) for name in kept if len(kept[name]) < len(corpus[name])}
