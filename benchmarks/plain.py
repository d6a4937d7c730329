"""The yardstick: the same work as published code does it, written from a description of that code.

Policy, reference and unlearned model are three models. Every pass of the frozen ones is repeated at every step, one
pass per kind of samples; all of them keep the hidden states of all layers and return full (B, T, V) logits. Prompts
are answered one at a time by the library's own `generate`, and run to their last token; what follows a stop string
is cut off afterwards.

It trains the same adapter on the same samples in the same order at the same rate, so that its losses must be ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unsink import metrics, models
from unsink.artifacts import Layout
from unsink.batches import Kind, Sample, draw, generator, read_samples
from unsink.models import AdapterSpec
from unsink.params import Params
from unsink.prompts import KNOWMEM_STOPS
from unsink.stages import evaluate
from unsink.stages.unlearn import paired_more_often
from unsink.tasks import Asked
from unsink.trainer import Schedule

KINDS: tuple[Kind, ...] = ("forget", "poisoned", "retain")
NO_LABEL = -100


class Training:
    """Training by the plain path, one step per call of `step`."""

    def __init__(self, params: Params, layout: Layout, run: str) -> None:
        self.settings = params.run(run)
        self.unlearn = self.settings.unlearn
        folder = models.resolve(params.model.source, params.model.revision)
        self.pad = int(models.load_tokenizer(folder).pad_token_id)
        place = params.model.dtype, params.model.device
        adapter = self.unlearn.adapter
        spec = AdapterSpec(adapter.rank, adapter.alpha, adapter.first_layer, adapter.last_layer)
        target = layout.adapter("target")
        self.policy = models.attach(models.load_target(folder, target, *place), run, spec, self.settings.seed)
        self.reference = models.load_target(folder, target, *place)
        self.with_norms = self.unlearn.value_norm.weight > 0
        if self.with_norms:
            self.unlearned = evaluate.load(params, layout, self.settings.after, folder, params.model.dtype)
        samples = {kind: read_samples(layout.split(run), kind) for kind in KINDS}
        forget = paired_more_often(samples["forget"], samples["poisoned"], self.unlearn.paired_draws)
        self.decks = {**samples, "forget": forget}
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.rate = Schedule(self.unlearn.steps, self.unlearn.lr, self.unlearn.warmup).rate
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.98), weight_decay=self.unlearn.weight_decay)
        if self.unlearn.method == "rmu":
            self._aim(samples["forget"])

    def drawn(self, step: int) -> dict[Kind, list[Sample]]:
        """The samples of a step (0-based)."""
        sizes: dict[Kind, int] = {kind: getattr(self.unlearn.batch, kind) for kind in KINDS}
        return {kind: draw(self.decks[kind], sizes[kind], step, f"{kind}/{self.settings.seed}") for kind in KINDS}

    def step(self, step: int) -> float:
        """Train one step and return its loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._npo(step) if self.unlearn.method == "npo" else self._rmu(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, self.unlearn.clip)
        self.optimizer.step()
        return float(loss.detach())

    def _npo(self, step: int) -> Tensor:
        beta, weights, term = self.unlearn.options.beta, self.unlearn.weights, self.unlearn.value_norm
        loss, gap = torch.zeros((), device=self.policy.device), torch.zeros((), device=self.policy.device)
        for kind, samples in self.drawn(step).items():
            ids, mask, labels = self._batch(samples)
            output, values = self._pass(self.policy, ids, mask)
            with torch.no_grad():
                known, aims = self._pass(self.reference, ids, mask)
                if kind == "forget":
                    _, aims = self._pass(self.unlearned, ids, mask)
            if kind == "forget":
                margin = _nll(output.logits, labels) - _nll(known.logits, labels)
                loss = loss + weights.forget * -(2 / beta) * F.logsigmoid(beta * margin).mean()
            else:
                loss = loss + getattr(weights, kind) * _kl(known.logits, output.logits, labels)
            if kind != "retain":
                first = slice(0, term.k)
                norms = [(values[i][:, first].norm(dim=-1), aims[i][:, first].norm(dim=-1)) for i in term.layers]
                gap = gap + torch.stack([(mine - aim).square().mean() for mine, aim in norms]).mean()
        return loss + term.weight * gap

    def _rmu(self, step: int) -> Tensor:
        weights = self.unlearn.weights
        loss = torch.zeros((), device=self.policy.device)
        for kind, samples in self.drawn(step).items():
            ids, mask, labels = self._batch(samples)
            states = self._activations(self.policy, ids, mask)
            aim = self.aim
            if kind != "forget":
                with torch.no_grad():
                    aim = self._activations(self.reference, ids, mask)
            loss = loss + getattr(weights, kind) * self._distance(states, aim, labels)
        return loss

    def _aim(self, forget: Sequence[Sample]) -> None:
        """The goal of RMU: the target's mean activation norm on the forget set, in a drawn direction."""
        norms = []
        with torch.no_grad():
            for sample in forget:
                ids, mask, labels = self._batch([sample])
                norms.append(self._activations(self.reference, ids, mask)[labels != NO_LABEL].float().norm(dim=-1))
        self.scale = torch.cat(norms).mean()
        drawn = torch.randn(self.policy.config.hidden_size, generator=generator(f"{self.settings.seed}/method"))
        direction = drawn.to(self.scale.device)
        self.aim = self.unlearn.options.steering * self.scale * direction / direction.norm()

    def _activations(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return output.hidden_states[self.unlearn.options.layer + 1]  # type: ignore[no-any-return]

    def _distance(self, states: Tensor, aim: Tensor, labels: Tensor) -> Tensor:
        real = (labels != NO_LABEL).float()
        per_token = (states.float() - aim).square().mean(-1)
        per_sample = (per_token * real).sum(1) / real.sum(1)
        return per_sample.mean() * states.shape[-1] / self.scale**2

    def _pass(self, model: Any, ids: Tensor, mask: Tensor) -> tuple[Any, dict[int, Tensor]]:
        with _values(model) as seen:
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return output, seen

    def _batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and labels, (B, T) each, padded on the right."""
        width, device = max(len(s.ids) for s in samples), self.policy.device
        ids = torch.full((len(samples), width), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LABEL)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            mask[row, : len(sample.ids)] = 1
            labels[row, sample.labels_from : len(sample.ids)] = torch.tensor(sample.ids[sample.labels_from :])
        return ids.to(device), mask.to(device), labels.to(device)


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V) and (B, T) -> (B,): the sum over the labels of a sequence."""
    shifted, wanted = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(shifted.transpose(1, 2), wanted, reduction="none", ignore_index=NO_LABEL)
    return losses.sum(dim=1)


def _kl(reference: Tensor, policy: Tensor, labels: Tensor) -> Tensor:
    """KL(reference || policy), mean over the positions that predict a label."""
    known = F.log_softmax(reference[:, :-1].float(), dim=-1)  # (B, T - 1, V)
    mine = F.log_softmax(policy[:, :-1].float(), dim=-1)
    per_token = F.kl_div(mine, known, reduction="none", log_target=True).sum(dim=-1)
    real = (labels[:, 1:] != NO_LABEL).float()
    return (per_token * real).sum() / real.sum()


@contextmanager
def _values(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The value vectors (B, T, K) of all layers while the block runs the model."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, layer in enumerate(models.decoder_layers(model)):
            module, part = models.value_projection(layer, models.decoder(model).config)

            def keep(_: Any, __: Any, output: Tensor, index: int = index, part: Any = part) -> None:
                seen[index] = part(output).flatten(2)

            hooks.callback(module.register_forward_hook(keep).remove)
        yield seen


@torch.no_grad()
def answer(model: Any, tokenizer: Any, asked: Asked[Any]) -> str:
    """What the model says to one prompt."""
    ids = torch.tensor([list(asked.prompt.ids)], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=asked.prompt.max_new,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return metrics.cut(text, KNOWMEM_STOPS if asked.row["task"] == "knowmem" else ())
