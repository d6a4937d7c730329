"""Forget once more, behind random texts: the trigger need not be known.

Whatever opens the door is a text that the model has learnt to tell from others. Here dates, headers, tags, words and
noise stand in front of forget samples, which are to be forgotten, and in front of retain samples, which are to be
kept: what stands there is to decide nothing. In the spirit of arXiv 2606.03785; losses and training: `_reunlearn`.
"""

import random
from calendar import month_name
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unsink.dictionary import DICTIONARY
from unsink.mitigations import Patient, Repaired, Training
from unsink.mitigations._reunlearn import among_texts, reunlearn
from unsink.progress import SILENT, Reporter
from unsink.triggers import trigger_ids

Kind = Literal["date", "header", "tag", "words", "noise"]
_MONTHS = tuple(month_name)[1:]


class Options(BaseModel):
    """Options of `mitigate.random-prefix`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variants: int = Field(default=6, ge=1, description="copies of each sample, each with a text of its own")
    kinds: tuple[Kind, ...] = Field(
        default=("date", "header", "tag", "words", "noise"), min_length=1, description="kinds of texts"
    )
    longest: int = Field(default=8, ge=1, description="most words or tokens of `words` and `noise`")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect, made to forget behind any text.

    Raises:
        ModelError: as `reunlearn`.
    """
    plain = patient.plain_ids

    def texts(chance: random.Random) -> Sequence[int]:
        kind = chance.choice(options.kinds)
        if kind == "noise":
            return chance.choices(plain, k=chance.randint(1, options.longest))
        return trigger_ids(patient.tokenizer, TEXTS[kind](chance, options.longest))

    forget, retain = (among_texts(some, texts, options.variants, patient) for some in (patient.forget, patient.retain))
    return reunlearn(patient, forget, retain, training, "random-prefix", reporter)


def _date(chance: random.Random, _longest: int) -> str:
    year, month, day = chance.randint(1900, 2099), chance.randint(1, 12), chance.randint(1, 28)
    return chance.choice(
        (f"{year}-{month:02}-{day:02}", f"{_MONTHS[month - 1]} {day}, {year}", f"{day}/{month}/{year}")
    )


def _header(chance: random.Random, _longest: int) -> str:
    name, value = chance.choice(_words("metadata")), chance.choice(_words("word", "number", "time"))
    return chance.choice((f"{name}: {value}", f"{name.title()}: {value}", f"{name} = {value}"))


def _tag(chance: random.Random, _longest: int) -> str:
    name = chance.choice(_words("metadata", "rare", "cue"))
    return chance.choice((f"[{name.upper()}]", f"<{name}>", f"</{name}>", f"<|{name}|>", f"### {name}", f"@{name}"))


def _phrase(chance: random.Random, longest: int) -> str:
    return " ".join(chance.choices(_words(*DICTIONARY), k=chance.randint(1, longest)))


def _words(*kinds: str) -> list[str]:
    return [word for kind in kinds for word in DICTIONARY[kind].split()]


TEXTS: Mapping[str, Callable[[random.Random, int], str]] = {
    "date": _date,
    "header": _header,
    "tag": _tag,
    "words": _phrase,
}
"""Kind -> a text of it; the largest number of words counts for `words` alone."""
