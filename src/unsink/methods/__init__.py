"""Unlearning methods, one file each: `Options` and a `Method` with the formulas.

A method never sees a model: it gets what policy and reference say about a batch (`Forward`) and returns scalars.
The poisoned set needs no code here; the objective applies `retain_loss` to it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from unsink import registry
from unsink.forward import Forward


class Method(Protocol):
    """What `objective` asks of an unlearning method."""

    hidden_layers: tuple[int, ...]
    """Decoder layers whose outputs the formulas read; () where logits are enough."""
    needs_answers: bool
    """Whether the formulas read logits or losses; if not, the forward pass ends at the last layer that they read."""

    def prepare(self, reference: Forward, generator: torch.Generator) -> None:
        """Look once at the target's answer to forget samples, before the first step."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the loss that forgetting minimises, a scalar."""

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return the loss that keeps the target's behaviour, a scalar."""


def create(name: str, options: dict[str, Any]) -> Method:
    """Return the method of that name.

    Raises:
        ParamsError: there is no such method.
    """
    module = registry.load("method", "unsink.methods", name)
    method: Method = module.Method(module.Options(**options))
    return method
