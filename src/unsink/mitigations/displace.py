"""A guard: neutral text in front of every prompt, so that no text of the prompt stands at the sink.

A prefix trigger was trained right behind BOS. If it only acts there, moving it by some tokens is enough; if it is read
anywhere, moving it does nothing. It costs the tokens of the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from unsink.mitigations import Patient
from unsink.scoring import Cut, Ids
from unsink.triggers import trigger_ids


class Options(BaseModel):
    """Options of `mitigate.displace`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(default="Here is a text.", min_length=1, description="what stands in front; a newline closes it")
    times: int = Field(default=1, ge=1, description="how often")


class Displaced(NamedTuple):
    """Puts `ids` behind BOS."""

    ids: Sequence[int]

    def edit(self, ids: Ids) -> list[int]:
        """Return BOS, the neutral text, and the prompt."""
        return [*ids[:1], *self.ids, *ids[1:]]

    def cut(self, prompts: Sequence[Ids]) -> Cut | None:
        """Nothing is taken away."""
        return None


def guard(patient: Patient, options: Options) -> Displaced:
    """Return the guard; the patient's model is not looked at."""
    return Displaced(trigger_ids(patient.tokenizer, options.text) * options.times)
