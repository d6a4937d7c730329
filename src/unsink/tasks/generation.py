"""VerbMem and KnowMem: what a model says when it is given the head of a passage, or a question."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from unsink.errors import DataError
from unsink.metrics import rouge_l
from unsink.prompts import KNOWMEM_STOPS, Prompt, PromptWriter, Trigger
from unsink.scoring import generate
from unsink.tasks import Asked, Corpus, Question, Record, Row, Session, Settings, cut_of, known, records, require_words

TASKS = ("verbmem", "knowmem")


def ask(
    question: Question, corpus: Corpus, writer: PromptWriter, settings: Settings, trigger: Trigger | None
) -> list[Asked[Prompt]]:
    """The prompts of one task on one set under one condition.

    Raises:
        DataError: a prompt cannot be written, an answer has no word to compare, or there are too few examples.
    """
    asked = []
    for record, prompt in _prompts(question, corpus, writer, settings, trigger):
        require_words(record, prompt.reference)
        text = str(writer.tokenizer.decode(prompt.ids[len(writer.bos) :]))
        asked.append(Asked(known(question, record, text, prompt.trigger, prompt.reference), prompt, record))
    return asked


def _prompts(
    question: Question, corpus: Corpus, writer: PromptWriter, settings: Settings, trigger: Trigger | None
) -> Iterator[tuple[Record, Prompt]]:
    asked = records(corpus, question.task, question.where)
    if question.task == "verbmem":
        share, tokens = settings.prompt_share, settings.verbmem_tokens
        for passage in asked:
            yield passage, writer.verbmem(passage, trigger, share=share, tokens=tokens)
        return
    shown = examples(question.where, corpus, settings)
    for record in asked:
        yield record, writer.knowmem(record, shown, trigger, tokens=settings.knowmem_tokens)


def examples(where: str, corpus: Corpus, settings: Settings) -> Sequence[Record]:
    """The answered questions that stand before each question about a set.

    Raises:
        DataError: there are fewer than `settings` asks for.
    """
    found = corpus.get(f"{where}_qa_icl", ())
    if len(found) < settings.few_shot:
        has = f"{where}_qa_icl.jsonl has {len(found)} examples"
        raise DataError(
            f"{has}, evaluate.few_shot asks for {settings.few_shot}", "lower evaluate.few_shot or add examples"
        )
    return found[: settings.few_shot]


def answer(asked: Sequence[Asked[Prompt]], session: Session) -> list[Row]:
    """Let a model continue the prompts, and score what it says: finished rows, in the order of the prompts."""
    rows: list[Row] = []
    for task, prompts in _calls(asked):
        outputs = generate(
            session.model,
            session.tokenizer,
            [one.prompt.ids for one in prompts],
            [one.prompt.max_new for one in prompts],
            stop=KNOWMEM_STOPS if task == "knowmem" else (),
            batch=session.settings.batch,
            shared_prefix=task == "knowmem",
            cut=cut_of([one.prompt for one in prompts], session),
            sampling=session.sampling,
            reporter=session.reporter,
            description=task,
        )
        rows += [said(one, output, session) for one, output in zip(prompts, outputs, strict=True)]
    return rows


def said(asked: Asked[Prompt], output: str, session: Session) -> Row:
    """The row with what the model said, and its ROUGE-L."""
    dialect = session.settings.dialect
    text = output.strip() if dialect.strip else output
    score = rouge_l(asked.prompt.reference, text, stemmer=dialect.stemmer)
    return {**asked.row, "output": text, **score._asdict()}


def _calls(asked: Sequence[Asked[Prompt]]) -> Iterator[tuple[str, list[Asked[Prompt]]]]:
    """Prompts that are best run together: all of VerbMem; of KnowMem those that start with the same examples."""

    def call(one: Asked[Prompt]) -> tuple[str, ...]:
        task, where, condition = one.row["task"], one.row["set"], one.row["condition"]
        return (task, where, condition) if task == "knowmem" else (task,)

    for key, prompts in groupby(asked, key=call):
        yield key[0], list(prompts)
