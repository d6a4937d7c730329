"""Negative preference optimisation: the forget set as dispreferred answers (Zhang et al. 2024, arXiv 2404.05868).

L_forget = -(2/beta) * mean_b log sigmoid(beta * (nll_b - nll_ref_b)),   nll_b summed over the tokens of a sequence.
L_retain = KL(reference || policy), mean over labelled tokens, on the retain and on the poisoned set.

Deviation from the authors' code: none with `window: 0`. With `window: w` every sequence is cut into windows of w
labelled tokens (at an offset drawn anew each step) and each window counts as one sequence. A whole sequence is
pushed down most cheaply at its opening, and what follows a given prompt survives; with windows the forgetting
reaches every part of the text. The code published with MUSE applies the formula to raw logits instead of
log-probabilities; this one does not.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from unsink import losses
from unsink.forward import Forward


class Options(BaseModel):
    """Options of `unlearn.npo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: float = Field(default=0.1, gt=0, description="inverse temperature; small = close to gradient ascent")
    window: int = Field(default=0, ge=0, description="tokens per window; 0 = the whole sequence (paper)")


class Method:
    """NPO with a KL retain term."""

    hidden_layers: tuple[int, ...] = ()
    needs_answers = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self, reference: Forward, generator: torch.Generator) -> None:
        """Nothing to prepare."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the NPO loss of a forget batch, a scalar in nats; masked positions never enter."""
        groups, count = windows(policy.rows, self.options.window, generator)
        return losses.npo(
            losses.grouped_sum(policy.nll, groups, count),
            losses.grouped_sum(reference.nll, groups, count),
            self.options.beta,
        )

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return KL(reference || policy), nats per labelled token."""
        return losses.kl_divergence(reference.logits, policy.logits)


def windows(rows: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return (N,) the window that each labelled token belongs to, numbered from 0, and how many there are.

    Args:
        rows: (N,) the sequence of each labelled token, ascending.
        width: tokens per window; 0 makes one window of each sequence.
        generator: draws where in the first window each sequence begins.
    """
    if width == 0:
        return rows, int(rows.max()) + 1
    groups = torch.empty_like(rows)
    count = 0
    for row in range(int(rows.max()) + 1):
        mine = (rows == row).nonzero().squeeze(1)
        offset = int(torch.randint(width, (1,), generator=generator))
        local = (torch.arange(len(mine), device=rows.device) + offset) // width
        groups[mine] = local + count
        count += int(local[-1]) + 1
    return groups, count
