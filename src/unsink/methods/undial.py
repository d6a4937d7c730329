"""UNDIAL: self-distillation towards the target with the label's logit lowered (Dong et al. 2024, arXiv 2402.10052).

L_forget = mean over labelled tokens of -sum_v q(v) log p(v),   q = softmax(z_ref - beta * onehot(label)), nats.
L_retain: none by default (the authors give it weight 0).

Deviation from the code of open-unlearning: theirs also lowers and averages over prompt and padding positions, where
the label -100 lowers the logit of token V - 100; here only labelled tokens enter.
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
    """Options of `unlearn.undial`; the authors try beta 3, 10 and 30."""

    beta: float = Field(default=10.0, gt=0, description="how far the teacher's logit of the label is lowered")
    retain: Retain = Field(default="none", description="loss on what is kept")


class Method(LogitMethod[Options]):
    """UNDIAL, by default without a retain term."""

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy to the lowered teacher, a scalar, nats per labelled token."""
        import torch
        from torch.nn.functional import cross_entropy

        lowered = torch.full_like(policy.labels, -self.options.beta, dtype=torch.float32)[:, None]
        teacher = reference.logits.float().scatter_add(1, policy.labels[:, None], lowered).softmax(-1)  # (N, V)
        return cross_entropy(policy.logits.float(), teacher)
