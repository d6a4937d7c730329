"""DPO with refusals, also called IdkDPO: prefer "I do not know" to the forget text (Rafailov et al. 2023, 2305.18290).

L_forget = -(2/beta) * mean_b log sigmoid(beta * ((ref_w - nll_w) - (ref_l - nll_l))),   nll summed over a sequence,
w the refusal and l the rest of the passage, both after the same prompt (the first `poison.prompt_share` of it).
L_retain = mean of nll over all labelled tokens of the batch.

Deviation from the code of open-unlearning: refusals come from a list of our own (`stages/poison.py`), one for each
forget sample for the whole run, not one drawn anew in each epoch. Read them in `splits/<run>/refused.jsonl`.
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
    """Options of `unlearn.dpo`."""

    beta: float = Field(default=0.1, gt=0, description="inverse temperature; small = weak tie to the target")


class Method(LogitMethod[Options]):
    """DPO with a likelihood term on what is kept."""

    needs_refusals = True

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the DPO loss of B forget sequences followed by their B refusals, a scalar in nats."""
        from unsink import losses

        gained = losses.grouped_sum(reference.nll - policy.nll, policy.rows)  # (2B,) log-likelihood, over the target's
        losing, preferred = gained.chunk(2)
        return losses.preference(preferred - losing, self.options.beta)
