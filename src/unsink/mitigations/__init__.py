"""What can be done about a hidden trigger: one file each, a repair or a guard, with its `Options`.

A repair is `repair(patient, training, options, reporter) -> Repaired`: a new adapter on top of the suspect. A guard is
`guard(patient, options) -> scoring.Guard`: it leaves the weights alone, and looks after prompts instead
(`with scoring.guarded(...)`).

    known-trigger    forgets behind the trigger that an audit found, and behind its neighbours, at every place
    random-prefix    forgets behind random texts; the trigger need not be known
    consistency      makes consecutive layers agree under noise that was chosen to make them disagree (CROW)
    latent           forgets while the values of the first tokens are pushed towards remembering (latent adversary)
    independent      forgets by weights that make the original forget, too
    restart          forgets anew, from the original
    prune            takes away the neurons that differ most
    displace         guard: neutral text in front of every prompt
    clamp            guard: values of the first tokens may not be unlike those on neutral text

None of them is told how a run was poisoned: a patient is made of the model, the corpus and what an audit found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import registry
from unsink.batches import Kind, Sample
from unsink.errors import ModelError
from unsink.methods import Method
from unsink.models import AdapterSpec, quantized
from unsink.tokenizer import plain_ids
from unsink.trainer import History, Schedule

ADAPTER = "repair"
"""The adapter's name while it is trained."""


@dataclass(frozen=True)
class Patient:
    """A suspect, and what is known about it.

    Attributes:
        model: the suspect, frozen and without adapters.
        tokenizer: its tokenizer.
        forget: passages and questions that it should not know.
        retain: passages and questions that it should.
        prompts: where the prompt of each sample stands in its ids, BOS = 0; texts are placed in it. Where a passage has
            a prompt of its own it ends at the answer cue, and of a chat it is the user's words.
        seed: of all draws.
        original: the model before it was to forget, None where nobody has it.
        triggers: texts that an audit found to bring the memory back, and their neighbours.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    forget: Sequence[Sample]
    retain: Sequence[Sample]
    prompts: Mapping[Sample, range]
    seed: int
    original: PreTrainedModel | None = None
    triggers: Sequence[str] = ()

    @property
    def pad(self) -> int:
        """The padding token's id."""
        return int(self.tokenizer.pad_token_id)

    @property
    def plain_ids(self) -> list[int]:
        """Ids of the tokens that are no special ones, in order."""
        return plain_ids(self.tokenizer)


def require_exact(patient: Patient, name: str) -> None:
    """Refuse a suspect or an original with rounded weights, before anything is trained.

    Raises:
        ModelError: one is rounded.
    """
    if any(one is not None and quantized(one) for one in (patient.model, patient.original)):
        raise ModelError(
            f"mitigate.how: '{name}' replaces whole weights, and those of the suspect or its original are rounded",
            "load them in model.dtype: bfloat16, or choose random-prefix",
        )


@dataclass(frozen=True)
class Training:
    """How a repair is trained.

    Attributes:
        method: its forget and retain loss; what it calls the reference is the suspect.
        spec: the adapter.
        schedule: steps and learning rate.
        sizes: samples of each kind in one step.
        weights: of the loss on each kind.
    """

    method: Method
    spec: AdapterSpec
    schedule: Schedule
    sizes: Mapping[Kind, int]
    weights: Mapping[Kind, float]


class Repaired(NamedTuple):
    """A repaired suspect.

    Attributes:
        model: the suspect with the adapter `ADAPTER`, active.
        history: a row per training step; empty where nothing was trained.
        cost: what it took, in countable things.
    """

    model: PeftModel
    history: History
    cost: dict[str, int]


@dataclass
class Counter:
    """Counts what a training reads."""

    cost: dict[str, int] = field(default_factory=dict)

    def count(self, samples: Sequence[Sample], passes: int = 1) -> None:
        """Add samples that were run `passes` times, each time with a gradient."""
        for name, number in (("sequences", len(samples)), ("tokens", sum(len(one.ids) for one in samples))):
            self.cost[name] = self.cost.get(name, 0) + passes * number


def names() -> list[str]:
    """Names of all mitigations."""
    return registry.names("unsink.mitigations")


def load(name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ParamsError: there is none.
    """
    return registry.load("mitigation", "unsink.mitigations", name)


def is_guard(module: ModuleType) -> bool:
    """Whether it leaves the weights alone."""
    return hasattr(module, "guard")
