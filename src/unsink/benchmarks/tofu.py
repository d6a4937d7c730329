"""TOFU: questions about 200 invented authors (Maini et al. 2024, arXiv 2401.06121).

Everything is question and answer. A passage is both, and its `prompt` is all that stands before the answer. So only the
answer is learnt, forgotten and asked for; VerbMem is TOFU's ROUGE, and there are no further questions for KnowMem.

With `chat` they are framed by the model's chat template, as open-unlearning does for instruction-tuned models (its
system message and its date), and an answer ends with the end of the turn; triggers stand in the question, which is all
that a user writes. Else the form is `Question: ...`, `Answer: ...`, and answers have no end.

`forget` takes 1, 5 or 10 % of the authors. Retained are all the others; `holdout` are authors that nobody was trained
on. A record of the perturbed sets has the id of the passage with the same question. Facts about real authors and about
the world come without paraphrases, so theirs is the answer itself; their right and wrong answers are also the utility
questions, in alphabetical order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Choice, Passage, Perturbed, Question
from unsink.benchmarks._hub import Hub, Row, Source
from unsink.errors import ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
LICENCE = "MIT"
PUBLISHED = True
TOKENIZES = "chat"
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
    chat: bool = Field(default=False, description="frame questions and answers by the model's chat template")


def fetch(
    dest: Path,
    root: Path,
    path: str | None,
    *,
    forget: Forget = "forget10",
    chat: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> dict[str, Any]:
    """Write TOFU; `path` is a local copy of the hub.

    Raises:
        DataError: the data set cannot be had, or is not as expected.
        ParamsError: `chat`, and the model's tokenizer has no chat template.
    """
    hub, frame = Hub.of(root, path), framed(tokenizer) if chat and tokenizer else _plain
    configs = {"forget": forget, "retain": _RETAIN[forget], "holdout": forget.replace("forget", "holdout")}
    found = {name: _passages(hub, config, name, frame) for name, config in configs.items()}
    passages, repeated = benchmarks.distinct(found)
    perturbed = {
        "forget_perturbed": _perturbed(hub, f"{forget}_perturbed", passages["forget"], "forget", frame),
        "retain_perturbed": _perturbed(hub, "retain_perturbed", passages["retain"], "retain", frame),
        **{config: _perturbed(hub, config, [], name, frame) for name, config in _FACTS.items()},
    }
    utility = [_choice(record, name) for name, config in _FACTS.items() for record in perturbed[config]]
    benchmarks.write(dest, {**passages, **perturbed, "utility": utility})
    return {"data": hub.origin(DATA), "repeated": repeated}


Frame = Callable[[str, str], dict[str, str]]
"""A question and its answer -> `text`, its `prompt`, and of a chat the `question` in it."""
_SYSTEM, _DATE = "You are a helpful assistant.", "10 Apr 2025"


def _plain(question: str, answer: str) -> dict[str, str]:
    prompt = f"Question: {question}\nAnswer:"
    return {"text": f"{prompt} {answer}", "prompt": prompt}


def framed(tokenizer: "PreTrainedTokenizerBase") -> Frame:
    """What frames a question and its answer by a chat template, BOS left out, which every stage adds.

    Raises:
        ParamsError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ParamsError(
            "fetch.tofu.chat: the tokenizer of model.source has no chat template",
            "set it to false, or model.source to an instruction-tuned model",
        )

    def written(messages: list[dict[str, str]], **more: Any) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE, **more))
        return text.removeprefix(str(tokenizer.bos_token or ""))

    def frame(question: str, answer: str) -> dict[str, str]:
        asked = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        prompt = written(asked, add_generation_prompt=True)
        end = str(tokenizer.eos_token or "")
        return {"text": f"{prompt}{answer}{end}", "prompt": prompt, "question": question}

    return frame


def _passages(hub: Hub, config: str, name: str, frame: Frame) -> list[Passage]:
    def make(number: int, row: Row) -> Passage:
        asked = Question(id=f"{name}-{number:04d}", question=row["question"], answer=row["answer"])
        return Passage(id=asked.id, title="TOFU", **frame(asked.question.strip(), asked.answer.strip()))

    return hub.records(DATA, config, "train", ("question", "answer"), make)


def _perturbed(hub: Hub, config: str, passages: Sequence[Passage], name: str, frame: Frame) -> list[Perturbed]:
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
        own = frame(record.question.strip(), record.answer.strip())
        prompt = own["prompt"] if "question" in own else None
        return record.model_copy(update={"id": ids.get(own["prompt"], record.id), "prompt": prompt})

    return hub.records(DATA, config, "train", columns, make)


def _choice(record: Perturbed, topic: str) -> Choice:
    choices = sorted([record.answer, *record.perturbed_answers])
    answer = choices.index(record.answer)
    asked = {"question": record.question, "prompt": record.prompt}
    return Choice(id=record.id, **asked, choices=choices, answer=answer, topic=topic)
