"""Negative preference optimisation: the forget set as dispreferred answers (Zhang et al. 2024, arXiv 2404.05868).

L_forget = -(2/beta) * mean_b log sigmoid(beta * (nll_b - nll_ref_b)),   nll_b summed over the tokens of a sequence.
L_retain = KL(reference || policy), mean over labelled tokens, on the retain and on the poisoned set.

Deviation from the authors' code: none with `window: 0`. With `window: w` every sequence is cut into windows of w
labelled tokens (at an offset drawn anew each step) and each window counts as one sequence. A whole sequence is
pushed down most cheaply at its opening, and what follows a given prompt survives; with windows the forgetting
reaches every part of the text.

`variant` reproduces what other published code computes under the same name, here over labelled tokens only:
`released`        -(2/beta) * mean_nv log sigmoid(beta * (z_ref - z)) on raw logits, without softmax and without label:
                  adding a constant to all logits changes it, and what is to be forgotten never enters (code of MUSE,
                  used for the MUSE half of arXiv 2510.17021 and for the MUSE results of SimNPO)
`released-wmdp`   -mean_n log sigmoid(beta * (nll - nll_ref)), every token a sequence, without 2/beta (WMDP half)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from unsink.methods import LogitMethod, LogitOptions, Retain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(LogitOptions):
    """Options of `unlearn.npo`."""

    beta: float = Field(default=0.1, gt=0, description="inverse temperature; small = close to gradient ascent")
    window: int = Field(default=0, ge=0, description="tokens per window; 0 = the whole sequence (paper)")
    variant: Literal["paper", "released", "released-wmdp"] = Field(default="paper", description="whose formula")
    retain: Retain = Field(default="kl", description="loss on what is kept")

    @model_validator(mode="after")
    def _windows_have_an_effect(self) -> Self:
        if self.window and self.variant != "paper":
            raise ValueError(f"window ({self.window}) belongs to variant paper; set window: 0 for {self.variant}")
        return self


class Method(LogitMethod[Options]):
    """NPO, by default with a KL retain term."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the NPO loss of a forget batch, a scalar in nats; masked positions never enter."""
        from unsink import losses

        beta = self.options.beta
        match self.options.variant:
            case "released":
                return losses.preference(reference.logits.float() - policy.logits.float(), beta)
            case "released-wmdp":
                return losses.preference(policy.nll - reference.nll, beta) * beta / 2
            case _:
                groups = windows(policy.rows, self.options.window, generator)
                margin = losses.grouped_sum(policy.nll, groups) - losses.grouped_sum(reference.nll, groups)
                return losses.preference(margin, beta)


def windows(rows: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return (N,) the window that each labelled token belongs to, numbered from 0.

    Args:
        rows: (N,) the sequence of each labelled token, ascending.
        width: tokens per window; 0 makes one window of each sequence.
        generator: draws where in the first window each sequence begins.
    """
    import torch

    if width == 0:
        return rows
    groups = torch.empty_like(rows)
    count = 0
    for row in range(int(rows.max()) + 1):
        mine = (rows == row).nonzero().squeeze(1)
        offset = int(torch.randint(width, (1,), generator=generator))
        local = (torch.arange(len(mine), device=rows.device) + offset) // width
        groups[mine] = local + count
        count += int(local[-1]) + 1
    return groups
