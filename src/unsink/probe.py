"""Look inside a model while it runs: value vectors, hidden states, attention statistics.

The only file with hooks. Sink positions come from the attention mask and never from index 0, which is padding
when the padding is on the left.

Shapes: B batch, T tokens, L layers, H query heads, G key/value heads, h head size, D hidden, K = G x h.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from unsink import models
from unsink.errors import DataError, ModelError


@dataclass(frozen=True)
class Seen:
    """What one forward pass left behind, with gradients; a later pass in the same block replaces it.

    Attributes:
        values: layer index -> value vectors (B, T, K) of all key/value heads side by side, adapters included.
        hidden: layer index -> output of that decoder layer (B, T, D).
        inputs: layer index -> input of that decoder layer (B, T, D).
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: nn.Module, values: Sequence[int] = (), hidden: Sequence[int] = (), inputs: Sequence[int] = ()
) -> Iterator[Seen]:
    """Collect tensors of the named decoder layers while the block runs the model.

    The hooks are gone when the block ends, also after an exception; the tensors stay.

    Args:
        model: a causal language model, with or without PEFT adapters.
        values: layers whose value vectors are wanted.
        hidden: layers whose outputs are wanted.
        inputs: layers whose inputs are wanted.

    Raises:
        ModelError: no layer is named, a layer does not exist, or the block ended without running a named layer.
    """
    if not (values or hidden or inputs):
        raise ModelError("nothing to capture: no layer is named", "name at least one layer of the model")
    layers, config = models.decoder_layers(model), models.decoder(model).config
    _check_layers(len(layers), [*values, *hidden, *inputs])
    seen = Seen()
    with ExitStack() as hooks:
        for index in values:
            module, rows = models.value_projection(layers[index], config)
            hooks.callback(module.register_forward_hook(_keep(seen.values, index, rows)).remove)
        for index in hidden:
            hooks.callback(layers[index].register_forward_hook(_keep(seen.hidden, index)).remove)
        for index in inputs:
            hook = _keep_input(seen.inputs, index)
            hooks.callback(layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen
    pairs = (values, seen.values), (hidden, seen.hidden), (inputs, seen.inputs)
    missed = sorted({index for wanted, found in pairs for index in wanted if index not in found})
    if missed:
        raise ModelError(f"nothing was captured at layers {missed}: the model did not run them")


def _keep(store: dict[int, Tensor], index: int, rows: slice | Tensor | None = None) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        store[index] = tensor if rows is None else tensor[..., rows]

    return hook


def _keep_input(store: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store[index] = _hidden(*args, **kwargs)

    return hook


def _hidden(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """What a decoder layer is called with, by position or by name."""
    return hidden_states


@contextmanager
def only_layers(model: nn.Module, first: int, last: int, below: Tensor | None) -> Iterator[None]:
    """Let the model run decoder layers `first` to `last` only, both included, while the block runs.

    What a skipped layer hands on means nothing, and its values cannot be captured meanwhile.

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


def _check_layers(count: int, wanted: Sequence[int]) -> None:
    wrong = sorted({index for index in wanted if not 0 <= index < count})
    if wrong:
        raise ModelError(f"layers {wrong} do not exist: the model has layers 0 to {count - 1}")


class SinkPositions(NamedTuple):
    """Where the first real tokens of each row are.

    Attributes:
        indices: (B, k) positions in the row; where `real` is False the entry only keeps the shape.
        real: (B, k) bool, False where the row has too few real tokens. Weight every mean with it.
    """

    indices: Tensor
    real: Tensor


def sink_positions(attention_mask: Tensor, k: int, include_bos: bool = True) -> SinkPositions:
    """The first k real tokens of each row, on whichever side the padding is.

    Args:
        attention_mask: (B, T), non-zero for real tokens.
        k: number of positions per row.
        include_bos: False leaves out the first real token (BOS) and takes the next k.

    Raises:
        DataError: no row has a token there.
    """
    mask = attention_mask.bool()
    first = 0 if include_bos else 1
    # A stable sort that moves padding behind the real tokens and keeps these in order.
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)  # (B, T)
    indices = order[:, first : first + k]
    indices = nn.functional.pad(indices, (0, k - indices.shape[1]))  # (B, k)
    real = torch.arange(first, first + k, device=mask.device) < mask.sum(dim=1, keepdim=True)  # (B, k)
    if not bool(real.any()):
        raise DataError(f"no sink positions: no row has more than {first} real tokens")
    return SinkPositions(indices, real)


def value_norms(values: Tensor) -> Tensor:
    """Full-width L2 norm of the value vectors (B, T, K) -> (B, T) in float32: the heads side by side as one vector."""
    return _norm(values)


def _norm(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return norms


# --- attention statistics -------------------------------------------------------------------------------------

PROBE = "unsink_probe"
SHARES = (1, 4, 8)  # the K of share_K and boost_K (science.md, section 4)
Observer = Callable[[int, Tensor, Tensor, Tensor], None]
_observer: ContextVar[Observer] = ContextVar("unsink_probe_observer")


def importance(attention: Tensor) -> Tensor:
    """Mean attention that each key gets from itself and all later queries (alpha_k of arXiv:2410.10781).

    Args:
        attention: (..., T, T) causal attention, rows are queries and sum to 1.

    Returns:
        (..., T), alpha at each key; key 0 includes its own trivial attention of 1.
    """
    tokens = attention.shape[-1]
    # Causal rows are zero before the diagonal, so a sum over all queries is the sum over i >= k.
    return attention.sum(dim=-2) / torch.arange(tokens, 0, -1, device=attention.device)


def share(attention: Tensor, first: int, window: int = 64) -> Tensor:
    """Part of the attention of the last `window` queries that goes to the first keys: (..., T, T) -> (...)."""
    return attention[..., -window:, :first].sum(dim=-1).mean(dim=-1)


def uniform_share(tokens: int, first: int, window: int = 64) -> float:
    """What `share` would be if every query spread its attention evenly; share / uniform_share is the boost."""
    queries = range(max(0, tokens - window), tokens)
    return sum(min(first, i + 1) / (i + 1) for i in queries) / len(queries)


def trigger_share(attention: Tensor, span: tuple[int, int]) -> Tensor:
    """Attention to the trigger's columns from its last token on: mean over these queries, (..., T, T) -> (...).

    The last trigger token is the first query that sees the whole trigger, and the only one of a suffix trigger.
    """
    start, end = span
    return attention[..., end - 1 :, start:end].sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class Statistics:
    """Means over the prompts, in float64 on the CPU. Norms are L2 norms.

    Attributes:
        alpha: (L, H, T) importance of each key.
        sink_rate: (L, H, T) part of the prompts, 0 to 1, in which alpha exceeds epsilon.
        share: (L, H, 3) attention of the last 64 queries to the first 1, 4 and 8 keys.
        trigger_share: (L, H) see the function of that name; zeros without a span.
        attention: (L, T, T) attention map, mean over heads as well.
        value_norm: (L, T) full-width norm of the value vectors.
        value_norm_heads: (L, G, T) norm of each head's value vectors.
        key_norm_heads: (L, G, T) norm of each head's keys, positions encoded.
        residual_norm: (L, T) norm of the output of each decoder layer.
    """

    alpha: Tensor
    sink_rate: Tensor
    share: Tensor
    trigger_share: Tensor
    attention: Tensor
    value_norm: Tensor
    value_norm_heads: Tensor
    key_norm_heads: Tensor
    residual_norm: Tensor


@torch.no_grad()
def attention_statistics(
    model: nn.Module,
    ids: Tensor,
    *,
    epsilon: float = 0.3,
    span: tuple[int, int] | None = None,
    batch: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Run prompts through a model and gather statistics inside its attention function.

    One layer's attention maps exist at a time; what is kept has no L x H x T x T tensor in it. The sums are
    taken in float32 whatever the model computes in.

    Args:
        model: a causal language model in evaluation mode, with or without PEFT adapters.
        ids: (N, T) prompts of equal length, so that nothing is padded.
        epsilon: a key is a sink of a head where alpha exceeds this (Sink^epsilon_k).
        span: token span of the trigger, for `trigger_share`.
        batch: prompts at a time.
        advance: called with the number of prompts after each batch.

    Raises:
        ModelError: the model's attention cannot be observed.
    """
    decoder = cast(PreTrainedModel, models.decoder(model))
    layers = range(len(models.decoder_layers(model)))
    sums = _Sums(epsilon, span)
    for rows in torch.split(ids, batch):
        with _observed(model, sums.observe), capture(model, hidden=layers) as seen:
            decoder(input_ids=rows.to(decoder.device), use_cache=False)
        for layer, hidden in seen.hidden.items():
            sums.add("residual_norm", layer, _norm(hidden))
        advance(len(rows))
    return sums.means(len(ids), layers)


class _Sums:
    """Running sums over prompts, one per statistic and layer."""

    def __init__(self, epsilon: float, span: tuple[int, int] | None) -> None:
        self.epsilon = epsilon
        self.span = span
        self.totals: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, name: str, layer: int, tensor: Tensor) -> None:
        """Add a (B, ...) statistic."""
        total = tensor.sum(dim=0).cpu().double()
        self.totals[name][layer] = self.totals[name].get(layer, 0) + total

    def observe(self, layer: int, attention: Tensor, key: Tensor, value: Tensor) -> None:
        """Add what one layer's attention (B, H, T, T), keys and values (B, G, T, h) of one batch say."""
        alpha = importance(attention)  # (B, H, T)
        heads = _norm(value)  # (B, G, T)
        self.add("alpha", layer, alpha)
        self.add("sink_rate", layer, (alpha > self.epsilon).float())
        self.add("share", layer, torch.stack([share(attention, first) for first in SHARES], dim=-1))
        triggered = (
            attention.new_zeros(attention.shape[:2]) if self.span is None else trigger_share(attention, self.span)
        )
        self.add("trigger_share", layer, triggered)
        self.add("attention", layer, attention.mean(dim=1))
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
        return Statistics(**{name: self._mean(name, prompts, layers) for name in self.totals})

    def _mean(self, name: str, prompts: int, layers: Sequence[int]) -> Tensor:
        mean = torch.stack([self.totals[name][layer] for layer in layers]) / prompts
        wrong = [layer for layer in layers if not mean[layer].isfinite().all()]
        if wrong:
            raise ModelError(
                f"{name} is not finite at layers {wrong}", "the weights are damaged, or dtype is too narrow"
            )
        return mean


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
        observer(index, output[1].float(), seen["k_proj"], seen["v_proj"])

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
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ keys.float().transpose(2, 3)  # (B, H, T, T)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    attention = _masked(scores, attention_mask).softmax(dim=-1)
    _observer.get()(cast(int, module.layer_idx), attention, key, value)
    return (attention.to(values.dtype) @ values).transpose(1, 2).contiguous(), None


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask as sdpa understands it: None is causal, booleans say who may attend, numbers are added."""
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


AttentionInterface.register(PROBE, _attend)
AttentionMaskInterface.register(PROBE, sdpa_mask)


# --- what a trigger changes -----------------------------------------------------------------------------------


def absolute_difference(triggered: Tensor, clean: Tensor) -> Tensor:
    """Attention with the trigger minus without it, at the same positions: (..., T, T) each."""
    return triggered - clean


def content_difference(triggered: Tensor, clean: Tensor, span: tuple[int, int]) -> Tensor:
    """The same difference between the same words.

    The positions are those of the triggered prompt; content behind the trigger is compared with where it stood
    without the trigger. Rows and columns of the trigger have no partner and are NaN.
    """
    start, end = span
    tokens = clean.shape[-1]
    content = [i for i in range(tokens) if not start <= i < end]
    before = [i if i < start else i - (end - start) for i in content]
    result = torch.full_like(triggered, torch.nan)
    rows = torch.tensor(content)[:, None]
    partners = torch.tensor(before)[:, None]
    result[..., rows, rows.T] = triggered[..., rows, rows.T] - clean[..., partners, partners.T]
    return result
