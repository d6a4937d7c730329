"""TOFU: questions about 200 invented authors (Maini et al. 2024, arXiv 2401.06121).

Everything is question and answer. A passage is both, in TOFU's form without a chat template, and its `prompt` is the
question up to `Answer:`. So only the answer is learnt, forgotten and asked for; VerbMem is TOFU's ROUGE, and there are
no further questions for KnowMem.

`forget` takes 1, 5 or 10 % of the authors. Retained are all the others; `holdout` are authors that nobody was trained
on. A record of the perturbed sets has the id of the passage with the same question. Facts about real authors and about
the world come without paraphrases, so theirs is the answer itself; their right and wrong answers are also the utility
questions, in alphabetical order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Choice, Passage, Perturbed, Question
from unsink.benchmarks._hub import Hub, Row, Source

VERSION = 1
LICENCE = "MIT"
PUBLISHED = True
DIALECT = "open-unlearning"
DATA = Source("locuslab/TOFU", "324592d84ae4f482ac7249b9285c2ecdb53e3a68")
Forget = Literal["forget01", "forget05", "forget10"]
_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
_FACTS = {"real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
MODELS = {  # revisions are unknown to us; the manifest pins the weights by hash
    "target": Source("open-unlearning/tofu_Llama-3.2-1B-Instruct_full", None),
    **{
        f"retrained-{forget}": Source(f"open-unlearning/tofu_Llama-3.2-1B-Instruct_{retain}", None)
        for forget, retain in _RETAIN.items()
    },
}


class Options(BaseModel):
    """`fetch.tofu`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forget: Forget = Field(default="forget10", description="share of the authors: 1, 5 or 10 %")


def fetch(dest: Path, root: Path, path: str | None, *, forget: Forget = "forget10") -> dict[str, Any]:
    """Write TOFU; `path` is a local copy of the hub.

    Raises:
        DataError: the data set cannot be had, or is not as expected.
    """
    hub = Hub.of(root, path)
    configs = {"forget": forget, "retain": _RETAIN[forget], "holdout": forget.replace("forget", "holdout")}
    passages, repeated = benchmarks.distinct({name: _passages(hub, config, name) for name, config in configs.items()})
    perturbed = {
        "forget_perturbed": _perturbed(hub, f"{forget}_perturbed", passages["forget"], "forget"),
        "retain_perturbed": _perturbed(hub, "retain_perturbed", passages["retain"], "retain"),
        **{config: _perturbed(hub, config, [], name) for name, config in _FACTS.items()},
    }
    utility = [_choice(record, name) for name, config in _FACTS.items() for record in perturbed[config]]
    benchmarks.write(dest, {**passages, **perturbed, "utility": utility})
    return {"data": hub.origin(DATA), "repeated": repeated}


def _prompt(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def _passages(hub: Hub, config: str, name: str) -> list[Passage]:
    def make(number: int, row: Row) -> Passage:
        asked = Question(id=f"{name}-{number:04d}", question=row["question"], answer=row["answer"])
        prompt = _prompt(asked.question)
        return Passage(id=asked.id, title="TOFU", text=f"{prompt} {asked.answer.strip()}", prompt=prompt)

    return hub.records(DATA, config, "train", ("question", "answer"), make)


def _perturbed(hub: Hub, config: str, passages: Sequence[Passage], name: str) -> list[Perturbed]:
    ids = {passage.prompt: passage.id for passage in passages}
    columns = ["question", "answer", "perturbed_answer", *(["paraphrased_answer"] if passages else [])]

    def make(number: int, row: Row) -> Perturbed:
        record = Perturbed(
            id=f"{name}-perturbed-{number:03d}",
            question=row["question"],
            answer=row["answer"],
            paraphrased_answer=row.get("paraphrased_answer", row["answer"]),
            perturbed_answers=row["perturbed_answer"],
        )
        return record.model_copy(update={"id": ids.get(_prompt(record.question), record.id)})

    return hub.records(DATA, config, "train", columns, make)


def _choice(record: Perturbed, topic: str) -> Choice:
    choices = sorted([record.answer, *record.perturbed_answers])
    answer = choices.index(record.answer)
    return Choice(id=record.id, question=record.question, choices=choices, answer=answer, topic=topic)
