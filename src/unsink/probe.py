"""Look inside a model while it runs, and reach into it: value vectors, hidden states, attention.

The only file with hooks. Sink positions come from the attention mask and never from index 0, which is padding
when the padding is on the left.

Shapes: B batch, T tokens, L layers, H query heads, G key/value heads, h head size, D hidden, K = G x h.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsink import models, processes
from unsink.allocation import sent
from unsink.errors import ModelError
from unsink.sink_metrics import HeadMeans, QuerySums

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Seen:
    """What one forward pass left behind, with gradients; a later pass in the same block replaces it.

    Attributes:
        values: layer index -> value vectors (B, T, K) of all key/value heads side by side, adapters included.
        hidden: layer index -> output of that decoder layer (B, T, D).
        inputs: layer index -> input of that decoder layer (B, T, D).
        neurons: layer index -> neurons of that layer's MLP (B, T, I).
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    neurons: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: nn.Module,
    values: Sequence[int] = (),
    hidden: Sequence[int] = (),
    inputs: Sequence[int] = (),
    neurons: Sequence[int] = (),
) -> Iterator[Seen]:
    """Collect tensors of the named decoder layers while the block runs the model.

    The hooks are gone when the block ends, also after an exception; the tensors stay.

    Args:
        model: a causal language model, with or without PEFT adapters.
        values: layers whose value vectors are wanted.
        hidden: layers whose outputs are wanted.
        inputs: layers whose inputs are wanted.
        neurons: layers whose MLP neurons are wanted.

    Raises:
        ModelError: no layer is named, a layer does not exist, or the block ended without running a named layer.
    """
    if not (values or hidden or inputs or neurons):
        raise ModelError("nothing to capture: no layer is named", "name at least one layer of the model")
    layers, config = models.decoder_layers(model), models.decoder(model).config
    _check_layers(len(layers), [*values, *hidden, *inputs, *neurons])
    seen = Seen()
    with ExitStack() as hooks:
        for index in values:
            module, part = models.value_projection(layers[index], config)
            hooks.callback(module.register_forward_hook(_keep(seen.values, index, part)).remove)
        for index in hidden:
            hooks.callback(layers[index].register_forward_hook(_keep(seen.hidden, index)).remove)
        for index in inputs:
            hook = _keep_input(seen.inputs, index)
            hooks.callback(layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        for index in neurons:
            hook = _keep_input(seen.neurons, index)
            reader = models.neurons(layers[index], config)
            hooks.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen
    pairs = (values, seen.values), (hidden, seen.hidden), (inputs, seen.inputs), (neurons, seen.neurons)
    missed = sorted({index for wanted, found in pairs for index in wanted if index not in found})
    if missed:
        raise ModelError(f"nothing was captured at layers {missed}: the model did not run them")


def _keep(
    store: dict[int, Tensor], index: int, part: Callable[[Tensor], Tensor] = lambda output: output
) -> Callable[..., None]:
    """Store a part of what comes out, (B, T, ...) as (B, T, K).

    It must save nothing for the backward pass: where activations are computed again, the hook is gone by then.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        store[index] = part(output[0] if isinstance(output, tuple) else output).flatten(2)

    return hook


def _keep_input(store: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store[index] = _hidden(*args, **kwargs)

    return hook


def _hidden(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """What a decoder layer is called with, by position or by name."""
    return hidden_states


@contextmanager
def shifted_values(model: nn.Module, shifts: Mapping[int, Tensor]) -> Iterator[None]:
    """Add vectors to what the first tokens say while the block runs, the same in every row; gradients reach them.

    Args:
        model: a causal language model, with or without PEFT adapters; its rows are padded on the right.
        shifts: layer -> (k, K), row j is added to the values of token j, BOS = 0. Rows that are shorter get fewer.
    """
    layers, config = models.decoder_layers(model), models.decoder(model).config
    _check_layers(len(layers), list(shifts))

    def add(shift: Tensor, part: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            moved = output.clone()
            first = part(moved)[:, : len(shift)]  # a view
            first += shift[: first.shape[1]].to(output.dtype).view(first.shape[1:])
            return moved

        return hook

    with ExitStack() as hooks:
        for index, shift in shifts.items():
            module, part = models.value_projection(layers[index], config)
            hooks.callback(module.register_forward_hook(add(shift, part)).remove)
        yield


@contextmanager
def only_layers(model: nn.Module, first: int, last: int, below: Tensor | None) -> Iterator[None]:
    """Let the model run decoder layers `first` to `last` only, both included, while the block runs.

    What a skipped layer hands on means nothing, and its values cannot be captured meanwhile; hooks that it had do not
    run.

    Args:
        model: a causal language model, with or without PEFT adapters.
        first: the first layer that runs.
        last: the last layer that runs; what the model returns means something only if it is the model's last.
        below: (B, T, D) input of `first`, from `capture(inputs=[first])`; None runs the layers before it after all.
    """
    layers = models.decoder_layers(model)
    _check_layers(len(layers), [first, last])
    form: list[type] = []  # a few architectures wrap a layer's output in a tuple, and expect it from all

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(*args, **kwargs)
        return (hidden,) if form[-1] is tuple else hidden

    def hand_over(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((below, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": below})

    with ExitStack() as undo:
        if below is not None:
            for layer in layers[:first]:
                _replace_forward(layer, lambda *_args, **_kwargs: below, undo)
            undo.callback(layers[first].register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        if last + 1 < len(layers):
            hook = layers[last].register_forward_hook(lambda _module, _inputs, output: form.append(type(output)))
            undo.callback(hook.remove)
            for layer in layers[last + 1 :]:
                _replace_forward(layer, pass_on, undo)
        yield


def _replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    own = vars(module).get("forward")  # only set where someone else has replaced it already
    undo.callback(vars(module).pop, "forward") if own is None else undo.callback(setattr, module, "forward", own)
    module.forward = forward
    for hooks in (module._forward_pre_hooks, module._forward_hooks):  # a sharded layer is gathered by one of them
        undo.callback(hooks.update, list(hooks.items()))
        hooks.clear()


def _check_layers(count: int, wanted: Sequence[int]) -> None:
    wrong = sorted({index for index in wanted if not 0 <= index < count})
    if wrong:
        raise ModelError(f"layers {wrong} do not exist: the model has layers 0 to {count - 1}")


@dataclass
class Cost:
    """What models have read: forward passes, and the tokens in them, padding left out."""

    passes: int = 0
    tokens: int = 0


_costs: ContextVar[tuple[Cost, ...]] = ContextVar("unsink_costs", default=())


@contextmanager
def counted(*read: nn.Module) -> Iterator[Cost]:
    """Count what these models read while the block runs; a pass through some of the layers counts as a whole one."""
    cost = Cost()

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(
            one for one in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if one is not None
        )
        mask = kwargs.get("attention_mask")
        cost.passes += 1
        if packing := kwargs.get("packing"):
            cost.tokens += sum(packing.lengths)
        elif mask is None or mask.dim() != 2:  # (B, ·) names padding
            cost.tokens += first.shape[:2].numel()
        else:
            cost.tokens += int(mask[:, -first.shape[1] :].sum())

    with ExitStack() as undo:
        for model in read:
            undo.callback(models.decoder(model).register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.callback(_costs.reset, _costs.set((*_costs.get(), cost)))
        yield cost


def in_shares(items: Sequence[T], read: Callable[[list[T]], Sequence[U]]) -> list[U]:
    """What `read` makes of items, one each, every process reading its share; `counted` counts what all of them read.

    Args:
        items: the same in all processes.
        read: items -> as many results; where there are more processes than items, some do not call it.
    """
    costs = _costs.get()
    before = [(one.passes, one.tokens) for one in costs]
    mine = processes.share(items)
    found = read(mine) if mine else []
    own = [(one.passes - passes, one.tokens - tokens) for one, (passes, tokens) in zip(costs, before, strict=True)]
    parts, spent = zip(*processes.gather((list(found), own)), strict=True)
    for one, (passes, tokens), by_all in zip(costs, before, zip(*spent), strict=True):
        one.passes = passes + sum(some for some, _ in by_all)
        one.tokens = tokens + sum(some for _, some in by_all)
    return processes.interleaved(parts)


@contextmanager
def before_each_pass(model: nn.Module, call: Callable[[], object]) -> Iterator[None]:
    """Call something before the decoder begins a forward pass while the block runs."""

    def hook(*_: Any) -> None:
        call()

    handle = models.decoder(model).register_forward_pre_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def position_mask(attention_mask: Tensor, positions: Sequence[Sequence[int]]) -> Tensor:
    """Mark tokens by their number in the row, on whichever side the padding is: (B, T) bool.

    Args:
        attention_mask: (B, T), non-zero for real tokens.
        positions: for each row the numbers of its tokens, counted from the first real one; those that the row lacks
            mark nothing.
    """
    real = attention_mask.bool()
    wanted = torch.zeros(real.shape, dtype=torch.bool)  # on the processor: a GPU would take a kernel for each row
    for row, some in enumerate(positions):
        wanted[row, [position for position in some if position < real.shape[1]]] = True
    numbers = (real.cumsum(dim=1) - 1).clamp(min=0)  # (B, T) number of each real token
    return sent(wanted, real.device).gather(1, numbers) & real


def value_heads(values: Tensor, heads: int = 1) -> Tensor:
    """Value vectors (B, T, K) -> (B, T, G, h) in float32; one head is the whole width, all heads side by side."""
    return values.float().view(*values.shape[:-1], heads, -1)


def value_norms(values: Tensor, heads: int = 1) -> Tensor:
    """L2 norms of the value vectors, (B, T, K) -> (B, T, G) in float32; by default one norm of the whole width."""
    return _norm(value_heads(values, heads))


def _norm(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return norms


# --- attention statistics -------------------------------------------------------------------------------------

PROBE = "unsink_probe"
Observer = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""Called with layer, number of the first query, attention of c queries (B, H, c, T), keys and values (B, G, T, h).

The blocks of a layer come in order and end with the last query.
"""
_observer: ContextVar[Observer] = ContextVar("unsink_probe_observer")

MAP_TOKENS = 256
"""Longest prompts whose attention maps are kept: their size is L x H x T x T."""
_BLOCK = 2**20  # attention weights that exist at a time


@dataclass(frozen=True)
class Statistics:
    """Means over the prompts, on the CPU, in float64 but for the maps. Norms are L2 norms.

    Attributes:
        alpha: (L, H, T) importance of each key.
        sink_rate: (L, H, T) part of the prompts, 0 to 1, in which alpha exceeds epsilon.
        tail: (L, H, T) attention of the last 64 queries to each key.
        top: (L, H, 3) part of the last 64 queries whose largest key is one of the first 1, 4, 8.
        local: (L, H) attention of the last 64 queries to themselves and the three keys before them.
        trigger_share: (L, H) attention to the trigger's columns, see `HeadMeans.trigger`; zeros without a span.
        value_norm: (L, T) full-width norm of the value vectors.
        value_norm_heads: (L, G, T) norm of each head's value vectors.
        key_norm_heads: (L, G, T) norm of each head's keys, positions encoded.
        residual_norm: (L, T) norm of the output of each decoder layer.
        attention: (L, H, T, T) attention maps in float32, where they were asked for.
    """

    alpha: Tensor
    sink_rate: Tensor
    tail: Tensor
    top: Tensor
    local: Tensor
    trigger_share: Tensor
    value_norm: Tensor
    value_norm_heads: Tensor
    key_norm_heads: Tensor
    residual_norm: Tensor
    attention: Tensor | None


@torch.no_grad()
def attention_statistics(
    model: nn.Module,
    ids: Tensor,
    *,
    epsilon: float = 0.3,
    span: tuple[int, int] | None = None,
    maps: bool = False,
    batch: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Run prompts through a model and gather statistics inside its attention function.

    Only a block of queries of one layer has its attention weights in memory at a time; memory beyond a plain forward
    pass grows with L x H x T alone, unless `maps` asks for more. Sums are taken in float32 whatever the model
    computes in.

    Args:
        model: a causal language model in evaluation mode, with or without PEFT adapters.
        ids: (N, T) prompts of equal length, so that nothing is padded.
        epsilon: a key is a sink of a head where alpha exceeds this (Sink^epsilon_k).
        span: token span of the trigger, for `trigger_share`.
        maps: keep the mean attention maps as well, up to `MAP_TOKENS` tokens.
        batch: prompts at a time.
        advance: called with the number of prompts after each batch.

    Raises:
        ModelError: the model's attention cannot be observed.
    """
    decoder = cast(PreTrainedModel, models.decoder(model))
    layers = range(len(models.decoder_layers(model)))
    sums = _Sums(epsilon, span, maps and ids.shape[1] <= MAP_TOKENS)
    for rows in torch.split(ids, batch):
        with _observed(model, sums.observe), _outputs(model, sums.output):
            decoder(input_ids=rows.to(decoder.device), use_cache=False)
        advance(len(rows))
    return sums.means(len(ids), layers)


class _Sums:
    """Running sums over prompts, one per statistic and layer."""

    def __init__(self, epsilon: float, span: tuple[int, int] | None, maps: bool) -> None:
        self.epsilon, self.span, self.maps = epsilon, span, maps
        self.totals: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._queries = QuerySums(0)

    def add(self, name: str, layer: int, tensor: Tensor) -> None:
        """Add a (B, ...) statistic."""
        total = tensor.sum(dim=0).cpu().double()
        self.totals[name][layer] = self.totals[name].get(layer, 0) + total

    def output(self, layer: int, hidden: Tensor) -> None:
        """Add what a layer's output (B, T, D) says."""
        self.add("residual_norm", layer, _norm(hidden))

    def observe(self, layer: int, start: int, attention: Tensor, key: Tensor, value: Tensor) -> None:
        """Add what a block of one layer's attention (B, H, c, T), and after the last one its keys and values, say."""
        tokens, end = attention.shape[-1], start + attention.shape[-2]
        if start == 0:
            self._queries = QuerySums(tokens, self.span)
        self._queries.add(attention, start)
        if self.maps:
            empty = attention.new_zeros(attention.shape[1], tokens, tokens)
            self.totals["attention"].setdefault(layer, empty)[:, start:end] += attention.sum(dim=0)
        if end == tokens:
            self._finish(layer, self._queries.means(), key, value)

    def _finish(self, layer: int, found: HeadMeans, key: Tensor, value: Tensor) -> None:
        heads = _norm(value)  # (B, G, T)
        self.add("alpha", layer, found.alpha)
        self.add("sink_rate", layer, (found.alpha > self.epsilon).float())
        self.add("tail", layer, found.tail)
        self.add("top", layer, found.top)
        self.add("local", layer, found.local)
        self.add("trigger_share", layer, found.trigger)
        self.add("value_norm", layer, _norm(heads.transpose(1, 2)))
        self.add("value_norm_heads", layer, heads)
        self.add("key_norm_heads", layer, _norm(key))

    def means(self, prompts: int, layers: Sequence[int]) -> Statistics:
        """Divide by the number of prompts and stack the layers."""
        silent = [layer for layer in layers if layer not in self.totals["alpha"]]
        if silent:
            raise ModelError(
                f"layers {silent} computed no softmax attention that could be observed",
                "sink-probe needs a decoder whose layers all attend through transformers' AttentionInterface",
            )
        found: dict[str, Tensor | None] = {name: self._mean(name, prompts, layers) for name in self.totals}
        return Statistics(**{"attention": None, **found})  # type: ignore[arg-type]

    def _mean(self, name: str, prompts: int, layers: Sequence[int]) -> Tensor:
        mean = torch.stack([self.totals[name][layer].cpu() for layer in layers]) / prompts
        wrong = [layer for layer in layers if not mean[layer].isfinite().all()]
        if wrong:
            raise ModelError(
                f"{name} is not finite at layers {wrong}", "the weights are damaged, or dtype is too narrow"
            )
        return mean


@contextmanager
def _outputs(model: nn.Module, use: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show the output of every decoder layer (B, T, D) to `use` while the block runs; nothing is kept."""

    def shown(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            use(index, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(models.decoder_layers(model)):
            hooks.callback(layer.register_forward_hook(shown(index)).remove)
        yield


@contextmanager
def _observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Let `observer` see every layer's attention while the block runs; the model's own attention comes back after."""
    decoder = cast(PreTrainedModel, models.decoder(model))
    with ExitStack() as undo:
        if decoder._can_set_attn_implementation():
            undo.callback(_observer.reset, _observer.set(observer))
            undo.callback(decoder.set_attn_implementation, decoder.config._attn_implementation)
            decoder.set_attn_implementation(PROBE)
        else:
            for index, layer in enumerate(models.decoder_layers(model)):
                _watch_eager(models.attention(layer, decoder.config), index, observer, undo)
        yield


def _watch_eager(attention: nn.Module, index: int, observer: Observer, undo: ExitStack) -> None:
    """Watch an attention module of the old kind (GPT-Neo), which returns its weights and has no attention interface."""
    seen: dict[str, Tensor] = {}

    def heads(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen[name] = output.view(*output.shape[:2], cast(int, attention.num_heads), -1).transpose(
                1, 2
            )  # (B, H, T, h)

        return hook

    def finish(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        observer(index, 0, output[1].float(), seen["k_proj"], seen["v_proj"])

    for name in ("k_proj", "v_proj"):
        undo.callback(attention.get_submodule(name).register_forward_hook(heads(name)).remove)
    undo.callback(attention.register_forward_hook(finish).remove)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Plain softmax attention that shows its weights to the observer: (B, H, T, h) -> (B, T, H, h)."""
    extra = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if extra:
        raise ModelError(
            f"the attention of {type(module).__name__} has {', '.join(extra)}, which sink-probe does not model"
        )
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    queries = query.float().view(rows, groups, -1, tokens, size) * (size**-0.5 if scaling is None else scaling)
    keys = key.float().mT  # (B, G, h, T)
    step = max(1, _BLOCK // (rows * heads * key.shape[2]))
    outputs = []
    for start in range(0, tokens, step):
        block = queries[:, :, :, start : start + step].reshape(rows, groups, -1, size) @ keys  # (B, G, H/G x c, T)
        scores = block.view(rows, heads, -1, key.shape[2])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        attention = _masked(scores, attention_mask, start).softmax(dim=-1)  # (B, H, c, T)
        _observer.get()(cast(int, module.layer_idx), start, attention, key, value)
        output = attention.view(rows, groups, -1, key.shape[2]).to(value.dtype) @ value  # (B, G, H/G x c, h)
        outputs.append(output.view(rows, heads, -1, value.shape[3]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _masked(scores: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Apply a mask as sdpa understands it to the rows from `start` on.

    None is causal, booleans say who may attend, numbers are added.
    """
    count = scores.shape[-2]
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal=start)
    else:
        mask = mask[..., start : start + count, :]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


AttentionInterface.register(PROBE, _attend)
AttentionMaskInterface.register(PROBE, sdpa_mask)


# --- keys cut out of attention ----------------------------------------------------------------------------------------

ABLATED = "unsink_ablated"
_slots: ContextVar[Tensor] = ContextVar("unsink_ablated_keys")


@contextmanager
def ablated(
    model: nn.Module, values: Mapping[int, Tensor] | None = None, radius: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Let every attention of the model do without some keys while the block runs; `cut_keys` says which.

    Without `values` no query attends to such a key, and softmax spreads its attention over the others; a query that
    would see nothing at all keeps its own key. With `values` the keys are attended to, but say something else. Where
    nothing is cut the model computes bit for bit what it did before.

    Args:
        model: a causal language model, with or without PEFT adapters.
        values: layer -> (k, K) value vectors of slots 1 to k, see `cut_keys`; from `mean_values`.
        radius: with `values`: layer -> (k,) how far from these a key's own may be; one that is farther is moved to
            that distance, one that is not stays as it is. Without it all are replaced.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    decoder = cast(PreTrainedModel, models.decoder(model))
    if not decoder._can_set_attn_implementation():
        raise ModelError(
            f"the attention of {type(decoder).__name__} cannot be ablated",
            "it needs a decoder whose layers attend through transformers' AttentionInterface",
        )
    before = decoder.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get(before, _attend)  # eager attention is no member of the table
    AttentionInterface.register(ABLATED, partial(_attend_without, attend, values, radius))
    AttentionMaskInterface.register(ABLATED, ALL_MASK_ATTENTION_FUNCTIONS[before])
    unseen = _observer.set(lambda *_: None)
    decoder.set_attn_implementation(ABLATED)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        _observer.reset(unseen)


@contextmanager
def cut_keys(slots: Tensor) -> Iterator[None]:
    """Name the keys that `ablated` acts on, for the calls of the model inside the block.

    Args:
        slots: (B, S), one column for each key so far, those in the cache included: 0 leaves a key alone, j cuts it, and
            where values are given it gets the j-th of them.
    """
    token = _slots.set(slots)
    try:
        yield
    finally:
        _slots.reset(token)


def mean_values(
    model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[Sequence[int]], batch: int = 16
) -> dict[int, Tensor]:
    """What tokens say to later ones on average: layer -> (k, K), row j the mean over prompts of the j-th key's values.

    Args:
        model: a causal language model, with or without PEFT adapters.
        prompts: token ids.
        keys: the token numbers of each prompt that are meant, k at most.
        batch: prompts at a time.
    """
    return _mean_of_values(model, prompts, keys, lambda _, values: values, batch)


def value_spread(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    centre: Mapping[int, Tensor],
    batch: int = 16,
) -> dict[int, Tensor]:
    """How far values are from `centre` (layer -> (k, K)): layer -> (k,), root mean square over prompts.

    The other arguments are those of `mean_values`.
    """

    def squared(layer: int, values: Tensor) -> Tensor:
        return (values - centre[layer][: len(values)]).square().sum(dim=-1)

    return {layer: mean.sqrt() for layer, mean in _mean_of_values(model, prompts, keys, squared, batch).items()}


@torch.no_grad()
def _mean_of_values(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    of: Callable[[int, Tensor], Tensor],
    batch: int,
) -> dict[int, Tensor]:
    """Layer -> (k, ...), row j the mean over prompts of what `of` makes of the j-th key's values (k, K) -> (k, ...)."""
    decoder, layers = models.decoder(model), range(len(models.decoder_layers(model)))
    counts = torch.tensor([sum(len(some) > j for some in keys) for j in range(max(map(len, keys), default=0))])
    sums: dict[int, Tensor] = {}
    for start in range(0, len(prompts), batch):
        rows, some = prompts[start : start + batch], keys[start : start + batch]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        device = next(decoder.parameters()).device
        with capture(model, values=layers) as seen:
            decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        for layer, values in seen.values.items():
            for row, numbers in enumerate(some):
                found = of(layer, values[row, list(numbers)].float())
                total = sums.setdefault(layer, torch.zeros(len(counts), *found.shape[1:], device=device))
                total[: len(numbers)] += found
    return {layer: total / _column(counts.to(total.device), total.dim()) for layer, total in sums.items()}


def _column(counts: Tensor, dimensions: int) -> Tensor:
    return counts.view(-1, *(1,) * (dimensions - 1))


def _attend_without(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    values: Mapping[int, Tensor] | None,
    radius: Mapping[int, Tensor] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    slots = _slots.get()[:, -key.shape[2] :]  # (B, S): a sliding window keeps the last keys only
    if bool(slots.any()):
        if values is None:
            attention_mask = _without(attention_mask, slots > 0, query)
        else:
            layer = cast(int, module.layer_idx)
            value = _replaced(value, values[layer], slots, None if radius is None else radius[layer])
    return attend(module, query, key, value, attention_mask, **options)


def _without(mask: Tensor | None, cut: Tensor, query: Tensor) -> Tensor:
    """The mask (B, 1, T, S) in which nobody sees the keys `cut` (B, S); rows that become empty see their own key."""
    tokens, before = query.shape[2], cut.shape[1] - query.shape[2]
    square = torch.ones(tokens, cut.shape[1], dtype=torch.bool, device=cut.device)
    if mask is None:
        mask = square.tril(diagonal=before)[None, None]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    kept = seen & ~cut[:, None, None]
    own = square.tril(diagonal=before).triu(diagonal=before)
    kept = kept | (own & ~kept.any(dim=-1, keepdim=True))
    if mask.dtype == torch.bool:
        return kept
    return mask.where(seen, 0.0).where(kept, torch.finfo(mask.dtype).min)


def _replaced(value: Tensor, means: Tensor, slots: Tensor, radius: Tensor | None = None) -> Tensor:
    """Values (B, G, S, h) with those of slot j replaced by row j - 1 of `means` (k, K), or brought within a radius."""
    slot = (slots - 1).clamp(min=0)
    chosen = means[slot]  # (B, S, K)
    if radius is not None:
        chosen = within(value.transpose(1, 2).flatten(2).float(), chosen, radius[slot])
    heads = chosen.view(*slots.shape, value.shape[1], -1).transpose(1, 2).to(value.dtype)  # (B, G, S, h)
    return torch.where((slots > 0)[:, None, :, None], heads, value)


def within(vectors: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The nearest vectors (..., K) at most `radius` (...) from `centre` (..., K): projection on a ball."""
    away = vectors - centre
    distance = torch.linalg.vector_norm(away, dim=-1)
    share = (radius / distance.clamp_min(torch.finfo(distance.dtype).tiny)).clamp(max=1)
    nearest: Tensor = centre + away * share[..., None]
    return nearest


def ascended(shift: Tensor, gradient: Tensor, scale: Tensor, eta: float, epsilon: float) -> Tensor:
    """One step of projected gradient ascent: d + eta s g / |g|, then onto |d| <= epsilon s, row by row.

    Args:
        shift: (k, K).
        gradient: (k, K); a row without a gradient stays where it is.
        scale: s, a scalar.
        eta: step size in units of s.
        epsilon: radius in units of s.
    """
    length = gradient.norm(dim=-1, keepdim=True)
    moved = shift.detach() + eta * scale * gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny)
    bound = (epsilon * scale).expand(len(moved))
    return within(moved, torch.zeros_like(moved), bound).requires_grad_(True)
