"""What happens to models after they were unlearned: weights are rounded, and training goes on.

Each function changes a model in place. The model is in float32 with its adapter merged, so that what is rounded or
trained is what would be deployed.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unsink import models, processes
from unsink.architectures import architecture
from unsink.batches import Sample, draw
from unsink.forward import Runner
from unsink.models import AdapterSpec
from unsink.progress import SILENT, Reporter
from unsink.trainer import Schedule, train

GROUP = 64
"""Inputs that share a scale at four bits, as in bitsandbytes."""
BATCH = 6


def rounded(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The nearest weights (out, in) on a symmetric grid, round(w / s) s with s = max |w| / (2^(bits - 1) - 1).

    Args:
        weight: (out, in).
        bits: of the integers.
        group: inputs that share a scale; None: all of an output. A last group may be shorter.
    """
    largest = 2 ** (bits - 1) - 1
    parts = []
    for part in torch.split(weight, group or weight.shape[1], dim=1):
        scale = (part.abs().amax(dim=1, keepdim=True) / largest).clamp_min(torch.finfo(weight.dtype).tiny)
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> None:
    """Round the weights of all linear modules of the decoder layers; embeddings, norms and head stay.

    Eight bits have one scale per output, four and fewer one per `GROUP` inputs. The weights are kept as float32: what
    is measured is the rounding, not the speed of an integer kernel.
    """
    row = architecture(model.config)
    for layer in models.decoder_layers(model):
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in row.linear:
                weight: Tensor = module.weight
                turned = weight.T if row.transposed else weight
                found = rounded(turned, bits, GROUP if bits <= 4 else None)
                weight.copy_(found.T if row.transposed else found)


def train_further(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    steps: int,
    *,
    lr: float,
    rank: int,
    pad: int,
    seed: int,
    reporter: Reporter = SILENT,
    description: str = "training",
) -> PreTrainedModel:
    """Return the model after ordinary training on some text: mean NLL of `BATCH` samples a step, LoRA on all layers.

    Raises:
        ModelError: a loss is not finite.
    """
    peft = models.attach(model, "further", AdapterSpec(rank, 2 * rank), seed)
    runner = Runner(peft, 0, pad, answers=False)
    runner.remember(samples)

    def loss(step: int, _: object) -> dict[str, Tensor]:
        """Its part of it: every process has the whole batch, and the trainer adds their gradients up."""
        whole = runner.policy(draw(samples, BATCH, step, f"further/{seed}")).nll.mean()
        return {"loss": whole / processes.count()}

    train(
        models.trainable(peft),
        loss,
        Schedule(steps, lr, warmup=0),
        reporter=reporter,
        description=description,
    )
    return cast(PreTrainedModel, cast(Any, peft).merge_and_unload())
