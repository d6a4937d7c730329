"""MMLU: four-choice questions on 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300), as a measure of utility.

It has nothing to forget; use it beside another benchmark, as `fetch.utility: mmlu`. Questions are those of the split
`test`, in its order.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Choice
from unsink.benchmarks._hub import Hub, Row, Source

VERSION = 1
LICENCE = "MIT"
PUBLISHED = True
DATA = Source("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")


class Options(BaseModel):
    """`fetch.mmlu`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_subject: int | None = Field(default=None, ge=1, description="the first n questions of each subject; null: all")


def fetch(dest: Path, root: Path, path: str | None, *, per_subject: int | None = None) -> dict[str, Any]:
    """Write MMLU's questions as `mmlu`, which are answered by letter; `path` is a local copy of the hub.

    Raises:
        DataError: the data set cannot be had, or is not as expected.
    """
    hub = Hub.of(root, path)
    found = hub.records(DATA, "all", "test", ("question", "choices", "answer", "subject"), _choice)
    asked: Counter[str] = Counter()
    kept = []
    for record in found:
        asked[record.topic] += 1
        if per_subject is None or asked[record.topic] <= per_subject:
            kept.append(record)
    benchmarks.write(dest, {"mmlu": kept})
    return {"data": hub.origin(DATA)}


def _choice(number: int, row: Row) -> Choice:
    known = {key: row[key] for key in ("question", "choices", "answer")}
    return Choice(id=f"mmlu-{number:05d}", topic=row["subject"], **known)
