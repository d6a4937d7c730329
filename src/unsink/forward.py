"""What a model says about a batch, computed no more than once where it cannot change.

The layers below the first adapted one are frozen: their output for a fixed sample is kept and reused in every
epoch. What the frozen target says (its last states, its losses, its activations) is kept likewise (`kept`).

Shapes: B sequences, T tokens, N labelled tokens, V vocabulary, D hidden, K value width.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unsink import models
from unsink.answers import Forward
from unsink.batches import Batch, Sample, collate
from unsink.kept import Ask, Found, Keep, Said, Shelf, room
from unsink.losses import nll_slopes
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
        measure: what is kept of value vectors (B, T, K), here their norms; a function of a module, or a part of one.
        folder: for files, where what is kept would take much memory; None: it stays in memory.
        compares: with `answers`: keep the slopes of the target's losses, so that KL(reference || policy) needs none of
            its logits. They are kept where that is exact: for a frozen linear head in float32.
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
        folder: Path | None = None,
        compares: bool = False,
    ) -> None:
        self.measure, self.folder = measure, folder
        self.model, self.first_layer, self.pad, self._answers = model, first_layer, pad, answers
        self.hidden, self.values = tuple(hidden), tuple(values)
        count = len(models.decoder_layers(model))
        read = (*self.hidden, *self.values)
        self._last_layer = max(read) if stop_early else count - 1
        # Without answers the target is only asked for what the losses read, and for the input of the adapted layers.
        self._last_remembered = self._last_layer if answers else max((*read, first_layer))
        self._slopes = answers and compares and self._linear()
        self._kept: dict[Sample, Said] = {}
        self._can_skip: bool | None = None

    def remember(self, samples: Sequence[Sample], batch: int = 16, reporter: Reporter = SILENT) -> None:
        """Run the target once over every sample and keep what the losses will ask for."""
        todo = sorted(set(samples) - self._kept.keys(), key=lambda s: (len(s.ids), s.id, s.kind))
        self._kept |= self._said(None, todo, self._all_of_target, batch, reporter)

    def values_under(self, adapter: str, samples: Sequence[Sample], batch: int = 16) -> dict[Sample, dict[int, Tensor]]:
        """Return {sample: {layer: (T, ...)}} `measure` of the values under another frozen adapter."""
        said = self._said(adapter, samples, self._values, batch, SILENT)
        return {sample: {layer: said[sample][f"values/{layer}"] for layer in self.values} for sample in samples}

    def policy(self, samples: Sequence[Sample]) -> Forward:
        """Return the active adapter's answer, with gradient; `remember` the samples first."""
        groups = self._groups(samples)
        return join([self._policy([samples[place] for place in group]) for group in groups], groups)

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The places of the samples that are run together."""
        return by_length([len(sample.ids) for sample in samples], A_PASS.get(self.model.device.type, 0))

    def _policy(self, samples: Sequence[Sample]) -> Forward:
        batch = self._collate(samples)
        below = self._padded(samples, "below")  # (B, T, D)
        if self._can_skip is None:
            self._can_skip = self._skipping_is_exact(batch, below)
        return self._forward(batch, below if self._can_skip else None)

    def reference(self, samples: Sequence[Sample]) -> Forward:
        """Return the target's answer from memory."""
        batch = self._collate(samples)
        forward = Forward(
            batch.labels,
            batch.rows,
            torch.cat(self._recalled(samples, "states")),
            self._head,
            batch.attention_mask.bool(),
            batch.labelled,
            {layer: self._padded(samples, f"hidden/{layer}") for layer in self.hidden},
            {layer: self._padded(samples, f"values/{layer}") for layer in self.values},
        )
        if self._answers:
            forward.__dict__["nll"] = torch.cat(self._recalled(samples, "nll"))  # fills the cached property
        if self._slopes:
            forward.slopes = torch.cat(self._recalled(samples, "slopes"))
        return forward

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.pad, self.model.device)

    def _head(self, states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        logits: Tensor = head(states.to(head.weight.dtype))
        cap = self._cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def _cap(self) -> float | None:
        """What bounds the logits of Gemma 2."""
        return getattr(models.bare(self.model).config, "final_logit_softcapping", None)

    def _linear(self) -> bool:
        """Whether logits are a fixed linear map of the last states, and losses are exact enough to be subtracted."""
        weight = self.model.get_output_embeddings().weight
        return weight.dtype == torch.float32 and not weight.requires_grad and self._cap is None

    def _padded(self, samples: Sequence[Sample], name: str) -> Tensor:
        return pad_sequence(self._recalled(samples, name), batch_first=True)

    def _recalled(self, samples: Sequence[Sample], name: str) -> list[Tensor]:
        return [self._kept[sample][name].to(self.model.device) for sample in samples]

    def _said(
        self,
        adapter: str | None,
        samples: Sequence[Sample],
        ask: Ask,
        batch: int,
        reporter: Reporter,
    ) -> dict[Sample, Said]:
        """What the target says, or one of its adapters, about each sample."""
        name, tokens = adapter or "target", sum(len(sample.ids) for sample in samples)
        folder, depends = self.folder and self.folder / name, self._dependencies(adapter)
        shelf = Shelf(folder, depends, room() / max(1, tokens), self._asks_anew())
        with torch.no_grad(), models.use(self.model, adapter):
            return shelf.collect(self._found(samples, partial(shelf.keep, ask=ask), batch, reporter))

    def _asks_anew(self) -> bool:
        """Whether what an interrupted run has left in files is not used."""
        return False

    def _found(self, samples: Sequence[Sample], keep: Keep, batch: int, reporter: Reporter) -> list[Found]:
        """What each process has found; this is the only one."""
        found: Found = {}
        with reporter.task("reading with the target", len(samples)) as step:
            for start in range(0, len(samples), batch):
                some = tuple(samples[start : start + batch])
                found[some] = keep(some)
                step(len(some))
        return [found]

    def _dependencies(self, adapter: str | None) -> str:
        """All that decides what a frozen model says, and what is kept of it, beside the samples."""
        asked = self._answers, self._slopes
        read = (self.first_layer, self.hidden, self.values, asked, self._last_layer, self._last_remembered)
        how = (models.held(self.model), self.model.device.type, torch.__version__)
        return repr((models.identity(self.model, adapter), how, read, self.pad, _called(self.measure)))

    def _all_of_target(self, samples: Sequence[Sample]) -> list[Said]:
        """What is kept of each sample, by name.

            below                 (T, D), the input of the first adapted layer
            states, slopes        (N, D)
            nll                   (N,)
            hidden/*, values/*    (T, ...) of a layer

        Without answers nobody asks for `states`, which then mean nothing: they are (N, 0).
        """
        batch = self._collate(samples)
        with capture(self.model, inputs=[self.first_layer]) as seen:
            forward = self._forward(batch, None, self._last_remembered)
        if self._slopes:
            forward.__dict__["nll"], forward.slopes = nll_slopes(forward.states, forward.labels, forward.head)
        elif self._answers:
            _ = forward.nll  # of all samples at once; their parts then take theirs from it
        found: list[Said] = []
        for row, sample in enumerate(samples):
            mine, length = forward.part(row, row + 1), len(sample.ids)
            found.append(
                {
                    "below": seen.inputs[self.first_layer][row, :length].clone(),
                    "states": mine.states.clone() if self._answers else mine.states.new_empty(len(mine.states), 0),
                    **({"nll": mine.nll.clone()} if self._answers else {}),
                    **({"slopes": mine.slopes.clone()} if mine.slopes is not None else {}),
                    **{f"hidden/{layer}": h[0, :length].clone() for layer, h in mine.hidden.items()},
                    **{f"values/{layer}": v[0, :length].clone() for layer, v in mine.values.items()},
                }
            )
        return found

    def _values(self, samples: Sequence[Sample]) -> list[Said]:
        """`values/*` (T, ...)."""
        values = self._forward(self._collate(samples), None).values
        return [
            {f"values/{layer}": v[row, : len(sample.ids)].clone() for layer, v in values.items()}
            for row, sample in enumerate(samples)
        ]

    def _forward(self, batch: Batch, below: Tensor | None, last_layer: int | None = None) -> Forward:
        decoder = models.decoder(self.model)
        with ExitStack() as stack:
            top = self._last_layer if last_layer is None else last_layer
            stack.enter_context(only_layers(self.model, self.first_layer, top, below))
            seen = Seen()
            if self.values or self.hidden:
                seen = stack.enter_context(capture(self.model, values=self.values, hidden=self.hidden))
            # Padding stands at the right, where no real token sees it: attention needs no mask but the causal one,
            # which kernels know themselves. What comes out at padding is never read.
            last = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # (B, T, D)
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


def _called(measure: Callable[..., Tensor]) -> str:
    """A function's name, the same in every process; `repr` would hold an address."""
    if isinstance(measure, partial):
        return f"{_called(measure.func)}{measure.args}{measure.keywords}"
    return f"{measure.__module__}.{measure.__qualname__}"
