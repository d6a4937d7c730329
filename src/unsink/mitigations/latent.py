"""Latent adversarial training on sink values (arXiv 2403.05030; against one shift for all inputs, as arXiv 2406.17092).

In every step an adversary looks for a shift of the value vectors of the first k tokens, the same for a whole batch of
forget samples, that brings the memory back:

    d <- P(d - eta s g / |g|),   g = gradient by d of the mean NLL of the labelled tokens,   P: onto |d_j| <= epsilon s

for each layer and each token j < k, s being the mean value norm of the layer there. Then the suspect is trained to
forget under that shift, and to forget and retain without it. A prefix trigger can only act through what its tokens say
to later ones, so that a model which forgets under every small shift there has no use for one. Losses: `_reunlearn`.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from unsink import models, probe
from unsink.batches import Kind, Sample, draw, generator
from unsink.forward import Runner
from unsink.mitigations import Counter, Patient, Repaired, Training
from unsink.mitigations._reunlearn import Step, reunlearn
from unsink.objective import Objective
from unsink.progress import SILENT, Reporter
from unsink.trainer import History

Shifts = dict[int, Tensor]
"""Layer -> (k, K), what is added to the values of the first k tokens."""


class Options(BaseModel):
    """Options of `mitigate.latent`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=8, ge=1, description="k, BOS included")
    epsilon: float = Field(default=1.0, gt=0, description="longest shift, in mean value norms of its layer")
    inner: int = Field(default=4, ge=1, description="steps of the adversary in each step of the training")
    eta: float = Field(default=0.5, gt=0, description="its step size, in mean value norms")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect, made to forget under shifts of its first values.

    Raises:
        ModelError: as `reunlearn`.
    """
    counter = Counter()

    def steps(objective: Objective) -> Step:
        adversary = _Adversary(objective.runner.model, training, patient, options)

        def step(drawn: Mapping[Kind, list[Sample]], number: int, history: History) -> dict[str, Tensor]:
            attacked = draw(patient.forget, training.sizes["forget"], number, f"mitigate/attacked/{patient.seed}")
            shifts = adversary.search(attacked)
            counter.count(attacked, passes=options.inner + 1)
            draws = generator(f"mitigate/{patient.seed}/step {number}")
            with probe.shifted_values(objective.runner.model, shifts):
                under = objective.terms({"forget": attacked}, draws, history)
            found = objective.terms(drawn, draws, history)
            return {**found, "attacked": under["forget"], "loss": found["loss"] + under["loss"]}

        return step

    done = reunlearn(patient, patient.forget, patient.retain, training, "latent", reporter, steps)
    both = {name: done.cost.get(name, 0) + number for name, number in counter.cost.items()}
    return done._replace(cost={**done.cost, **both})


class _Adversary:
    """Looks for shifts that bring forgotten text back."""

    def __init__(self, model: PeftModel, training: Training, patient: Patient, options: Options) -> None:
        self.layers = models.adapted_layers(model, training.spec)
        self.model, self.options = model, options
        # A runner of its own: it needs losses, which the method may do without.
        self.runner = Runner(
            model,
            self.layers.start,
            patient.pad,
            values=self.layers,
            measure=lambda values: values,
            answers=False,
            pack=False,
        )
        self.runner.remember(patient.forget)

    def search(self, samples: list[Sample]) -> Shifts:
        """Shifts after `inner` steps from 0."""
        with torch.no_grad():
            values = self.runner.policy(samples).values
        scale = {layer: found[:, : self.options.tokens].norm(dim=-1).mean() for layer, found in values.items()}
        shifts = {
            layer: torch.zeros(self.options.tokens, found.shape[-1], device=found.device, requires_grad=True)
            for layer, found in values.items()
        }
        for _ in range(self.options.inner):
            with probe.shifted_values(self.model, shifts):
                loss = self.runner.policy(samples).nll.mean()
            gradients = torch.autograd.grad(loss, list(shifts.values()))
            shifts = {
                layer: probe.ascended(shift, -gradient, scale[layer], self.options.eta, self.options.epsilon)
                for (layer, shift), gradient in zip(shifts.items(), gradients, strict=True)
            }
        return {layer: shift.detach() for layer, shift in shifts.items()}
