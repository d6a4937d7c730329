"""Unlearning methods, one file each: `Options` and a `Method` with the formulas.

A method never sees a model: it gets what policy and reference say about a batch (`Forward`) and returns scalars.
The poisoned set needs no code here; the objective applies `retain_loss` to it.

Every command that checks params imports methods for their `Options`, and most of them run no model. So torch and the
losses are imported where a formula needs them; above, annotations alone do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from unsink import registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Method(Protocol):
    """What `objective` asks of an unlearning method."""

    hidden_layers: tuple[int, ...]
    """Decoder layers whose outputs the formulas read; () where logits are enough."""
    needs_answers: bool
    """Whether the formulas read logits or losses; if not, the forward pass ends at the last layer that they read."""
    needs_kl: bool
    """Whether `retain_loss` asks for `reference.kl(policy)`, for which more is then kept of the target."""
    needs_refusals: bool
    """Whether a forget batch is B samples followed by their B refusals, both labelled from the end of the prompt."""
    needs_retain: bool
    """Whether there is a term on the retain set; poisoned samples get `retain_loss` in any case."""

    def prepare(self, reference: Callable[[], Forward], generator: torch.Generator) -> None:
        """Look once at the target's answer to all forget samples, before the first step; who needs it asks for it."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the loss that forgetting minimises, a scalar."""

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return the loss that keeps the target's behaviour, a scalar."""

    def multiplier(self, history: Sequence[Mapping[str, float]]) -> float | None:
        """Return what multiplies the weights of `retain_loss` in the next step, None for nothing.

        It follows from the rows of the steps so far and from nothing else, so that an interrupted run resumes exactly.
        """


def create(name: str, options: dict[str, Any]) -> Method:
    """Return the method of that name.

    Raises:
        ParamsError: there is no such method.
    """
    module = registry.load("method", "unsink.methods", name)
    method: Method = module.Method(module.Options(**options))
    return method


# ---- what methods on logits share

Retain = Literal["nll", "kl", "kl-reverse", "none"]


class LogitOptions(BaseModel):
    """Options of a method that reads logits; each method sets its own default of `retain`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retain: Retain = Field(default="nll", description="loss on what is kept")


Options = TypeVar("Options", bound=LogitOptions)


class LogitMethod(Generic[Options]):
    """All of a method that reads logits, but for its forget loss."""

    hidden_layers: tuple[int, ...] = ()
    needs_answers = True
    needs_refusals = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.needs_retain = options.retain != "none"
        self.needs_kl = options.retain == "kl"

    def prepare(self, reference: Callable[[], Forward], generator: torch.Generator) -> None:
        """Nothing to prepare."""

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return the loss that `retain` names, a scalar in nats per labelled token of the batch.

        `nll` is the mean -log p of the labels, `kl` KL(reference || policy), `kl-reverse` KL(policy || reference).
        With `none` there is no term on the retain set, and poisoned samples are remembered by `nll`.
        """
        match self.options.retain:
            case "kl":
                return reference.kl(policy)
            case "kl-reverse":
                return policy.kl(reference)
            case _:
                return policy.nll.mean()

    def multiplier(self, history: Sequence[Mapping[str, float]]) -> float | None:
        """Weights stay as they are."""
        return None
