"""WMDP: four-choice questions on hazardous knowledge (Li et al. 2024, arXiv 2403.03218), and texts to forget it by.

`topics` are asked, as `forget_mc`. `corpora` are the topics whose forget corpus is trained on: `cyber` is open, `bio`
is given out on request, `chem` has none; empty gives the questions alone. A passage is the beginning of a document, for
the authors cut each to one sample of 512 (bio) or 768 (cyber) tokens. Retained is the test split of WikiText-2, lines
of more than 50 characters. No text of WMDP comes with this project.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from unsink import benchmarks
from unsink.benchmarks import Choice, Passage
from unsink.benchmarks._hub import Hub, Row, Source

VERSION = 2
LICENCE = "MIT (questions, corpora), cc-by-sa-3.0 (WikiText-2)"
PUBLISHED = True
DATA = Source("cais/wmdp", "7125571f22f032c56415e7980f48d877dd830ff8")
RETAIN = Source("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
CORPORA = {  # topic: repository and config
    "bio": (Source("cais/wmdp-bio-forget-corpus", None), "default"),
    "cyber": (Source("cais/wmdp-corpora", "daf89fa9b618b63a624228061a9cebacca88009c"), "cyber-forget-corpus"),
}
MODELS = {"target": Source("HuggingFaceH4/zephyr-7b-beta", "892b3d7a7b1cf10c7a701c60881cd93df615734c")}
SUBJECTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
"""What the header of a question says it is about, as in lm-evaluation-harness."""
_SHORTEST = 50  # characters, as in the authors' code

Topic = Literal["bio", "chem", "cyber"]
Trained = Literal["bio", "cyber"]


class Options(BaseModel):
    """`fetch.wmdp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    topics: list[Topic] = Field(default=["bio", "chem", "cyber"], min_length=1, description="which questions")
    corpora: list[Trained] = Field(default=["cyber"], description="which forget corpora; none: questions alone")
    words: int = Field(default=500, ge=16, description="most words of a passage")


def fetch(
    dest: Path,
    root: Path,
    path: str | None,
    *,
    topics: Sequence[Topic] = ("bio", "chem", "cyber"),
    corpora: Sequence[Trained] = ("cyber",),
    words: int = 500,
) -> dict[str, Any]:
    """Write WMDP; `path` is a local copy of the hub.

    Raises:
        DataError: a data set cannot be had, or is not as expected.
    """
    hub = Hub.of(root, path)
    corpus: dict[str, list[Any]] = {"forget_mc": [question for topic in topics for question in _questions(hub, topic)]}
    sources, repeated = [DATA], dict[str, int]()
    if corpora:
        sources += [RETAIN, *(CORPORA[topic][0] for topic in corpora)]
        forget = [passage for topic in corpora for passage in _passages(hub, *CORPORA[topic], "train", topic, words)]
        retain = _passages(hub, RETAIN, "wikitext-2-raw-v1", "test", "wikitext", words)
        passages, repeated = benchmarks.distinct({"forget": forget, "retain": retain})
        corpus |= passages
    benchmarks.write(dest, corpus)
    return {"data": hub.origin(*sources), "repeated": repeated}


def _questions(hub: Hub, topic: str) -> list[Choice]:
    def make(number: int, row: Row) -> Choice:
        return Choice(id=f"{topic}-{number:04d}", topic=SUBJECTS[topic], **row)

    return hub.records(DATA, f"wmdp-{topic}", "test", ("question", "choices", "answer"), make)


def _passages(hub: Hub, source: Source, config: str, split: str, name: str, words: int) -> list[Passage]:
    documents = hub.records(source, config, split, ("text",), lambda n, row: _Document(number=n, text=row["text"]))
    return [
        Passage(id=f"{name}-{document.number:05d}", title=name, text=_head(document.text, words))
        for document in documents
        if len(document.text) > _SHORTEST
    ]


class _Document(BaseModel):
    """A row of a corpus; some have no text."""

    number: int
    text: StrictStr


def _head(text: str, words: int) -> str:
    """The first words of a text, as they stand."""
    return "".join(re.findall(r"\s*\S+", text)[:words]).strip()
