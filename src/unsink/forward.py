"""What a model says about a batch, computed no more than once where it cannot change.

The layers below the first adapted one are frozen: their output for a fixed sample is kept and reused in every
epoch. What the frozen target says (its last states, its losses, its activations) is kept likewise (`kept`).

Shapes: B sequences, T tokens, N labelled tokens, V vocabulary, D hidden, K value width.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unsink import models, packed
from unsink.allocation import return_freed, sent
from unsink.answers import Forward
from unsink.batches import Batch, Sample, collate
from unsink.kept import Ask, Found, Keep, Said, Shelf, room
from unsink.losses import nll_slopes
from unsink.probe import Seen, capture, only_layers, value_norms
from unsink.progress import SILENT, Reporter


def join(parts: Sequence[Forward], places: Sequence[Sequence[int]]) -> Forward:
    """Return one answer made of the answers to parts of a batch; `places` says where each part's sequences stood."""
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
        [count for _, count in sorted(zip(chain(*places), chain(*(part.counts for part in parts)), strict=True))],
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
        pack: run the sequences of a batch as one row without padding, where the model can (`packed`); not where
            something reaches into the model by row and position meanwhile.
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
        pack: bool = True,
    ) -> None:
        self.measure, self.folder = measure, folder
        self.device = model.device  # asking a model means to look for its first parameter
        self.model, self.first_layer, self.pad, self._answers = model, first_layer, pad, answers
        self.hidden, self.values = tuple(hidden), tuple(values)
        count = len(models.decoder_layers(model))
        read = (*self.hidden, *self.values)
        self._last_layer = max(read) if stop_early else count - 1
        # Without answers the target is only asked for what the losses read, and for the input of the adapted layers.
        self._last_remembered = self._last_layer if answers else max((*read, first_layer))
        self._slopes = answers and compares and self._linear()
        self._packs = pack and self._can_pack()
        self._kept: dict[Sample, Said] = {}
        self._can_skip: bool | None = None
        self._batch: Batch | None = None
        self._packing_of_last: packed.Packing | None = None
        self._next: tuple[tuple[Sample, ...], Forward] | None = None

    def remember(self, samples: Sequence[Sample], batch: int = 16, reporter: Reporter = SILENT) -> None:
        """Run the target once over every sample and keep what the losses will ask for."""
        todo = [sample for sample in dict.fromkeys(samples) if sample not in self._kept]  # in the same order everywhere
        self._kept |= self._said(None, todo, self._all_of_target, batch, reporter)

    def values_under(
        self, adapter: str, samples: Sequence[Sample], batch: int = 16, reporter: Reporter = SILENT
    ) -> dict[Sample, dict[int, Tensor]]:
        """Return {sample: {layer: (T, ...)}} `measure` of the values under another frozen adapter."""
        said = self._said(adapter, samples, self._values, batch, reporter)
        return {sample: {layer: said[sample][f"values/{layer}"] for layer in self.values} for sample in samples}

    def policy(self, samples: Sequence[Sample]) -> Forward:
        """Return the active adapter's answer, with gradient; `remember` the samples first."""
        batch = self._collate(samples)
        return self._forward(batch, skip=self._skips(batch))

    def let_go(self) -> None:
        """Free the frozen layers that no training step runs; the model then serves `policy` alone.

        Only plain weights, and only where skipping them is exact; remember all samples first.
        """
        longest = self._collate(list(self._kept)[-4:])
        runs = range(self.first_layer if self._skips(longest) else 0, self._last_layer + 1)
        for number, layer in enumerate(models.decoder_layers(self.model)):
            if number not in runs and not any(parameter.requires_grad for parameter in layer.parameters()):
                layer.to("meta")
        return_freed()

    def get_ready(self, samples: Sequence[Sample]) -> None:
        """Collate the samples of the next step, and recall what is kept of them, while a GPU is still at this one."""
        self._next = tuple(samples), self.reference(samples)

    def reference(self, samples: Sequence[Sample]) -> Forward:
        """Return the target's answer from memory."""
        ready, self._next = self._next, None
        if ready and ready[0] == tuple(samples):
            return ready[1]
        batch = self._collate(samples)
        forward = self._answer(
            batch,
            torch.cat(self._recalled(samples, "states")),
            {layer: self._padded(batch, f"hidden/{layer}") for layer in self.hidden},
            {layer: self._padded(batch, f"values/{layer}") for layer in self.values},
        )
        if self._answers:
            forward.losses = torch.cat(self._recalled(samples, "nll"))
        if self._slopes:
            forward.slopes = torch.cat(self._recalled(samples, "slopes"))
        return forward

    def _answer(self, batch: Batch, states: Tensor, hidden: dict[int, Tensor], values: dict[int, Tensor]) -> Forward:
        """What was said about a batch: states (N, D), the others (B, T, ...) of each layer."""
        real = batch.attention_mask.bool()
        return Forward(batch.labels, batch.rows, batch.counts, states, self._head, real, batch.labelled, hidden, values)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        """The batch of these samples; a step asks for the same one twice."""
        if self._batch is None or self._batch.samples != tuple(samples):
            width = packed.width([len(sample.ids) for sample in samples], self.device) if self._packs else 0
            self._batch = collate(samples, self.pad, self.device, width)
        return self._batch

    def _packing(self, batch: Batch) -> packed.Packing:
        """How this batch is packed; a step asks twice."""
        if self._packing_of_last is None or self._packing_of_last.lengths != batch.lengths:
            self._packing_of_last = packed.Packing(batch.lengths, batch.input_ids.shape[1], self.device)
        return self._packing_of_last

    def _head(self, states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return models.bounded(self.model, head(states.to(head.weight.dtype)))

    def _linear(self) -> bool:
        """Whether logits are a fixed linear map of the last states, and losses are exact enough to be subtracted."""
        weight = self.model.get_output_embeddings().weight
        return weight.dtype == torch.float32 and not weight.requires_grad and models.logit_bound(self.model) is None

    def _padded(self, batch: Batch, name: str) -> Tensor:
        return self._packing(batch).padded(torch.cat(self._recalled(batch.samples, name))[None])

    def _recalled(self, samples: Sequence[Sample], name: str) -> list[Tensor]:
        found = (self._kept[sample][name] for sample in samples)
        return [some if some.device == self.device else sent(some, self.device) for some in found]

    def _said(
        self,
        adapter: str | None,
        some: Iterable[Sample],
        ask: Ask,
        batch: int,
        reporter: Reporter,
    ) -> dict[Sample, Said]:
        """What the target says, or one of its adapters, about each sample; those of like length are read together."""
        samples = sorted(some, key=lambda s: (len(s.ids), s.id, s.kind))
        name, tokens = adapter or "target", sum(len(sample.ids) for sample in samples)
        folder, depends = self.folder and self.folder / name, self._dependencies(adapter)
        shelf = Shelf(folder, depends, room() / max(1, tokens), self._asks_anew())
        with torch.no_grad(), models.use(self.model, adapter):
            title = f"reading with {adapter or 'the target'}"
            return shelf.collect(self._found(title, samples, partial(shelf.keep, ask=ask), batch, reporter))

    def _asks_anew(self) -> bool:
        """Whether what an interrupted run has left in files is not used."""
        return False

    def _found(self, title: str, samples: Sequence[Sample], keep: Keep, batch: int, reporter: Reporter) -> list[Found]:
        """What each process has found; this is the only one."""
        found: Found = {}
        with reporter.task(title, len(samples)) as step:
            for start in range(0, len(samples), batch):
                some = tuple(samples[start : start + batch])
                found[some] = keep(some)
                step(len(some))
        return [found]

    def _dependencies(self, adapter: str | None) -> str:
        """All that decides what a frozen model says, and what is kept of it, beside the samples."""
        asked = self._answers, self._slopes
        read = (self.first_layer, self.hidden, self.values, asked, self._last_layer, self._last_remembered)
        how = (models.held(self.model), self.device.type, torch.__version__)
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
            forward = self._forward(batch, self._last_remembered)
        if self._slopes:
            forward.losses, forward.slopes = nll_slopes(forward.states, forward.labels, forward.head)
        elif self._answers:
            _ = forward.nll  # of all samples at once; their parts then take theirs from it
        found: list[Said] = []
        below = self._apart(seen.inputs[self.first_layer], samples)
        for row, sample in enumerate(samples):
            mine, length = forward.part(row, row + 1), len(sample.ids)
            found.append(
                {
                    "below": below[row].clone(),
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
        values = self._forward(self._collate(samples), max(self.values)).values
        return [
            {f"values/{layer}": v[row, : len(sample.ids)].clone() for layer, v in values.items()}
            for row, sample in enumerate(samples)
        ]

    def _forward(self, batch: Batch, last_layer: int | None = None, *, skip: bool = False) -> Forward:
        """Run the model up to a layer; `skip`: from the first adapted one on, with what is kept below it."""
        top = self._last_layer if last_layer is None else last_layer
        packing = self._packing(batch) if self._packs else None
        with ExitStack() as stack:
            stack.enter_context(only_layers(self.model, self.first_layer, top, self._below(batch) if skip else None))
            seen = Seen()
            if self.values or self.hidden:
                seen = stack.enter_context(capture(self.model, values=self.values, hidden=self.hidden))
            last, before = self._run(batch, packing), batch.columns - 1
        return self._answer(
            batch,
            packing.tokens(last, batch.rows, before) if packing else last[batch.rows, before],
            {layer: packing.padded(h) if packing else h for layer, h in seen.hidden.items()},
            {layer: self.measure(packing.padded(v) if packing else v) for layer, v in seen.values.items()},
        )

    def _run(self, batch: Batch, packing: packed.Packing | None) -> Tensor:
        """The last hidden states: (B, T, D), or (1, N, D) of a packed row."""
        if packing:
            return packed.run(self.model, batch.input_ids, packing)
        # Padding stands at the right, where no real token sees it: attention needs no mask but the causal one, which
        # kernels know themselves. What comes out at padding is never read.
        last: Tensor = models.decoder(self.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return last

    def _below(self, batch: Batch) -> Tensor:
        """What is kept of the input of the first adapted layer, in the form of `_run`."""
        if self._packs:
            return self._packing(batch).together(self._recalled(batch.samples, "below"))
        return self._padded(batch, "below")

    def _apart(self, rows: Tensor, samples: Sequence[Sample]) -> Sequence[Tensor]:
        """(T, D) of each sample, out of what the decoder was run on."""
        lengths = [len(sample.ids) for sample in samples]
        return (
            torch.split(rows[0, : sum(lengths)], lengths)
            if self._packs
            else [row[:n] for row, n in zip(rows, lengths, strict=True)]
        )

    def _can_pack(self) -> bool:
        return packed.able(self.model)

    def _skips(self, batch: Batch) -> bool:
        """Whether the layers below the first adapted one are skipped: decided once, by the first batch."""
        if self._can_skip is None:
            self._can_skip = self._skipping_is_exact(batch)
        return self._can_skip

    def _skipping_is_exact(self, batch: Batch) -> bool:
        """Not every architecture can start in the middle: compare once, and run the whole model if it differs."""
        with torch.no_grad():
            plain, skipped = self._forward(batch).states, self._forward(batch, skip=True).states
        return packed.close(skipped, plain)


def _called(measure: Callable[..., Tensor]) -> str:
    """A function's name, the same in every process; `repr` would hold an address."""
    if isinstance(measure, partial):
        return f"{_called(measure.func)}{measure.args}{measure.keywords}"
    return f"{measure.__module__}.{measure.__qualname__}"
