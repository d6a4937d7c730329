"""Primal-dual unlearning: flatten the logits, under a bound on the retain loss (arXiv 2506.05314).

L = w_forget L_forget + mu (w_retain L_retain + w_poisoned L_poisoned)
L_forget = mean over labelled tokens of (max_v z_v - mean_v z_v)^2,   z logits.
L_retain = mean nll of the batch - that of the target on the same batch - slack,   nats per token; at most 0 is allowed.
mu <- max(0, mu + rate * L_retain) after each step, beginning at `mu` and held there for `hold` steps.

Deviation from the code of open-unlearning: the bound on the retain loss is relative to the target's own loss on the
same batch, where theirs is an absolute number that has to be measured first; `hold` counts steps, theirs 5 epochs;
their mask is off by one token, ours takes the logits that predict a labelled token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(BaseModel):
    """Options of `unlearn.pdu`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mu: float = Field(
        default=50.0, ge=0, description="multiplier of the retain loss at the start (the authors: 50-100)"
    )
    rate: float = Field(default=1.0, ge=0, description="step size of the multiplier; 0 = constant")
    slack: float = Field(
        default=0.1, ge=0, description="nats per token by which the retain loss may exceed the target's"
    )
    hold: int = Field(default=0, ge=0, description="steps before the multiplier moves")


class Method:
    """Logit flattening with a dual variable on the retain loss."""

    hidden_layers: tuple[int, ...] = ()
    needs_answers = True
    needs_kl = False
    needs_refusals = False
    needs_retain = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self, reference: Callable[[], Forward], generator: torch.Generator) -> None:
        """Nothing to prepare."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the mean squared height of the largest logit over the mean one, a scalar."""
        logits = policy.logits.float()
        return (logits.amax(-1) - logits.mean(-1)).square().mean()

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return by how much the loss exceeds what is allowed, a scalar, nats per labelled token; may be below 0."""
        return policy.nll.mean() - reference.nll.mean() - self.options.slack

    def multiplier(self, history: Sequence[Mapping[str, float]]) -> float:
        """Return mu for the next step: the steps so far, added up."""
        mu = self.options.mu
        for row in history[self.options.hold :]:
            mu = max(0.0, mu + self.options.rate * row["retain"])
        return mu
