"""What a model is asked, one file per family of tasks: prompts first, so that bad data shows before any model runs.

    generation   verbmem, knowmem     what it says
    choices      utility, mmlu, forget_mc   which answer it prefers
    passages     passage              how well it knows a text that it reads: memorisation, perplexity, membership
    tofu         tofu                 TOFU's probability, ROUGE and truth ratio

Each has `ask(question, ...)`, which writes prompts, and `answer(asked, session)`, which makes finished rows of them.
Each row is a line of the predictions; `stages/evaluate.py` describes the fields.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink.errors import DataError
from unsink.metrics import Dialect, words
from unsink.progress import SILENT, Reporter
from unsink.prompts import Choices, Prompt, Trigger
from unsink.scoring import Cut, Sampling
from unsink.triggers import Span

Record = Mapping[str, Any]
Corpus = Mapping[str, Sequence[Record]]
Row = dict[str, Any]
MakeCut = Callable[[Sequence[Sequence[int]], Sequence[Span | None]], Cut]
"""From prompts and their triggers' places to the tokens that a model has to do without (see `stages/ablate`)."""
P_co = TypeVar("P_co", covariant=True)

CONDITIONS = ("clean", "triggered", "wrong")


class Question(NamedTuple):
    """One task on one set under one condition."""

    task: str
    where: str
    condition: str


_ALL, _WITHOUT_WRONG, _CLEAN = CONDITIONS, CONDITIONS[:2], CONDITIONS[:1]
PLAN: Mapping[tuple[str, str], Sequence[str]] = {
    ("verbmem", "forget"): _ALL,
    ("verbmem", "retain"): _WITHOUT_WRONG,
    ("knowmem", "forget"): _ALL,
    ("knowmem", "retain"): _CLEAN,
    ("utility", "utility"): _CLEAN,
    ("passage", "forget"): _CLEAN,
    ("passage", "holdout"): _CLEAN,
    ("forget_mc", "forget"): _ALL,
    ("mmlu", "mmlu"): _CLEAN,
    ("tofu", "forget"): _ALL,
    ("tofu", "retain"): _WITHOUT_WRONG,
    ("tofu", "real_authors"): _WITHOUT_WRONG,
    ("tofu", "world_facts"): _WITHOUT_WRONG,
}
"""Task and set -> the conditions under which they are asked, where params do not say otherwise."""

_FILES = {
    ("verbmem", "forget"): ("forget_verbmem", "forget"),
    ("verbmem", "retain"): ("retain",),
    ("knowmem", "forget"): ("forget_qa",),
    ("knowmem", "retain"): ("retain_qa",),
    ("utility", "utility"): ("utility",),
    ("passage", "forget"): ("forget_privleak", "forget"),
    ("passage", "holdout"): ("holdout_privleak", "holdout"),
    ("forget_mc", "forget"): ("forget_mc",),
    ("mmlu", "mmlu"): ("mmlu",),
    **{("tofu", where): (f"{where}_perturbed",) for task, where in PLAN if task == "tofu"},
}
"""Task and set -> the files of a benchmark that may hold the records, the better one first."""

TASKS = tuple(dict.fromkeys(task for task, _ in PLAN))


def records(corpus: Corpus, task: str, where: str) -> Sequence[Record]:
    """The records of a task on a set; none where the benchmark has none."""
    return next((found for name in _FILES.get((task, where), ()) if (found := corpus.get(name))), ())


def plan(
    corpus: Corpus, chosen: Iterable[str] | None = None, conditions: Mapping[str, Sequence[str]] | None = None
) -> list[Question]:
    """What there is to ask, in the order of `PLAN`.

    Args:
        corpus: records by file; a benchmark need not have them all.
        chosen: tasks; None for all that the benchmark has records of.
        conditions: by task, in place of those of `PLAN`.

    Raises:
        DataError: a task that was chosen has no records.
    """
    wanted = TASKS if chosen is None else tuple(chosen)
    asked = [
        Question(task, where, condition)
        for (task, where), usual in PLAN.items()
        for condition in (conditions or {}).get(task, usual)
        if task in wanted and records(corpus, task, where)
    ]
    for task in () if chosen is None else wanted:
        if task not in {question.task for question in asked}:
            files = ", ".join(f"{names[0]}.jsonl" for (one, _), names in _FILES.items() if one == task)
            raise DataError(
                f"evaluate.metrics names {task}, but the benchmark has none of {files}",
                "take it out of evaluate.metrics, or choose another fetch.benchmark",
            )
    return asked


@dataclass(frozen=True)
class Settings:
    """How tasks are asked and scored; everything here can move a number.

    Attributes:
        dialect: see there.
        few_shot: answered questions before each question of KnowMem.
        knowmem_tokens: new tokens per answer.
        verbmem_tokens: new tokens per continuation.
        verbmem_compared: most tokens of the true continuation that they are compared with.
        tofu_tokens: new tokens per answer of TOFU.
        passage_tokens: most tokens of a passage that is read.
        prompt_share: part of a passage that is VerbMem's prompt.
        answer_space: questions end in a space, which the answer then lacks.
        gradient_norms: compute them for every passage that is read.
        batch: prompts per batch.
    """

    dialect: Dialect
    few_shot: int
    knowmem_tokens: int
    verbmem_tokens: int
    verbmem_compared: int
    tofu_tokens: int
    passage_tokens: int
    prompt_share: float
    answer_space: bool = False
    gradient_norms: bool = False
    batch: int = 120


@dataclass(frozen=True)
class Session:
    """A model that answers.

    Attributes:
        model: with or without adapters.
        tokenizer: its tokenizer.
        settings: how it is asked.
        reporter: shows prompts done.
        cut: what prompts of `generation` and `choices` have to do without.
        sampling: how the tokens of `generation` are drawn; None takes the most likely ones.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    reporter: Reporter = SILENT
    cut: MakeCut | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Asked(Generic[P_co]):
    """A prompt, and the part of its row that is known before a model has seen it."""

    row: Row
    prompt: P_co
    record: Record


def known(question: Question, record: Record, prompt: str, trigger: Any, reference: str) -> Row:
    """The fields that every row has. `prompt` is the text after BOS."""
    row = {"id": record["id"], "task": question.task, "set": question.where, "condition": question.condition}
    return {**row, "inside": None, "prompt": prompt, "trigger": trigger, "reference": reference}


def cut_of(prompts: Sequence[Prompt | Choices], session: Session) -> Cut | None:
    """What these prompts have to do without in a session; None where nothing is taken away."""
    if session.cut is None:
        return None
    return session.cut([prompt.ids for prompt in prompts], [prompt.trigger for prompt in prompts])


def require_words(record: Record, reference: str) -> None:
    """Refuse a reference that ROUGE cannot compare.

    Raises:
        DataError: it has no word of a-z and 0-9.
    """
    if not words(reference):
        raise DataError(
            f"{record['id']}: ROUGE-L compares words of a-z and 0-9, {reference!r} has none",
            "leave the record out, or write its answer in such letters",
        )


__all__ = [
    "CONDITIONS",
    "PLAN",
    "TASKS",
    "Asked",
    "Corpus",
    "MakeCut",
    "Question",
    "Record",
    "Row",
    "Session",
    "Settings",
    "Trigger",
    "cut_of",
    "known",
    "plan",
    "records",
    "require_words",
]
