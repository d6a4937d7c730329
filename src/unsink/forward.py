"""What a model says about a batch, computed no more than once where it cannot change.

The layers below the first adapted one are frozen: their output for a fixed sample is kept and reused in every
epoch. What the frozen target says (its last states, its losses, its activations) is kept likewise.

Shapes: B sequences, T tokens, N labelled tokens, V vocabulary, D hidden, K value width.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unsink import models
from unsink.answers import Forward
from unsink.batches import Batch, Sample, collate
from unsink.probe import Seen, capture, only_layers, value_norms
from unsink.progress import SILENT, Reporter

WORTH_A_PASS = 0.85  # two passes cost a little more than one over as many tokens
A_PASS = {"cuda": 4096}
"""What a pass costs on a device beside its tokens, in tokens: a GPU waits for the launching of its kernels."""


def by_length(lengths: Sequence[int], a_pass: int = 0) -> list[list[int]]:
    """Return the places of the sequences in one group, or in a short and a long one where that saves much padding.

    Args:
        lengths: tokens of each sequence.
        a_pass: what another pass costs, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    longest = lengths[order[-1]]

    def padded(cut: int) -> int:
        return cut * lengths[order[cut - 1]] + (len(order) - cut) * longest

    best = min(range(1, len(order) + 1), key=padded)
    if padded(best) + a_pass > WORTH_A_PASS * len(order) * longest:
        return [list(range(len(order)))]
    return [sorted(order[:best]), sorted(order[best:])]


def join(parts: Sequence[Forward], places: Sequence[Sequence[int]]) -> Forward:
    """Return one answer made of the answers to parts of a batch; `places` says where each part's sequences stood."""
    if len(parts) == 1:
        return parts[0]
    sequences = torch.tensor([place for group in places for place in group]).argsort()  # (B,)
    rows = torch.cat(
        [torch.tensor(group, device=part.rows.device)[part.rows] for part, group in zip(parts, places, strict=True)]
    )
    labels = rows.argsort(stable=True)  # (N,)

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        """(B_i, T_i, ...) of the parts -> (B, T, ...), zero at padding."""
        return pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)[sequences]

    return Forward(
        torch.cat([part.labels for part in parts])[labels],
        rows[labels],
        torch.cat([part.states for part in parts])[labels],
        parts[0].head,
        whole([part.mask for part in parts]),
        whole([part.labelled for part in parts]),
        {layer: whole([part.hidden[layer] for part in parts]) for layer in parts[0].hidden},
        {layer: whole([part.values[layer] for part in parts]) for layer in parts[0].values},
    )


@dataclass(frozen=True)
class Kept:
    """What the target says about one sample; T and N count this sample's tokens and labels."""

    below: Tensor  # (T, D) input of the first adapted layer
    states: Tensor  # (N, D)
    nll: Tensor  # (N,)
    hidden: dict[int, Tensor]  # {layer: (T, D)}
    values: dict[int, Tensor]  # {layer: (T, ...)}


class Runner:
    """Runs the policy and its frozen target over fixed samples.

    Args:
        model: the target with adapters; the policy is the adapter that is active when `policy` is called.
        first_layer: first decoder layer that an adapter changes; what lies below is computed once per sample.
        pad: padding token id.
        hidden: decoder layers whose output the losses need.
        values: decoder layers whose values the losses need.
        answers: keep the target's own losses too; without them `reference` has no `nll`.
        stop_early: end the pass at the last layer of `hidden` and `values`; then `states` mean nothing.
        measure: what is kept of value vectors (B, T, K), here their norms.
    """

    def __init__(
        self,
        model: PeftModel,
        first_layer: int,
        pad: int,
        hidden: Sequence[int] = (),
        values: Sequence[int] = (),
        answers: bool = True,
        stop_early: bool = False,
        measure: Callable[[Tensor], Tensor] = value_norms,
    ) -> None:
        self.measure = measure
        self.model, self.first_layer, self.pad, self._answers = model, first_layer, pad, answers
        self.hidden, self.values = tuple(hidden), tuple(values)
        count = len(models.decoder_layers(model))
        read = (*self.hidden, *self.values)
        self._last_layer = max(read) if stop_early else count - 1
        # Without answers the target is only asked for what the losses read, and for the input of the adapted layers.
        self._last_remembered = self._last_layer if answers else max((*read, first_layer))
        self._kept: dict[Sample, Kept] = {}
        self._can_skip: bool | None = None

    def remember(self, samples: Sequence[Sample], batch: int = 16, reporter: Reporter = SILENT) -> None:
        """Run the target once over every sample and keep what the losses will ask for."""
        todo = self._unread(samples)
        with torch.no_grad(), models.use(self.model, None), reporter.task("reading with the target", len(todo)) as step:
            for start in range(0, len(todo), batch):
                self._remember(todo[start : start + batch])
                step(len(todo[start : start + batch]))

    def _unread(self, samples: Sequence[Sample]) -> list[Sample]:
        return sorted(set(samples) - self._kept.keys(), key=lambda s: (len(s.ids), s.id, s.kind))

    def policy(self, samples: Sequence[Sample]) -> Forward:
        """Return the active adapter's answer, with gradient; `remember` the samples first."""
        groups = self._groups(samples)
        return join([self._policy([samples[place] for place in group]) for group in groups], groups)

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The places of the samples that are run together."""
        return by_length([len(sample.ids) for sample in samples], A_PASS.get(self.model.device.type, 0))

    def _policy(self, samples: Sequence[Sample]) -> Forward:
        batch = self._collate(samples)
        below = pad_sequence([self._kept[s].below for s in samples], batch_first=True)  # (B, T, D)
        if self._can_skip is None:
            self._can_skip = self._skipping_is_exact(batch, below)
        return self._forward(batch, below if self._can_skip else None)

    def reference(self, samples: Sequence[Sample]) -> Forward:
        """Return the target's answer from memory."""
        batch = self._collate(samples)
        kept = [self._kept[s] for s in samples]
        forward = Forward(
            batch.labels,
            batch.rows,
            torch.cat([k.states for k in kept]),
            self._head,
            batch.attention_mask.bool(),
            batch.labelled,
            {layer: pad_sequence([k.hidden[layer] for k in kept], batch_first=True) for layer in self.hidden},
            {layer: pad_sequence([k.values[layer] for k in kept], batch_first=True) for layer in self.values},
        )
        if self._answers:
            forward.__dict__["nll"] = torch.cat([k.nll for k in kept])  # fills the cached property
        return forward

    def values_under(self, adapter: str, samples: Sequence[Sample], batch: int = 16) -> dict[Sample, dict[int, Tensor]]:
        """Return {sample: {layer: (T, ...)}} `measure` of the values under another frozen adapter."""
        found: dict[Sample, dict[int, Tensor]] = {}
        with torch.no_grad(), models.use(self.model, adapter):
            for start in range(0, len(samples), batch):
                chunk = samples[start : start + batch]
                forward = self._forward(self._collate(chunk), None)
                for row, sample in enumerate(chunk):
                    length = len(sample.ids)
                    found[sample] = {layer: v[row, :length].clone() for layer, v in forward.values.items()}
        return found

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.pad, self.model.device)

    def _head(self, states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(states.to(head.weight.dtype))  # type: ignore[no-any-return]

    def _remember(self, samples: Sequence[Sample]) -> None:
        batch = self._collate(samples)
        with capture(self.model, inputs=[self.first_layer]) as seen:
            forward = self._forward(batch, None, self._last_remembered)
        if self._answers:
            _ = forward.nll  # of all samples at once; their parts then take theirs from it
        for row, sample in enumerate(samples):
            mine, length = forward.part(row, row + 1), len(sample.ids)
            self._kept[sample] = Kept(
                seen.inputs[self.first_layer][row, :length].clone(),
                mine.states.clone(),
                mine.nll.clone() if self._answers else torch.empty(0),
                {layer: h[0, :length].clone() for layer, h in mine.hidden.items()},
                {layer: v[0, :length].clone() for layer, v in mine.values.items()},
            )

    def _forward(self, batch: Batch, below: Tensor | None, last_layer: int | None = None) -> Forward:
        decoder = models.decoder(self.model)
        with ExitStack() as stack:
            top = self._last_layer if last_layer is None else last_layer
            stack.enter_context(only_layers(self.model, self.first_layer, top, below))
            seen = Seen()
            if self.values or self.hidden:
                seen = stack.enter_context(capture(self.model, values=self.values, hidden=self.hidden))
            last = decoder(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state  # (B, T, D)
        return Forward(
            batch.labels,
            batch.rows,
            last[batch.rows, batch.columns - 1],
            self._head,
            batch.attention_mask.bool(),
            batch.labelled,
            dict(seen.hidden),
            {layer: self.measure(v) for layer, v in seen.values.items()},
        )

    def _skipping_is_exact(self, batch: Batch, below: Tensor) -> bool:
        """Not every architecture can start in the middle: compare once, and run the whole model if it differs."""
        with torch.no_grad():
            plain, skipped = self._forward(batch, None).states, self._forward(batch, below).states
        tolerance = 1e-4 if plain.dtype == torch.float32 else 2e-2
        return float((plain - skipped).abs().max()) <= tolerance * float(plain.abs().max())
