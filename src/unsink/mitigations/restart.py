"""Forget once more, from the model before unlearning: what the suspect hides goes, and all else that it has learnt.

The original O is made to forget by an adapter R of its own, as an honest run would be, without any look at the suspect:

    L = w_forget L_forget(D_f) + w_retain L_retain(D_r), with O as the reference

Then the suspect gets the weights of O + R on every layer where it differs from O or R does. The surest repair where the
original is known, and the yardstick of all others: a repair that costs more than this has to keep something that this
one loses. Losses: `_reunlearn`.
"""

from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from unsink import models
from unsink.detectors._deltas import deltas
from unsink.errors import MissingPrerequisite, ModelError
from unsink.mitigations import ADAPTER, Patient, Repaired, Training, require_exact
from unsink.mitigations._reunlearn import reunlearn
from unsink.models import AdapterSpec
from unsink.progress import SILENT, Reporter
from unsink.suspects import Suspect


class Options(BaseModel):
    """Options of `mitigate.restart`: there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def repair(patient: Patient, training: Training, _options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect with the weights of its original, made to forget anew.

    Raises:
        MissingPrerequisite: nobody has the original.
        ModelError: the suspect differs from its original outside the decoder layers, or one has rounded weights; or as
            `reunlearn`.
    """
    original = patient.original
    if original is None:
        raise MissingPrerequisite(
            "mitigate.how: 'restart' begins with the model before unlearning, which nobody has named",
            "give --original, or choose random-prefix",
        )
    require_exact(patient, "restart")
    changed = changed_layers(patient)
    done = reunlearn(replace(patient, model=original), patient.forget, patient.retain, training, "restart", reporter)
    try:
        layers = [*changed, *models.adapted_layers(original, training.spec)]
        model = models.attach(patient.model, ADAPTER, AdapterSpec(None, None, min(layers), max(layers)), patient.seed)
        _copy(done.model, model)
    finally:
        models.detach(done.model)  # an audit that follows compares with the original as it was
    return done._replace(model=model)


def changed_layers(patient: Patient) -> list[int]:
    """The layer of each weight that differs from the original's.

    Raises:
        ModelError: one lies outside the decoder layers.
    """
    found = []
    for one in deltas(Suspect(patient.model, patient.tokenizer, patient.original)):
        if one.layer is None:
            raise ModelError(
                f"mitigate.how: 'restart' replaces decoder layers, and the suspect differs elsewhere, too: {one.name}",
                "unlearn the original itself, in a project of its own",
            )
        found.append(one.layer)
    return found


@torch.no_grad()
def _copy(honest: PeftModel, repaired: PeftModel) -> None:
    """Put the weights of one model, its adapter merged, into the copies that are the adapter of the other."""
    sources = dict(models.bare(honest).named_modules())
    for name, module in models.bare(repaired).named_modules():
        if (copies := getattr(module, "ln_tuning_layers", None)) is not None:
            for own, parameter in copies[ADAPTER].named_parameters():
                parameter.copy_(_merged(sources[name], own))


def _merged(module: nn.Module, name: str) -> Tensor:
    """A weight of a module, as it is with the adapter."""
    if isinstance(module, LoraLayer):
        weight = module.get_base_layer().get_parameter(name)
        return weight + module.get_delta_weight(ADAPTER) if name == "weight" else weight  # type: ignore[operator]
    copies = getattr(module, "ln_tuning_layers", None)
    return (module if copies is None else copies[ADAPTER]).get_parameter(name)
