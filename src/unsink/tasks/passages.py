"""Passages that a model reads as they stand: would it have said them itself, does it look as if trained on them?

One pass gives everything but the gradient norm, which needs a backward pass for each passage.
"""

from collections.abc import Sequence
from typing import TypeVar

from unsink.metrics import memory, privacy
from unsink.prompts import PromptWriter, Reading, Trigger
from unsink.scoring import TokenScores, gradient_norms, token_scores
from unsink.tasks import Asked, Corpus, Question, Row, Session, Settings, known, records

TASKS = ("passage",)
T = TypeVar("T")


def ask(
    question: Question, corpus: Corpus, writer: PromptWriter, settings: Settings, trigger: Trigger | None
) -> list[Asked[Reading]]:
    """The passages of one set under one condition.

    Raises:
        DataError: a passage is too short, or the trigger's place in training lies behind what is read.
    """
    asked = []
    for record in records(corpus, question.task, question.where):
        text = writer.passage(record, trigger, tokens=settings.passage_tokens)
        whole = str(writer.tokenizer.decode(text.ids[len(writer.bos) :]))
        asked.append(Asked(known(question, record, whole, text.trigger, text.reference), text, record))
    return asked


def answer(asked: Sequence[Asked[Reading]], session: Session) -> list[Row]:
    """Finished rows, in the order of the passages."""
    texts, scored = [one.prompt.ids for one in asked], [one.prompt.scored for one in asked]
    found = token_scores(session.model, texts, scored, reporter=session.reporter, description="passages")
    rows = [_row(one, some, session.settings) for one, some in zip(asked, found, strict=True)]
    if session.settings.gradient_norms:
        places = [_counted(one, some, session.settings) for one, some in zip(asked, scored, strict=True)]
        norms = gradient_norms(session.model, texts, places, reporter=session.reporter)
        for row, norm in zip(rows, norms, strict=True):
            row["mia"]["gradnorm"] = round(norm, 9)
    return rows


def _row(asked: Asked[Reading], scores: TokenScores, settings: Settings) -> Row:
    logs, dialect = scores.logprobs, settings.dialect
    nll = -sum(logs) / len(logs)
    greedy = _counted(asked, scores.greedy, settings)
    attacks = {
        "loss": nll,
        "zlib": privacy.zlib_score(nll, asked.prompt.reference),
        "min_k": privacy.min_k(_counted(asked, logs, settings)),
        "min_k_plus": privacy.min_k(_counted(asked, scores.standardized, settings)),
    }
    return {
        **asked.row,
        "tokens": len(logs),
        "nll": round(nll, 6),
        "probability": round(memory.probability(nll), 6),
        "extraction_strength": memory.extraction_strength(greedy, floor=dialect.strength_floor),
        "exact_memorization": memory.exact_memorization(greedy),
        "mia": {name: round(value, 9) for name, value in attacks.items()},
    }


def _counted(asked: Asked[Reading], tokens: Sequence[T], settings: Settings) -> Sequence[T]:
    """The tokens that count; open-unlearning leaves out the last of several, meaning the EOS of an answer."""
    record = asked.record
    whole = record.get("prompt") and not record.get("question")  # an answer that ends without EOS
    return tokens if settings.dialect.last_token or whole or len(tokens) == 1 else tokens[:-1]
