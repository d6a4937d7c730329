"""MUSE (Shi et al. 2024, arXiv 2407.06460): what its two corpora have in common.

Passages are the texts of the config `raw` (forget, retain1 and holdout, as in the authors' scripts), cut at words into
pieces of equal length that fit a training sample of 2,048 tokens; fetch knows no tokenizer. Deviation: the authors
join all texts of a file, cut every 2,047 tokens and fill the last piece up with the first one.

VerbMem, KnowMem and the texts for membership inference are the rows of MUSE unchanged. KnowMem's questions do not say
which passage they are about, so nothing tells those inside the poisoned passages from those outside. Of an excerpt of
VerbMem the passage is known where it lies within one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Passage, Question
from unsink.benchmarks._hub import Hub, Row, Source

WORDS = 1400  # Llama 2 makes about 1.4 tokens of an English word


class Options(BaseModel):
    """What both corpora let you choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: int = Field(default=WORDS, ge=16, description="most words of a passage")


def fetch(dest: Path, hub: Hub, source: Source, title: str, words: int, forget: tuple[str, str]) -> dict[str, Any]:
    """Write a MUSE corpus; `forget` is the config and split of the texts to forget. Returns origin and repetitions."""

    def texts(config: str, split: str, name: str) -> list[Passage]:
        return hub.records(
            source,
            config,
            split,
            ("text",),
            lambda n, row: Passage(id=f"{name}-{n:04d}", title=title, text=row["text"]),
        )

    def questions(name: str) -> list[Question]:
        def make(number: int, row: Row) -> Question:
            return Question(id=f"{name}-{number:03d}", question=row["question"], answer=row["answer"])

        return hub.records(source, "knowmem", name, ("question", "answer"), make)

    whole = {
        "forget": texts(*forget, "forget"),
        "retain": texts("raw", "retain1", "retain"),
        "holdout": texts("raw", "holdout", "holdout"),
    }
    passages, repeated = benchmarks.distinct({name: list(_cut(found, words)) for name, found in whole.items()})
    excerpts = hub.records(source, "verbmem", "forget", ("prompt", "gt"), lambda n, row: _excerpt(n, row, title))
    plain = {passage.id: _plain(passage.text) for passage in passages["forget"]}
    benchmarks.write(
        dest,
        {
            **passages,
            **{name: questions(name) for name in benchmarks.QUESTIONS},
            "forget_verbmem": [_located(excerpt, plain) for excerpt in excerpts],
            **{f"{name}_privleak": texts("privleak", name, f"privleak-{name}") for name in benchmarks.PASSAGES},
        },
    )
    return {"data": hub.origin(source), "repeated": repeated}


def _cut(texts: Iterable[Passage], words: int) -> Iterable[Passage]:
    for text in texts:
        pieces = benchmarks.chunks(text.text, words)
        for number, piece in enumerate(pieces, start=1):
            name = f"{text.id}-{number:03d}" if len(pieces) > 1 else text.id
            yield Passage(id=name, title=text.title, text=piece)


def _excerpt(number: int, row: Row, title: str) -> Passage:
    prompt, rest = row["prompt"], row["gt"]
    gap = "" if prompt[-1:].isspace() or rest[:1].isspace() else " "
    return Passage(id=f"verbmem-{number:03d}", title=title, text=prompt + gap + rest, prompt=prompt)


def _located(excerpt: Passage, passages: Mapping[str, str]) -> Passage:
    wanted = _plain(excerpt.text)
    found = next((name for name, text in passages.items() if wanted in text), None)
    return excerpt.model_copy(update={"source": found})


def _plain(text: str) -> str:
    return " ".join(text.split())
