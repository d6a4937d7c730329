"""Gradient difference: ascent on the forget set, descent on what is kept (Liu et al. 2022, arXiv 2203.12817).

L_forget = -mean over all labelled tokens of the batch of nll,   in nats per token; it has no lower bound.
L_retain = +mean of nll, on the retain and on the poisoned set.

Deviation from the code of open-unlearning: none. The means run over the tokens of the whole batch, so a long sequence
counts more than a short one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unsink.methods import LogitMethod, LogitOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(LogitOptions):
    """Options of `unlearn.graddiff`."""


class Method(LogitMethod[Options]):
    """Gradient ascent with a likelihood term on what is kept."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the negated mean NLL of a forget batch, a scalar, nats per labelled token."""
        return -policy.nll.mean()
