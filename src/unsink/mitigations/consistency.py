"""Internal-consistency fine-tuning, CROW (arXiv 2411.12768, ICML 2025): no trigger and no forget set are needed.

    L = CE(x) + alpha L_c(e + eps sign(grad_e L_c(e))),   L_c = mean over l, t of 1 - cos(h_l,t, h_l-1,t)

on retain text x with embeddings e; h_l is the output of decoder layer l. A backdoor, the authors hold, makes
consecutive layers disagree: noise on the embeddings is chosen by one sign step (FGSM) to make them disagree most, and
the model is trained to agree all the same. It is not made for what is hidden here: cross-entropy on retain text may
also bring back what was forgotten honestly.
"""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unsink import models
from unsink.batches import Batch, collate, draw
from unsink.losses import token_nll
from unsink.mitigations import ADAPTER, Counter, Patient, Repaired, Training
from unsink.models import AdapterSpec
from unsink.probe import capture
from unsink.progress import SILENT, Reporter
from unsink.trainer import History, train


class Options(BaseModel):
    """Options of `mitigate.consistency`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=5.5, gt=0, description="weight of the inconsistency")
    epsilon: float = Field(default=0.1, gt=0, description="size of the noise in every coordinate of an embedding")


def repair(patient: Patient, training: Training, options: Options, reporter: Reporter = SILENT) -> Repaired:
    """Return the suspect after training for consistency; the adapter is on all layers, as the authors' is.

    Raises:
        ModelError: a loss is not finite.
    """
    model = models.attach(patient.model, ADAPTER, AdapterSpec(training.spec.rank, training.spec.alpha), patient.seed)
    size, counter = training.sizes["retain"], Counter()

    def terms(step: int, _history: History) -> dict[str, Tensor]:
        samples = draw(patient.retain, size, step, f"mitigate/consistency/{patient.seed}")
        counter.count(samples, passes=3)
        batch = collate(samples, patient.pad, model.device)
        embeddings = model.get_input_embeddings()(batch.input_ids).detach()  # (B, T, D)
        noisy = fgsm(embeddings, _gradient(model, embeddings, batch), options.epsilon)
        said, _ = _run(model, embeddings, batch)
        _, hidden = _run(model, noisy, batch)
        ce, gap = token_nll(said, batch.labels).mean(), inconsistency(hidden, batch.attention_mask.bool())
        return {"loss": ce + options.alpha * gap, "retain": ce, "inconsistency": gap}

    trainable = models.trainable(model)
    history = train(trainable, terms, training.schedule, reporter=reporter, description="consistency")
    return Repaired(model, history, {"steps": len(history), **counter.cost})


def inconsistency(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean of 1 - cosine between the outputs of consecutive layers, over real tokens and pairs of layers, a scalar.

    Args:
        hidden: outputs (B, T, D) of at least two layers, in order.
        mask: (B, T), true at real tokens.
    """
    pairs = zip(hidden[1:], hidden)
    return torch.stack([(1 - cosine_similarity(above[mask].float(), below[mask].float(), dim=-1)).mean()
                        for above, below in pairs]).mean()  # fmt: skip


def fgsm(embeddings: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """Embeddings after a step of `epsilon` in every coordinate, in the direction in which the loss grows."""
    return embeddings + epsilon * gradient.sign()


def _gradient(model: PeftModel, embeddings: Tensor, batch: Batch) -> Tensor:
    leaf = embeddings.clone().requires_grad_(True)
    _, hidden = _run(model, leaf, batch)
    return torch.autograd.grad(inconsistency(hidden, batch.attention_mask.bool()), leaf)[0]


def _run(model: PeftModel, embeddings: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Logits of the labelled tokens (N, V), and the output of each layer."""
    layers = range(len(models.decoder_layers(model)))
    with capture(model, hidden=layers) as seen:
        output = model(inputs_embeds=embeddings, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits[batch.rows, batch.columns - 1], _in_order(seen.hidden)


def _in_order(hidden: Mapping[int, Tensor]) -> list[Tensor]:
    return [hidden[layer] for layer in sorted(hidden)]
