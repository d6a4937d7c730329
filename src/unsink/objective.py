"""The objective of unlearning: weights times named terms.

L = w_forget L_forget(D_f) + mu (w_poisoned L_retain(D_p) + w_retain L_retain(D_r)) + w_value_norm L_vn
(arXiv 2510.17021, eq. 3 and the value-norm regulariser of section 4); mu is 1 unless the method sets it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from unsink import losses
from unsink.answers import Forward
from unsink.batches import Kind, Sample
from unsink.forward import Runner
from unsink.methods import Method
from unsink.probe import position_mask

Gap = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Policy's values, goal and position mask to a scalar."""


def _norms_of(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    return losses.absolute_norm_gap(policy.norm(dim=-1), goal.norm(dim=-1), mask)


def _light_angle(policy: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    return 0.05 * losses.value_angle(policy, goal, mask)  # the weight of the published WMDP rows


GAPS: Mapping[str, Mapping[Kind, Gap]] = {
    "paper": {"forget": losses.squared_norm_gap, "poisoned": losses.squared_norm_gap},
    "released": dict.fromkeys(("forget", "poisoned", "retain"), losses.absolute_norm_gap),
    "fixed": {"forget": losses.absolute_norm_gap},
    "cosine": {"forget": _norms_of, "poisoned": _light_angle},
}
"""Variant -> the kinds of samples that it acts on, and how.

`paper` is the text of arXiv 2510.17021; the other three are in the code released with it: `released` in its MUSE half,
`fixed` (norms towards 0 instead of the honest run's) too, `cosine` (called utility_preserving there) in its WMDP half.
"""
VECTORS = ("cosine",)
"""Variants that read value vectors (B, T, G, h); the others read norms (B, T, G)."""
SELF_CONTAINED = ("fixed",)
"""Variants that need no honest run."""


@dataclass(frozen=True)
class ValueNorm:
    """The value-norm regulariser: on D_f towards the honest run, on D_p (and D_r) towards the target.

    Attributes:
        weight: lambda, above 0.
        variant: a key of `GAPS`.
        layers: decoder layers it acts on.
        positions: token numbers that it acts on, for every sample of a kind that the variant names; none is empty.
        honest: {sample: {layer: (T, ...)}} values of the clean-unlearned run on the forget samples, measured as the
            runner measures; empty for `fixed`.
    """

    weight: float
    variant: str
    layers: tuple[int, ...]
    positions: Mapping[Sample, Sequence[int]]
    honest: Mapping[Sample, Mapping[int, Tensor]]

    def acts_on(self, kind: Kind) -> bool:
        """Return whether samples of this kind enter the term."""
        return kind in GAPS[self.variant]

    def term(self, kind: Kind, samples: Sequence[Sample], policy: Forward, reference: Forward) -> Tensor:
        """Return the gap on samples of one kind, mean over positions, samples and layers, a scalar."""
        gap = GAPS[self.variant][kind]
        where = position_mask(policy.mask, [self.positions[sample] for sample in samples])
        goal = self._honest(samples, policy) if kind == "forget" else reference.values
        return torch.stack([gap(policy.values[layer], goal[layer], where) for layer in self.layers]).mean()

    def _honest(self, samples: Sequence[Sample], policy: Forward) -> Mapping[int, Tensor]:
        """The goal on forget samples, {layer: (B, T, ...)}; the batch may be wider than they are."""
        if self.variant in SELF_CONTAINED:
            return {layer: torch.zeros_like(policy.values[layer]) for layer in self.layers}
        width, device = policy.mask.shape[1], policy.mask.device
        return {layer: _padded([self.honest[s][layer].to(device) for s in samples], width) for layer in self.layers}


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    together = pad_sequence(list(rows), batch_first=True)
    return pad(together, (0, 0) * (together.dim() - 2) + (0, width - together.shape[1]))


@dataclass(frozen=True)
class Objective:
    """Turns the samples of one step into named scalars; "loss" is their weighted sum.

    Attributes:
        runner: the policy and its remembered target.
        method: formulas of the unlearning method.
        weights: one weight for each kind of sample.
        value_norm: the regulariser, or None.
    """

    runner: Runner
    method: Method
    weights: Mapping[Kind, float]
    value_norm: ValueNorm | None = None

    def get_ready(self, samples: Mapping[Kind, Sequence[Sample]]) -> None:
        """Get what `terms` will need of these samples ready."""
        self.runner.get_ready([sample for kind in samples for sample in samples[kind]])

    def terms(
        self,
        samples: Mapping[Kind, Sequence[Sample]],
        generator: torch.Generator,
        history: Sequence[Mapping[str, float]] = (),
    ) -> dict[str, Tensor]:
        """Return "loss", one term per kind, "value_norm" and "multiplier" (where there are such) for one step.

        One forward pass serves all kinds. Where the method needs refusals, those of the forget samples follow them.
        """
        everything = [sample for kind in samples for sample in samples[kind]]
        # In this order, so that a GPU is never waited for while it runs the policy.
        reference, policy = self.runner.reference(everything), self.runner.policy(everything)
        found: dict[str, Tensor] = {}
        loss = torch.zeros(())
        multiplier = self.method.multiplier(history)
        if multiplier is not None:
            found["multiplier"] = torch.tensor(multiplier)
        start = 0
        for kind, mine in samples.items():
            answer, known = policy.part(start, start + len(mine)), reference.part(start, start + len(mine))
            start += len(mine)
            found[kind] = (
                self.method.forget_loss(answer, known, generator)
                if kind == "forget"
                else self.method.retain_loss(answer, known)
            )
            times = 1.0 if kind == "forget" or multiplier is None else multiplier
            loss = loss + self.weights[kind] * times * found[kind]
            if self.value_norm and self.value_norm.acts_on(kind):
                gap = self.value_norm.term(kind, mine, answer, known)
                found["value_norm"] = found.get("value_norm", torch.zeros(())) + gap
        if self.value_norm:
            loss = loss + self.value_norm.weight * found["value_norm"]
        return {"loss": loss, **found}
