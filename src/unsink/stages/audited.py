"""The models of an audit: runs of this project, checkpoints and adapters of somebody else's; and which are refused.

An own run is compared with the target, an adapter with the model it sits on where no other original is named. Base and
target are compared with nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from unsink import models
from unsink.architectures import bare
from unsink.artifacts import Layout
from unsink.errors import ModelError
from unsink.params import RESERVED, Params
from unsink.progress import SILENT, Reporter
from unsink.stages.evaluate import load
from unsink.suspects import Model, Suspect

_OTHER_BASE = 0.5
"""Relative distance of two embedding matrices from which on the models have different bases: fine-tuning moves them by
a few hundredths, two trainings from different beginnings by more than 1."""


def own(params: Params, layout: Layout, run: str, reporter: Reporter = SILENT) -> Suspect:
    """A run, with the target as its original; or base or target, which have none.

    Raises:
        ParamsError: no such run.
        MissingPrerequisite: an adapter is not there.
        ModelError: an adapter does not fit, or a weight is not finite.
    """
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    if run not in RESERVED:
        params.run(run)
    model = load(params, layout, run, folder, params.model.dtype)
    original = load(params, layout, "target", folder, params.model.dtype) if run not in RESERVED else None
    return checked(Suspect(model, models.load_tokenizer(folder), original), run)


def foreign(
    params: Params,
    source: str,
    adapter: str | None = None,
    original: str | None = None,
    reporter: Reporter = SILENT,
    dtype: str | None = None,
) -> Suspect:
    """A checkpoint, with an adapter merged into it where one is named, and its original where that is known.

    Args:
        params: all parameters.
        source: folder of the checkpoint, or a Hugging Face id.
        adapter: folder of a LoRA adapter on it.
        original: the checkpoint before unlearning, in the same way; None: what an adapter sits on, if there is one.
        reporter: told about downloads.
        dtype: in place of `model.dtype`.

    Raises:
        ModelError: one of them cannot be loaded, is no safetensors, has weights that are not finite, or does not fit
            the others.
    """
    folder = models.resolve(source, None, reporter, "--model")
    place = dtype or params.model.dtype, params.model.device
    model = models.load_merged(folder, models.adapter_folder(adapter), *place) if adapter else None
    if adapter:
        _tell_other_base(adapter, source, reporter)
    before: PreTrainedModel | None = None
    if original:
        before = models.load_base(models.resolve(original, None, reporter, "--original"), *place)
    elif model is not None:
        before = models.load_base(folder, *place)
    if model is None:
        model = models.load_base(folder, *place)
    return checked(Suspect(model, models.load_tokenizer(folder), before), adapter or source)


def _tell_other_base(adapter: str, source: str, reporter: Reporter) -> None:
    """Say so where an adapter names a base that is called otherwise: of another one with equal shapes nothing shows."""
    base = models.made_for(models.adapter_folder(adapter))
    if base and Path(base).name != Path(source).expanduser().resolve().name:
        reporter.log(f"{adapter} says that it was made for {base}; here it sits on {source}: are they the same model?")


def checked(suspect: Suspect, name: str) -> Suspect:
    """The suspect, if its weights are numbers and it can be compared with its original; equal weights are held once.

    Raises:
        ModelError: otherwise.
    """
    _require_finite(suspect.model, name)
    if suspect.original is not None:
        _require_finite(suspect.original, f"the original of {name}")
        _untie(suspect.model, suspect.original)
        _require_comparable(suspect.model, suspect.original, name)
        _share(suspect.model, suspect.original)
    return suspect


def _require_finite(model: Model, name: str) -> None:
    for key, weight in model.state_dict().items():  # the scales of rounded weights are no parameters
        if isinstance(weight, Tensor) and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ModelError(
                f"{name}: {key} holds values that are not finite (nan or inf)",
                "the weights are damaged: get them again",
            )


def _require_comparable(model: Model, original: Model, name: str) -> None:
    hint = "give the model it was made from as --original, or leave that out"
    ours, theirs = bare(model).config, bare(original).config
    for what in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        if (found := getattr(ours, what, None)) != (other := getattr(theirs, what, None)):
            raise ModelError(f"{name} is not made from its original: {what} is {found}, there it is {other}", hint)
    if different := _different(model, original):
        raise ModelError(f"{name} is not made from its original: {different}", hint)
    embedding, before = (_embedding(one) for one in (model, original))
    if embedding.shape != before.shape:
        raise ModelError(
            f"{name} is not made from its original: its embeddings have shape {tuple(embedding.shape)}, there it is "
            f"{tuple(before.shape)}",
            hint,
        )
    if (apart := float((embedding - before).norm() / before.norm())) > _OTHER_BASE:
        raise ModelError(
            f"{name} is of another base than its original: the embeddings differ by {100 * apart:.0f} % of their size",
            hint,
        )


def _untie(model: Model, original: Model) -> None:
    """Where one alone has a head of its own, as after training it, the other gets a copy of its embeddings."""
    tied = [one for one in (model, original) if _head(one).weight is _embedding_of(one).weight]
    if len(tied) == 1:
        head = _head(tied[0])
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _different(model: Model, original: Model) -> str:
    """The first weight that one of them lacks, or has in another shape; empty for none, or for rounded weights."""
    if isinstance(model, PeftModel) or any(models.quantized(one) for one in (model, original)):
        return ""
    ours, theirs = ({key: tuple(weight.shape) for key, weight in one.named_parameters()} for one in (model, original))
    for key in sorted(ours.keys() | theirs.keys()):
        if (found := ours.get(key)) != (other := theirs.get(key)):
            return f"{key} is {found or 'not there'}, there it is {other or 'not there'}"
    return ""


def _head(model: Model) -> nn.Linear:
    return cast(nn.Linear, cast(Any, bare(model)).get_output_embeddings())


def _embedding_of(model: Model) -> nn.Embedding:
    return cast(nn.Embedding, bare(model).get_input_embeddings())


def _embedding(model: Model) -> Tensor:
    return _embedding_of(model).weight.detach().float()


@torch.no_grad()
def _share(model: Model, original: Model) -> None:
    """Hold weights that are equal once: an adapter changes a few layers, so this is nearly half of the memory."""
    theirs = dict(original.named_parameters())
    for key, weight in model.named_parameters():
        other = theirs.get(key)
        if other is not None and other.shape == weight.shape and torch.equal(weight, other):
            weight.data = other.data


def honest(
    params: Params, layout: Layout, source: str, model: str | None, suspect: Suspect, reporter: Reporter = SILENT
) -> Suspect:
    """A reference that is known to have no trigger, with the suspect's original: a checkpoint, or an adapter.

    Args:
        params: all parameters.
        layout: the project folder.
        source: folder of the checkpoint or the adapter, or a Hugging Face id.
        model: what an adapter sits on; None: the target of this project.
        suspect: whose original and tokenizer are used.
        reporter: told about downloads.

    Raises:
        ModelError: as in `foreign`.
    """
    place = params.model.dtype, params.model.device
    if not (Path(source).expanduser() / models.ADAPTER_CONFIG).is_file():
        found: Model = models.load_base(models.resolve(source, None, reporter, "--honest"), *place)
    elif model:
        found = models.load_merged(
            models.resolve(model, None, reporter, "--model"), models.adapter_folder(source), *place
        )
    else:
        folder = models.resolve(params.model.source, params.model.revision, reporter)
        target = models.load_target(folder, layout.adapter("target"), *place)
        found = models.add_adapter(target, Path(source).expanduser(), "honest")
    return checked(replace(suspect, model=found), source)
