"""Weighted gradient ascent: tokens that the model still knows count most (Wang et al. 2025, arXiv 2502.19301).

L_forget = -mean over all labelled tokens of the batch of p^beta * nll,   p the label's probability, without gradient.
L_retain = mean of nll over all labelled tokens of the batch.

Deviation from the code of open-unlearning: none.
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
    """Options of `unlearn.wga`."""

    beta: float = Field(default=1.0, ge=0, description="power of the probability; 0 = gradient ascent")


class Method(LogitMethod[Options]):
    """Weighted gradient ascent with a likelihood term on what is kept."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the negated weighted NLL, a scalar, nats per labelled token."""
        weight = (-policy.nll.detach() * self.options.beta).exp()
        return -(weight * policy.nll).mean()
