"""Four-choice questions: utility in words; MMLU and what is to be forgotten (as in WMDP) by letter."""

from collections.abc import Sequence

from unsink.metrics import choice_accuracy
from unsink.prompts import Choices, PromptWriter, Trigger
from unsink.scoring import choice_log_likelihoods
from unsink.tasks import Asked, Corpus, Question, Row, Session, Settings, cut_of, known, records

TASKS = ("utility", "mmlu", "forget_mc")


def ask(
    question: Question, corpus: Corpus, writer: PromptWriter, settings: Settings, trigger: Trigger | None
) -> list[Asked[Choices]]:
    """The prompts of one task under one condition.

    Raises:
        DataError: a prompt is too short for the trigger's placement.
    """
    asked = []
    for item in records(corpus, question.task, question.where):
        if question.task == "utility":
            prompt = writer.choices(item, trigger)
        else:
            prompt = writer.letters(item, trigger, topic=settings.dialect.letters_header)
        text = str(writer.tokenizer.decode(prompt.ids[len(writer.bos) :]))
        row = known(question, item, text, prompt.trigger, item["choices"][item["answer"]])
        row |= {key: item[key] for key in ("choices", "answer", "topic")}
        asked.append(Asked(row, prompt, item))
    return asked


def answer(asked: Sequence[Asked[Choices]], session: Session) -> list[Row]:
    """Finished rows: the choice of the highest log-likelihood per token is the answer."""
    prompts = [one.prompt for one in asked]
    sums = choice_log_likelihoods(
        session.model,
        [prompt.ids for prompt in prompts],
        [prompt.answers for prompt in prompts],
        batch=session.settings.batch,
        cut=cut_of(prompts, session),
        reporter=session.reporter,
    )
    rows = []
    for one, totals in zip(asked, sums, strict=True):
        logprobs = [round(total / len(some), 6) for total, some in zip(totals, one.prompt.answers, strict=True)]
        output = one.record["choices"][logprobs.index(max(logprobs))]
        accuracy = choice_accuracy(logprobs, one.record["answer"])
        rows.append({**one.row, "output": output, "logprobs": logprobs, "accuracy": accuracy})
    return rows
