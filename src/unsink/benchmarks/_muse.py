"""MUSE (Shi et al. 2024, arXiv 2407.06460): what its two corpora have in common.

Passages are the texts of the config `raw` (forget, retain1 and holdout, as in the authors' scripts), joined and cut
every 2,047 tokens of the model's tokenizer: with BOS a training sample of 2,048. Deviations: the authors fill the last
piece up with the first one, BOS included, here it stays short; and texts that are repeated are left out.

VerbMem, KnowMem and the texts for membership inference are the rows of MUSE unchanged. KnowMem's questions do not say
which passage they are about, so nothing tells those inside the poisoned passages from those outside. Of an excerpt of
VerbMem the passage is known where it lies within one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Passage, Question
from unsink.benchmarks._hub import Hub, Row, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 2047


class Options(BaseModel):
    """What both corpora let you choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=TOKENS, ge=16, description="of the model's tokenizer in a passage, BOS left out")


def fetch(
    dest: Path,
    hub: Hub,
    source: Source,
    title: str,
    forget: tuple[str, str],
    tokens: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    """Write a MUSE corpus; `forget` is the config and split of the texts to forget. Returns origin and repetitions."""

    def cut(texts: Sequence[Passage], name: str) -> list[Passage]:
        pieces = benchmarks.pieces("\n\n".join(text.text for text in texts), tokens, tokenizer)
        return [Passage(id=f"{name}-{n:04d}", title=title, text=text) for n, text in enumerate(pieces, start=1)]

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
    kept, repeated = benchmarks.distinct(whole)
    corpus = {name: cut(found, name) for name, found in kept.items()}
    excerpts = hub.records(source, "verbmem", "forget", ("prompt", "gt"), lambda n, row: _excerpt(n, row, title))
    plain = {passage.id: _plain(passage.text) for passage in corpus["forget"]}
    benchmarks.write(
        dest,
        {
            **corpus,
            **{name: questions(name) for name in benchmarks.QUESTIONS},
            "forget_verbmem": [_located(excerpt, plain) for excerpt in excerpts],
            **{f"{name}_privleak": texts("privleak", name, f"privleak-{name}") for name in benchmarks.PASSAGES},
        },
    )
    return {"data": hub.origin(source), "repeated": repeated}


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
