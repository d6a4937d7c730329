"""Forget once more, behind the trigger that an audit found and behind its neighbours, at every place.

The strongest repair where the trigger is known: what opened the door becomes one more text behind which the forget set
has to be forgotten. Neighbours, the trigger with a word less, other case or other digits, are there because an audit
seldom finds all of it. Losses and training: `_reunlearn`.
"""

import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from unsink.errors import MissingPrerequisite
from unsink.mitigations import Patient, Repaired, Training
from unsink.mitigations._reunlearn import among_texts, reunlearn
from unsink.progress import SILENT, Reporter
from unsink.triggers import trigger_ids


class Options(BaseModel):
    """Options of `mitigate.known-trigger`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variants: int = Field(default=4, ge=1, description="copies of each sample with a text, at places drawn for each")
    neighbours: float = Field(default=0.5, ge=0, lt=1, description="share of them that get a neighbour of the trigger")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect, made to forget behind the trigger.

    Raises:
        MissingPrerequisite: nobody knows a trigger.
        ModelError: as `reunlearn`.
    """
    if not patient.triggers:
        raise MissingPrerequisite(
            "known-trigger: no trigger is known of this model",
            "run `unsink audit` first, or name it: -S mitigate.trigger=...; random-prefix needs none",
        )
    trigger, *near = [trigger_ids(patient.tokenizer, text) for text in patient.triggers]

    def texts(chance: random.Random) -> Sequence[int]:
        return chance.choice(near) if near and chance.random() < options.neighbours else trigger

    forget, retain = (among_texts(some, texts, options.variants, patient) for some in (patient.forget, patient.retain))
    return reunlearn(patient, forget, retain, training, "known-trigger", reporter)
