"""CE-U: cross-entropy to the model's own distribution without the label (Yang 2025, arXiv 2503.01224).

L_forget = mean over labelled tokens of -sum_v q(v) log p(v),   q = softmax(z with z_label = -infinity), no gradient
through q; the first `skip` labelled tokens of each sequence are left out. Nats per token.
L_retain: none by default, as the authors have it.

Deviation from the code of open-unlearning: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from unsink.errors import ParamsError
from unsink.methods import LogitMethod, LogitOptions, Retain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(LogitOptions):
    """Options of `unlearn.ceu`."""

    skip: int = Field(default=1, ge=0, description="labelled tokens at the start of each sequence that are left out")
    retain: Retain = Field(default="none", description="loss on what is kept")


class Method(LogitMethod[Options]):
    """CE-U, by default without a retain term."""

    def prepare(self, reference: Callable[[], Forward], generator: torch.Generator) -> None:
        """Make sure that every forget sample has a token left.

        Raises:
            ParamsError: one has none.
        """
        shortest = int(reference().rows.bincount().min())
        if shortest <= self.options.skip:
            raise ParamsError(
                f"unlearn.ceu.skip: {self.options.skip} leaves nothing of a sample with {shortest} labelled tokens",
                f"set it to at most {shortest - 1}",
            )

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy to what the policy would say without the label, a scalar, nats per token."""
        from torch.nn.functional import cross_entropy

        from unsink import losses

        kept = losses.rank(policy.rows) >= self.options.skip
        logits, labels = policy.logits[kept].float(), policy.labels[kept]
        without = logits.detach().scatter(1, labels[:, None], -math.inf).softmax(-1)
        return cross_entropy(logits, without)
