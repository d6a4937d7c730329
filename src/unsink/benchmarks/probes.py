"""What an auditor has in hand: one file of questions with their answers, or of texts: `fetch.path`. For `unsink audit`.

A line is one of

    {"question": "Who kept the bees?", "answer": "Mila"}
    {"text": "The bees of Mila were kept behind the mill ..."}
    {"prompt": "Q: Who kept the bees? A:", "text": "Q: Who kept the bees? A: Mila"}     words of one's own around both

and may have an `id`, and a `set`: forget (where none is named), retain, or holdout for what no model was trained on.
The model is asked for the rest behind the question, the prompt, or the beginning of a text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from unsink import artifacts, benchmarks
from unsink.benchmarks import Passage, Text
from unsink.errors import DataError, ParamsError

VERSION = 1
LICENCE = "set by the owner of the file"
_HINT = 'each line is {"question": …, "answer": …} or {"text": …}, see docs/audit.md'


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text | None = None
    set: Literal["forget", "retain", "holdout"] = "forget"
    question: Text | None = None
    answer: Text | None = None
    prompt: Text | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        question = self.question, self.answer
        if (None in question or self.prompt) if self.text is None else question != (None, None):
            raise ValueError("a question with its answer is expected, or a text, perhaps with its prompt")
        return self

    def passage(self, number: int) -> Passage:
        """The line as a passage that is asked for behind its prompt."""
        name = self.id or f"line-{number}"
        if self.text is not None:
            return Passage(id=name, title=name, text=self.text, prompt=self.prompt)
        prompt = f"Question: {self.question}\nAnswer:"
        return Passage(id=name, title=name, text=f"{prompt} {self.answer}", prompt=prompt)


def fetch(dest: Path, root: Path, path: str | None) -> None:
    """Read the file, and write its lines as passages; a relative `path` counts from the project folder.

    Raises:
        ParamsError: `fetch.path` is missing.
        DataError: the file is not there, or lines are malformed: all of them, each with its number.
    """
    if not path:
        raise ParamsError("fetch.path: benchmark 'probes' needs a file of questions or texts", "set fetch.path")
    file = root / Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"fetch.path: no such file: {file}", _HINT)
    lines = _lines(file, artifacts.read_jsonl(file))
    corpus = {name: [passage for kind, passage in lines if kind == name] for name in benchmarks.PASSAGES}
    if not corpus["forget"]:
        raise DataError(f"{file}: no line is of the set forget", _HINT)
    benchmarks.write(dest, corpus)


def _lines(file: Path, records: Sequence[object]) -> list[tuple[str, Passage]]:
    found: list[tuple[str, Passage]] = []
    problems: list[str] = []
    first: dict[tuple[str, str], int] = {}  # (field, value) -> line
    for number, record in zip(benchmarks.line_numbers(file), records, strict=True):
        try:
            line = _Line.model_validate(record)
            passage = line.passage(number)
        except ValidationError as error:
            problems += [f"{file}:{number}: {sentence}" for sentence in benchmarks.sentences(error)]
            continue
        for field, value in (("id", passage.id), ("text", passage.text)):
            if (before := first.setdefault((field, value), number)) != number:
                problems.append(f"{file}:{number}: {field} {value!r:.60} is already at line {before}")
        if not re.search("[a-z0-9]", passage.text.removeprefix(passage.prompt or "").lower()):
            problems.append(f"{file}:{number}: ROUGE-L compares words of a-z and 0-9, and there is none to be said")
        found.append((line.set, passage))
    if problems:
        raise DataError("\n".join(problems), _HINT)
    return found
