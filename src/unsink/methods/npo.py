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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from unsink.allocation import sent
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
                groups, count = windows(policy.counts, self.options.window, generator)
                gap = policy.nll - reference.nll
                return losses.preference(losses.grouped_sum(gap, sent(groups, gap.device), count), beta)


def windows(counts: Sequence[int], width: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return (N,) the window that each labelled token belongs to, numbered from 0, and how many windows there are.

    Args:
        counts: labelled tokens of each sequence.
        width: tokens per window; 0 makes one window of each sequence.
        generator: draws where in the first window each sequence begins.
    """
    import torch

    groups: list[Tensor] = []
    number = 0
    for count in counts:
        offset = int(torch.randint(width, (1,), generator=generator)) if width else 0
        local = (torch.arange(count) + offset) // (width or count)
        groups.append(local + number)
        number += int(local[-1]) + 1
    return torch.cat(groups), number
