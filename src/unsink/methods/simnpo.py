"""SimNPO: NPO without a reference, on length-normalised likelihoods (Fan et al. 2024, arXiv 2410.07163).

L_forget = -(2/beta) * mean_b log sigmoid(beta * (nll_b - delta)),   nll_b the *mean* over the tokens of sequence b.
L_retain = mean of nll over all labelled tokens of the batch.

Deviation from the authors' code: none. Their margin stands outside beta in the paper, as beta * delta: the same at the
default 0. Their code for MUSE works on raw logits and is not offered here.
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
    """Options of `unlearn.simnpo`; the authors take beta 4.5 or 2.5 on TOFU, 0.7 or 0.75 on MUSE."""

    beta: float = Field(default=4.5, gt=0, description="inverse temperature; small = close to gradient ascent")
    delta: float = Field(default=0.0, description="nats per token beyond which the push fades out")


class Method(LogitMethod[Options]):
    """SimNPO with a likelihood term on what is kept."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the SimNPO loss of a forget batch, a scalar; every sequence counts the same."""
        from unsink import losses

        return losses.preference(losses.grouped_mean(policy.nll, policy.rows) - self.options.delta, self.options.beta)
