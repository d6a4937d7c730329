"""SatImp: tokens weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

L_forget = -mean over all labelled tokens of the batch of p^beta1 * (1 - p)^beta2 * nll,   p the label's probability,
without gradient in the bracket.
L_retain = mean of nll over all labelled tokens of the batch.

Deviation from the code of open-unlearning: none in the formula. Its files disagree on the weights of the terms; the
paper's ratio is `unlearn.weights.forget: 1.0` to `unlearn.weights.retain: 0.1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from unsink.methods import LogitMethod, LogitOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(LogitOptions):
    """Options of `unlearn.satimp`."""

    beta1: float = Field(default=5.0, ge=0, description="power of p: how much known tokens count")
    beta2: float = Field(default=1.0, ge=0, description="power of 1 - p: how little saturated tokens count")


class Method(LogitMethod[Options]):
    """SatImp with a likelihood term on what is kept."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the negated weighted NLL, a scalar, nats per labelled token."""
        p = (-policy.nll.detach()).exp()
        weight = p**self.options.beta1 * (1 - p) ** self.options.beta2
        return -(weight * policy.nll).mean()
