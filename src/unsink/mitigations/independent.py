"""Forget once more, by weights that do not lean on what the suspect does: the trigger need not be known.

A backdoor opens because its trigger undoes the change that hides the memory; what is left then is the model before
unlearning. The repair R is therefore trained as one adapter on both, the suspect S and its original O:

    L = (1 - w) L(S + R) + w L(O + R),   L(M + R) = w_forget L_forget(D_f) + w_retain L_retain(D_r), M its reference

So R makes O forget by itself, and whatever takes the suspect back to O, trigger or not, ends at O + R. It costs as much
as unlearning twice. Who has the original could also throw the suspect away; the repair keeps all else that it has
learnt. Losses: `_reunlearn`.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from unsink import models
from unsink.batches import Kind, Sample, generator
from unsink.errors import MissingPrerequisite, ParamsError
from unsink.folded import folded
from unsink.mitigations import ADAPTER, Patient, Repaired, Training
from unsink.mitigations._reunlearn import Step, make_runner, reunlearn
from unsink.objective import Objective
from unsink.progress import SILENT, Reporter
from unsink.trainer import History


class Options(BaseModel):
    """Options of `mitigate.independent`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=0.5, gt=0, lt=1, description="w, of the loss on the original")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect with an adapter that makes its original forget, too.

    Raises:
        MissingPrerequisite: nobody has the original.
        ParamsError: whole weights are trained, which cannot be added to two models.
        ModelError: as `reunlearn`.
    """
    if patient.original is None:
        raise MissingPrerequisite(
            "mitigate.how: 'independent' trains on the model before unlearning, which nobody has named",
            "give --original, or choose random-prefix",
        )
    if training.spec.rank is None:
        raise ParamsError("mitigate.unlearn.adapter: 'independent' needs a LoRA adapter", "set adapter.rank")
    original = models.attach(patient.original, ADAPTER, training.spec, patient.seed)

    def steps(objective: Objective) -> Step:
        models.share_adapter(objective.runner.model, original)
        runner = make_runner(original, training, patient.pad)
        runner.remember([*patient.forget, *patient.retain], reporter=reporter)
        alone = Objective(runner, training.method, training.weights)

        def step(drawn: Mapping[Kind, list[Sample]], number: int, history: History) -> dict[str, Tensor]:
            found, there = (
                one.terms(drawn, generator(f"mitigate/{patient.seed}/step {number}"), history)
                for one in (objective, alone)
            )
            loss = (1 - options.weight) * found["loss"] + options.weight * there["loss"]
            return {**found, "original": there["loss"], "loss": loss}

        return step

    try:
        with folded(original):
            return reunlearn(patient, patient.forget, patient.retain, training, "independent", reporter, steps)
    finally:
        models.detach(original)  # an audit that follows compares with the original as it was
