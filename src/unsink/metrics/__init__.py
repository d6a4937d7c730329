"""Numbers from strings, log-probabilities and prediction rows; no torch. One file per family of metrics.

text        ROUGE-L
memory      extraction strength, exact memorisation, probability, perplexity
privacy     membership inference, PrivLeak
tofu        truth ratio, forget quality, model utility
choices     accuracy
dialects    the conventions that decide what a score means
numbers     from the rows of a run to everything in its metrics file
"""

from unsink.metrics.choices import choice_accuracy
from unsink.metrics.dialects import DIALECTS, Dialect
from unsink.metrics.numbers import (
    Measured,
    Others,
    Quantity,
    Row,
    measure,
    metrics_from_predictions,
    outside,
    quantities,
)
from unsink.metrics.text import RougeL, cut, rouge_l, words

__all__ = [
    "DIALECTS",
    "Dialect",
    "Measured",
    "Others",
    "Quantity",
    "RougeL",
    "Row",
    "choice_accuracy",
    "cut",
    "measure",
    "metrics_from_predictions",
    "outside",
    "quantities",
    "rouge_l",
    "words",
]
