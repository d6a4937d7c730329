"""Gradient ascent: descent on the likelihood of the forget set (Jang et al. 2022, arXiv 2210.01504).

L_forget = -mean over all labelled tokens of the batch of nll,   in nats per token; it has no lower bound.
L_retain: none by default; `unlearn.weights.retain` is then without effect.

Deviation from the code of open-unlearning: none. The mean runs over the tokens of the whole batch, so a long sequence
counts more than a short one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from unsink.methods import LogitMethod, LogitOptions, Retain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(LogitOptions):
    """Options of `unlearn.ga`."""

    retain: Retain = Field(default="none", description="loss on what is kept")


class Method(LogitMethod[Options]):
    """Gradient ascent, by default without a retain term."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the negated mean NLL of a forget batch, a scalar, nats per labelled token."""
        return -policy.nll.mean()
