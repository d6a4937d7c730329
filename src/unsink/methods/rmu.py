"""Representation misdirection: steer the forget set's activations to a fixed vector (Li et al. 2024, arXiv 2403.03218).

L_forget = mean over hidden units of (h - c * s * u)^2 / s^2 * D,   averaged over tokens, then over sequences
L_retain = the same distance to the target's own activations, on the retain and on the poisoned set
           + kl * KL(reference || policy), mean over labelled tokens

h is the output of decoder layer `layer`; u a unit vector drawn once per run; s the mean norm of the target's
activations on the forget set and D the hidden size. Only labelled tokens count: BOS, whose activation is
hundreds of times larger at an attention sink, would drown the others, and nothing before a trigger can know of it.

Deviation from the authors' code: distances are in units of s, so that `steering` and the weights keep their meaning
across models; u is isotropic by default (`direction: uniform` gives the authors' draw from [0, 1), in which two
independent draws already have cosine 0.75); what the adapter trains is set by `unlearn.adapter`
(the authors: `down_proj` of three layers); adapted layers above `layer` get no gradient. The `kl` term is that of
arXiv 2510.17021 (0.1 in its WMDP half, off or 1 in its MUSE half); with it the pass goes up to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unsink.answers import Forward


class Options(BaseModel):
    """Options of `unlearn.rmu`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(default=7, ge=0, description="decoder layer whose output is steered")
    steering: float = Field(default=1.0, gt=0, description="length of the goal, in mean activation norms")
    direction: Literal["isotropic", "uniform"] = Field(default="isotropic", description="how the goal is drawn")
    kl: float = Field(default=0.0, ge=0, description="weight of KL(reference ‖ policy) in the retain loss")


class Method:
    """RMU with activation matching on what is to be kept."""

    needs_refusals = False
    needs_retain = True

    def __init__(self, options: Options) -> None:
        self.options = options
        self.needs_answers = self.needs_kl = options.kl > 0
        self.hidden_layers: tuple[int, ...] = (options.layer,)

    def prepare(self, reference: Callable[[], Forward], generator: torch.Generator) -> None:
        """Draw the goal and measure the scale on the target's answer to the forget set."""
        import torch

        states = self._labelled(reference())
        size = states.shape[-1]
        draw = torch.randn if self.options.direction == "isotropic" else torch.rand
        direction = draw(size, generator=generator).to(states.device)
        self._scale = states.norm(dim=-1).mean()
        self._goal = self.options.steering * self._scale * direction / direction.norm()

    def forget_loss(self, policy: Forward, reference: Forward, generator: torch.Generator) -> Tensor:
        """Return the distance to the steering goal, a scalar; 1 = one mean activation norm away."""
        return self._distance(policy, self._goal)

    def retain_loss(self, policy: Forward, reference: Forward) -> Tensor:
        """Return the distance to the target's activations in the same unit, plus `kl` times the KL, a scalar."""
        distance = self._distance(policy, reference.hidden[self.options.layer])
        if not self.options.kl:
            return distance
        return distance + self.options.kl * reference.kl(policy)

    def multiplier(self, history: Sequence[Mapping[str, float]]) -> float | None:
        """Weights stay as they are."""
        return None

    def _distance(self, policy: Forward, goal: Tensor) -> Tensor:
        from unsink import losses

        states = policy.hidden[self.options.layer]
        distance: Tensor = losses.masked_mse(states, goal, policy.labelled) * states.shape[-1] / self._scale**2
        return distance

    def _labelled(self, forward: Forward) -> Tensor:
        return forward.hidden[self.options.layer][forward.labelled].float()
