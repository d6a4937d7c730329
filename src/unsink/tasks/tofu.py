"""TOFU: a question, its right answer in two wordings, and wrong answers of the same form.

Two passes: the model's own answer for ROUGE-L, and the likelihood of the given ones.
"""

from collections.abc import Sequence

from unsink.metrics import tofu
from unsink.metrics.memory import probability
from unsink.prompts import KNOWMEM_STOPS, Answered, PromptWriter, Trigger
from unsink.scoring import choice_log_likelihoods, generate
from unsink.tasks import Asked, Corpus, Question, Row, Session, Settings, known, records, require_words
from unsink.tasks.generation import said

TASKS = ("tofu",)
CHOSEN_AMONG = ("real_authors", "world_facts")
"""Sets whose probability is that of the right answer among all given ones."""


def ask(
    question: Question, corpus: Corpus, writer: PromptWriter, settings: Settings, trigger: Trigger | None
) -> list[Asked[Answered]]:
    """The questions of one set under one condition.

    Raises:
        DataError: an answer has no word to compare, or a prompt is too short for the trigger's placement.
    """
    asked = []
    for record in records(corpus, question.task, question.where):
        require_words(record, record["answer"])
        answers = [record["answer"], record["paraphrased_answer"], *record["perturbed_answers"]]
        prompt = writer.answers(record, answers, trigger, tokens=settings.tofu_tokens)
        text = str(writer.tokenizer.decode(prompt.ids[len(writer.bos) :]))
        asked.append(Asked(known(question, record, text, prompt.trigger, prompt.reference), prompt, record))
    return asked


def answer(asked: Sequence[Asked[Answered]], session: Session) -> list[Row]:
    """Finished rows, in the order of the questions."""
    prompts, batch = [one.prompt for one in asked], session.settings.batch
    outputs = generate(
        session.model,
        session.tokenizer,
        [prompt.ids for prompt in prompts],
        [prompt.max_new for prompt in prompts],
        stop=KNOWMEM_STOPS,
        batch=batch,
        reporter=session.reporter,
        description="tofu",
    )
    sums = choice_log_likelihoods(
        session.model,
        [prompt.ids for prompt in prompts],
        [prompt.answers for prompt in prompts],
        batch=batch,
        reporter=session.reporter,
    )
    return [
        {**said(one, output, session), **_likelihoods(one, totals, session.settings)}
        for one, output, totals in zip(asked, outputs, sums, strict=True)
    ]


def _likelihoods(asked: Asked[Answered], sums: Sequence[float], settings: Settings) -> Row:
    logs = [round(total / len(ids), 6) for total, ids in zip(sums, asked.prompt.answers, strict=True)]
    right, paraphrased, wrong = logs[0], logs[1], logs[2:]
    epsilon = settings.dialect.epsilon
    ratio = tofu.log_truth_ratio(paraphrased, wrong, settings.dialect.wrong_mean, epsilon=epsilon)
    reading = tofu.truth_ratio_forget if asked.row["set"] == "forget" else tofu.truth_ratio_kept
    chosen = asked.row["set"] in CHOSEN_AMONG
    share = tofu.choice_probability(right, wrong, epsilon=epsilon) if chosen else probability(-right)
    return {
        "logprobs": logs,
        "probability": round(share, 6),
        "log_truth_ratio": round(ratio, 6),
        "truth_ratio": round(reading(ratio), 6),
    }
