"""Generation, choice log-likelihoods and token log-probabilities in batches, with nothing computed twice.

- Prompts are sorted by length and padded on the left; positions come from the attention mask.
- Rows that met a stop string, EOS or their own limit leave the batch; a step writes one column of the cache.
- What all prompts of a call start with (few-shot examples) can be run once. Its keys are held once for all rows.
- Keys can be cut out of the attention (`Cut`): while the prompt is read, and again in every decoding step.

In float32 the text equals that of the model's own `generate`, prompt by prompt. In bfloat16 a near tie between two
tokens may fall differently with another batch size: fix `batch` where byte equality matters.

Shapes: B rows, T tokens, P tokens of a shared prefix, S keys of a row's own, V vocabulary, H query heads,
G key/value heads, h head size.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import eager_mask

from unsink import metrics, models
from unsink.batches import generator
from unsink.errors import DataError
from unsink.probe import ablated, cut_keys
from unsink.progress import SILENT, Reporter

Model = PreTrainedModel | PeftModel
Ids = Sequence[int]

_CROWD = 0.8  # finished rows leave when at most this part of the rows is still open: each removal copies the cache
_SPARE = 64  # columns that a cache layer grows by


class Cut(NamedTuple):
    """Tokens that the model has to do without, see `probe.ablated`.

    Attributes:
        keys: for each prompt the numbers of its tokens, BOS = 0.
        values: what their values become, from `probe.mean_values`; None takes them out of the attention.
        radius: with `values`: how far from these their own values may be; None replaces them all.
    """

    keys: Sequence[Sequence[int]]
    values: Mapping[int, Tensor] | None = None
    radius: Mapping[int, Tensor] | None = None


class Guard(Protocol):
    """What stands between a prompt and a model whose weights are left alone; see `guarded`."""

    def edit(self, ids: Ids) -> list[int]:
        """Return the prompt that the model reads instead; BOS stays first."""

    def cut(self, prompts: Sequence[Ids]) -> Cut | None:
        """Return what is done to the values of these (edited) prompts, None for nothing."""


_guard: ContextVar[Guard | None] = ContextVar("unsink_guard", default=None)


@contextmanager
def guarded(guard: Guard) -> Iterator[None]:
    """Within the block let `guard` see each prompt before the model does, in `generate`, `stream` and choices.

    Texts that are read as they stand (`token_scores`) are no prompts, and stay as they are.
    """
    token = _guard.set(guard)
    try:
        yield
    finally:
        _guard.reset(token)


def _as_read(prompts: Sequence[Ids], cut: Cut | None) -> tuple[Sequence[Ids], Cut | None]:
    """Prompts and cut as the guard leaves them."""
    guard = _guard.get()
    if guard is None:
        return prompts, cut
    if cut is not None:
        raise ValueError(
            "tokens are cut out of a prompt or a guard looks after it, not both: their places would differ"
        )
    edited = [guard.edit(prompt) for prompt in prompts]
    return edited, guard.cut(edited)


class Sampling(NamedTuple):
    """Draw tokens instead of taking the most likely one.

    Attributes:
        temperature: logits are divided by it.
        seed: of the draws, which also depend on the prompts and the batch size.
    """

    temperature: float
    seed: str


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new: Sequence[int],
    *,
    stop: Sequence[str] = (),
    batch: int = 120,
    shared_prefix: bool = False,
    cut: Cut | None = None,
    sampling: Sampling | None = None,
    reporter: Reporter = SILENT,
    description: str = "generating",
) -> list[str]:
    """Continue prompts, greedily where nothing else is said.

    Args:
        model: a causal language model, with or without PEFT adapters.
        tokenizer: its tokenizer.
        prompts: token ids, BOS included.
        max_new: most new tokens, a number per prompt.
        stop: the text ends before the first of these strings.
        batch: most rows at a time.
        shared_prefix: run what all prompts start with only once; has no effect on models with special attention, and
            none with `cut`, because rows then see different parts of the prefix.
        cut: tokens of the prompts that nobody may attend to.
        sampling: how tokens are drawn.
        reporter: shows prompts done.
        description: what the progress bar says.

    Returns:
        The new text for each prompt, without special tokens.

    Raises:
        DataError: a prompt and its continuation do not fit the model's context.
    """
    prompts, cut = _as_read(prompts, cut)
    _require_context(model, [len(prompt) + new for prompt, new in zip(prompts, max_new, strict=True)])
    shared = _common_length(prompts) if shared_prefix and not cut and _attends_plainly(model) else 0
    ends = _Ends(tokenizer, _eos_ids(model, tokenizer), tuple(stop))
    special = _behind(model, prompts[0][:shared]) if shared else _ablated(model, cut)
    pick = _picking(sampling)
    texts: dict[int, str] = {}
    with reporter.task(description, len(prompts)) as advance, special:
        for chosen in _chunks(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), max_new[i])), batch):
            own, limits = [prompts[i][shared:] for i in chosen], [max_new[i] for i in chosen]
            steps = _steps(model, own, limits, shared, ends, advance, _chosen(cut, chosen), pick)
            ((new, _),) = deque(steps, maxlen=1)  # the last step has all tokens
            texts |= {i: ends.text(ids) for i, ids in zip(chosen, new)}
    return [texts[i] for i in range(len(prompts))]


class Said(NamedTuple):
    """One new token of a continuation.

    Attributes:
        token: its id.
        text: what is settled of the continuation now and was not before. Text that may still become a stop string or
            a character of several tokens waits; all pieces together are what `generate` returns.
        logprob: log p of the token under the model itself, whatever the temperature; nats.
        top: ids and log p of the likeliest tokens here, the best first.
    """

    token: int
    text: str
    logprob: float
    top: list[tuple[int, float]]


@torch.no_grad()
def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Ids,
    max_new: int,
    *,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    top: int = 0,
) -> Iterator[Said]:
    """Continue one prompt as `generate` does, and yield each token as soon as it is there.

    Args:
        model: a causal language model, with or without PEFT adapters.
        tokenizer: its tokenizer.
        prompt: token ids, BOS included.
        max_new: most new tokens.
        stop: the text ends before the first of these strings.
        sampling: how tokens are drawn.
        top: how many of the likeliest tokens are told at each step.

    Raises:
        DataError: the prompt and its continuation do not fit the model's context.
    """
    prompts, cut = _as_read([prompt], None)
    _require_context(model, [len(prompts[0]) + max_new])
    ends = _Ends(tokenizer, _eos_ids(model, tokenizer), tuple(stop))
    steps = _steps(model, prompts, [max_new], 0, ends, lambda _: None, _chosen(cut, [0]), _picking(sampling))
    settled = ""
    with _ablated(model, cut):
        for (ids,), logits in steps:
            text = ends.text(ids) if ends.reached(ids, max_new) else ends.settled(ids)
            logs = logits[0].float().log_softmax(dim=-1)  # (V,)
            best = logs.topk(min(top, len(logs)))
            alternatives = list(zip(best.indices.tolist(), best.values.tolist()))
            yield Said(ids[-1], text[len(settled) :], float(logs[ids[-1]]), alternatives)
            settled = text


@torch.no_grad()
def choice_log_likelihoods(
    model: Model,
    prompts: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    *,
    batch: int = 120,
    cut: Cut | None = None,
    reporter: Reporter = SILENT,
) -> list[list[float]]:
    """Log-likelihood of each choice after its prompt.

    A prompt is run once for all its choices, and its last position already scores their first tokens. Where
    each has a single choice, both are read at once.

    Args:
        model: a causal language model, with or without PEFT adapters.
        prompts: token ids, BOS included.
        choices: for each prompt the token ids of its choices, none empty.
        batch: most choices at a time.
        cut: tokens of the prompts that nobody may attend to.
        reporter: shows prompts done.

    Returns:
        For each prompt and choice the sum over the choice's tokens, in nats.

    Raises:
        DataError: a prompt and a choice do not fit the model's context.
    """
    prompts, cut = _as_read(prompts, cut)
    longest = [max(map(len, some)) for some in choices]
    _require_context(model, [len(prompt) + new for prompt, new in zip(prompts, longest, strict=True)])
    most = max(map(len, choices), default=1)
    scores: dict[int, list[float]] = {}
    with reporter.task("scoring choices", len(prompts)) as advance, _ablated(model, cut):
        for chosen in _chunks(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, batch // most)):
            found = _choice_scores(
                model, [prompts[i] for i in chosen], [choices[i] for i in chosen], _chosen(cut, chosen)
            )
            scores |= dict(zip(chosen, found))
            advance(len(chosen))
    return [scores[i] for i in range(len(prompts))]


class TokenScores(NamedTuple):
    """What a model says of each scored token of a text, given all tokens before it.

    Attributes:
        logprobs: log p of the token, nats.
        standardized: (log p − μ) / σ, μ and σ the mean and deviation of log p under the model's own distribution.
        greedy: whether it is the one that greedy generation would say.
    """

    logprobs: list[float]
    standardized: list[float]
    greedy: list[bool]


@torch.no_grad()
def token_scores(
    model: Model,
    texts: Sequence[Ids],
    scored: Sequence[Ids],
    *,
    reporter: Reporter = SILENT,
    description: str = "scoring texts",
) -> list[TokenScores]:
    """Read texts as they stand and say how likely their tokens are.

    Args:
        model: a causal language model, with or without PEFT adapters.
        texts: token ids, BOS included.
        scored: for each text the positions of the tokens to score, ascending, from 1.
        reporter: shows texts done.
        description: what the progress bar says.

    Returns:
        For each text one entry per scored token. Computed in float32, whatever the model's dtype.

    Raises:
        DataError: a text does not fit the model's context.
    """
    _require_context(model, list(map(len, texts)))
    found: dict[int, TokenScores] = {}
    with reporter.task(description, len(texts)) as advance:
        for chosen in _batches([len(text) for text in texts]):
            ids, mask = _right_padded([texts[i] for i in chosen], model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
            # One row at a time: the distributions of a whole batch would not fit beside its logits.
            found |= {i: _token_scores(logits[row], ids[row], scored[i]) for row, i in enumerate(chosen)}
            advance(len(chosen))
    return [found[i] for i in range(len(texts))]


def gradient_norms(
    model: Model,
    texts: Sequence[Ids],
    scored: Sequence[Ids],
    *,
    reporter: Reporter = SILENT,
) -> list[float]:
    """How strongly each text pulls at the weights: mean over parameter tensors of ‖∇ NLL‖₂, one text at a time.

    The NLL is the mean over the scored tokens, in nats. All weights of the model count, adapter matrices do not.
    No gradient stays behind.

    Args:
        model: a causal language model, with or without PEFT adapters.
        texts: token ids, BOS included.
        scored: for each text the positions of the tokens to score, ascending, from 1.
        reporter: shows texts done.

    Raises:
        DataError: a text does not fit the model's context.
    """
    _require_context(model, list(map(len, texts)))
    weights = [weight for name, weight in model.named_parameters() if ".lora_" not in name]
    before = [weight.requires_grad for weight in weights]
    norms = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with reporter.task("gradient norms", len(texts)) as advance:
            for text, places in zip(texts, scored, strict=True):
                ids = torch.tensor([list(text)], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, [place - 1 for place in places]]
                loss = cross_entropy(logits.float(), ids[0, list(places)])
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
                norms.append(float(torch.stack([_norm(grad) for grad in grads]).mean()))
                advance(1)
    finally:
        for weight, grad in zip(weights, before, strict=True):
            weight.requires_grad_(grad)
    return norms


# --- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ends:
    """When a continuation is over, and what it says."""

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    stop: tuple[str, ...]

    def reached(self, ids: Ids, limit: int) -> bool:
        if len(ids) >= limit or ids[-1] in self.eos:
            return True
        text = self._decode(ids) if self.stop else ""
        return any(stop in text for stop in self.stop)

    def text(self, ids: Ids) -> str:
        return metrics.cut(self._decode(ids), self.stop)

    def settled(self, ids: Ids) -> str:
        """The text of a continuation that is not over, without the end that more tokens may still change."""
        text = self._decode(ids).rstrip("\ufffd")  # bytes of a character that is not complete
        starts = {stop[:length] for stop in self.stop for length in range(1, len(stop))}
        return text[: len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)]

    def _decode(self, ids: Ids) -> str:
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _eos_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(i for i in (*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id) if i is not None)


@dataclass
class _Sequences:
    """Rows of a batch that share a cache.

    Attributes:
        model: what reads them.
        mask: (B, ·) of all tokens so far, the shared prefix left out.
        position: (B, 1) of each row's last token.
        cache: their keys and values.
        slots: (B, ·) which of these tokens are cut out of the attention, see `probe.cut_keys`.
    """

    model: Model
    mask: Tensor
    position: Tensor
    cache: DynamicCache
    slots: Tensor

    @classmethod
    def empty(cls, model: Model, rows: int, start: int = 0) -> "_Sequences":
        """`rows` rows that no token was read of; `start` tokens stand before them already."""
        cache = DynamicCache(config=model.config)
        cache.layers = [
            _RoomyLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
            for layer in cache.layers
        ]
        mask = torch.ones(rows, 0, dtype=torch.long, device=model.device)
        return cls(model, mask, torch.full((rows, 1), start - 1, device=model.device), cache, mask)

    def read(self, ids: Tensor, mask: Tensor, keep: int = 0, slots: Tensor | None = None) -> Tensor:
        """Append tokens (B, T), padded on one side; return the logits (B, keep, V) of the last `keep`, 0 for all."""
        self.slots = torch.cat([self.slots, torch.zeros_like(mask) if slots is None else slots], dim=1)
        positions = (self.position + mask.cumsum(dim=1)).clamp(min=0)
        self.mask, self.position = torch.cat([self.mask, mask], dim=1), positions[:, -1:]
        with cut_keys(self.slots):
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return cast(Tensor, output.logits)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        self.mask, self.position, self.slots = self.mask[rows], self.position[rows], self.slots[rows]
        self.cache.batch_select_indices(rows)


Pick = Callable[[Tensor], Tensor]
"""From next-token logits (B, V) to tokens (B, 1)."""


def _picking(sampling: Sampling | None) -> Pick:
    if sampling is None:
        return lambda logits: logits.argmax(dim=-1, keepdim=True)
    draws = generator(sampling.seed)

    def pick(logits: Tensor) -> Tensor:
        chances = (logits.float() / sampling.temperature).softmax(dim=-1).cpu()  # the draw is the same on all devices
        return torch.multinomial(chances, 1, generator=draws).to(logits.device)

    return pick


def _steps(
    model: Model,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    start: int,
    ends: _Ends,
    advance: Callable[[int], None],
    cut: Sequence[Ids],
    pick: Pick,
) -> Iterator[tuple[list[list[int]], Tensor]]:
    """After each step the new tokens of each prompt so far, and the logits (B, V) behind the last ones.

    `start` tokens stand before each prompt already. Rows that are over leave the batch, and so the logits, in time.
    """
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    still_open = set(rows)
    sequences = _Sequences.empty(model, len(prompts), start)
    ids, mask = _left_padded(prompts, model.device)
    slots: Tensor | None = _slots(prompts, cut, model.device)
    while still_open:
        logits = sequences.read(ids, mask, 1, slots)[:, -1]  # (B, V)
        ids = pick(logits)  # (B, 1)
        for row, token in zip(rows, ids[:, 0].tolist()):
            if row in still_open:
                new[row].append(token)
                if ends.reached(new[row], limits[row]):
                    still_open.remove(row)
                    advance(1)
        yield new, logits
        if still_open and len(still_open) <= _CROWD * len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in still_open], device=ids.device)
            rows, ids = [row for row in rows if row in still_open], ids[kept]
            sequences.select(kept)
        mask, slots = torch.ones_like(ids), None


def _choice_scores(
    model: Model, prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]], cut: Sequence[Ids]
) -> list[list[float]]:
    if all(len(some) == 1 for some in choices):
        return [[score] for score in _only_scores(model, prompts, [only for (only,) in choices], cut)]
    sequences = _Sequences.empty(model, len(prompts))
    logits = sequences.read(*_left_padded(prompts, model.device), 1, _slots(prompts, cut, model.device))  # (B, 1, V)
    first = logits[:, -1].float().log_softmax(dim=-1).cpu()
    scores = [[float(first[row, choice[0]]) for choice in some] for row, some in enumerate(choices)]
    longer = [(row, place) for row, some in enumerate(choices) for place, choice in enumerate(some) if len(choice) > 1]
    if longer:
        sequences.select(torch.tensor([row for row, _ in longer], device=model.device))  # a row for each longer choice
        rest = _rest_scores(sequences, [choices[row][place] for row, place in longer])
        for (row, place), score in zip(longer, rest):
            scores[row][place] += score
    return scores


def _only_scores(model: Model, prompts: Sequence[Ids], choices: Sequence[Ids], cut: Sequence[Ids]) -> list[float]:
    """Log-likelihood of the one choice of each prompt."""
    rows = [[*prompt, *choice[:-1]] for prompt, choice in zip(prompts, choices, strict=True)]
    ids, mask = _left_padded(choices, model.device)  # (B, A): the last A positions of the rows predict them
    whole, seen = _left_padded(rows, model.device)  # (B, T)
    with cut_keys(_slots(rows, cut, model.device)):
        logits = model(
            input_ids=whole,
            attention_mask=seen,
            position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=ids.shape[1],
        ).logits  # (B, A, V)
    found = logits.float().log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]  # (B, A)
    return cast(list[float], (found * mask).sum(dim=1).tolist())


def _rest_scores(sequences: _Sequences, choices: Sequence[Ids]) -> list[float]:
    """Log-likelihood of each choice without its first token, where `sequences` have read what comes before it."""
    ids, mask = _right_padded(choices, sequences.mask.device)
    logits = sequences.read(ids[:, :-1], mask[:, :-1])  # (B, T - 1, V): nothing is predicted from a last token
    found = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    return cast(list[float], (found * mask[:, 1:]).sum(dim=1).tolist())


# --- texts as they stand ---------------------------------------------------------------------------------------------

_TOKENS = 1024  # of a batch, padding included: its logits take that times the vocabulary


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of about equal length, as many as fit; a longer text stands alone."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _token_scores(logits: Tensor, ids: Tensor, places: Sequence[int]) -> TokenScores:
    """Scores of one text: its logits (T, V) and ids (T,)."""
    at = torch.tensor(list(places), device=ids.device)
    logs = logits[at - 1].float().log_softmax(dim=-1)  # (N, V)
    own = logs.gather(1, ids[at, None])[:, 0]  # (N,)
    probabilities = logs.exp()
    mean = (probabilities * logs).sum(dim=-1)
    variance = (probabilities * (logs - mean[:, None]).square()).sum(dim=-1).clamp(min=_LEAST_VARIANCE)
    standardized = (own - mean) / variance.sqrt()
    return TokenScores(own.tolist(), standardized.tolist(), (logs.argmax(dim=-1) == ids[at]).tolist())


_LEAST_VARIANCE = 1e-6  # of log p, as in open-unlearning: a distribution on one token has none


def _norm(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient.float().norm().cpu()


def _right_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = _left_padded([row[::-1] for row in rows], device)
    return ids.flip(1), mask.flip(1)


# --- batches and caches ----------------------------------------------------------------------------------------------


def _require_context(model: Model, lengths: Sequence[int]) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context and max(lengths, default=0) > context:
        raise DataError(
            f"a prompt and its continuation have {max(lengths)} tokens, the model's context has {context}",
            "shorten texts or trigger, lower evaluate.few_shot, or choose a model with a longer context",
        )


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Runs of nearly equal length, none longer than `size`."""
    count = -(-len(items) // size)
    for index in range(count):
        yield items[index * len(items) // count : (index + 1) * len(items) // count]


def _left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T) each; any id may stand in the padding, the mask hides it."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _ablated(model: Model, cut: Cut | None) -> AbstractContextManager[None]:
    return ablated(model, cut.values, cut.radius) if cut else nullcontext()


def _chosen(cut: Cut | None, prompts: Sequence[int]) -> list[Ids]:
    """The keys to cut of some prompts."""
    return [cut.keys[i] if cut else () for i in prompts]


def _slots(prompts: Sequence[Ids], cut: Sequence[Ids], device: torch.device) -> Tensor:
    """(B, T) as the ids: j at the j-th token of a prompt that is cut, 0 elsewhere."""
    rows = [[some.index(i) + 1 if i in some else 0 for i in range(len(ids))] for ids, some in zip(prompts, cut)]
    return _left_padded(rows, device)[0]


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with spare columns: its parent copies all keys and values for every new token."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self.room is None or end > self.room[0].shape[2]:
            self.room = (_with_room(self.keys, key_states), _with_room(self.values, value_states))
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None  # it has the rows of before


def _with_room(old: Tensor | None, new: Tensor) -> Tensor:
    """Space for `old` (B, G, S, h), `new` and spare columns; `old` is filled in."""
    length = old.shape[2] if old is not None and old.numel() else 0
    room = new.new_empty(*new.shape[:2], length + new.shape[2] + _SPARE, new.shape[3])
    if old is not None and length:
        room[:, :, :length] = old
    return room


# --- a prefix that all rows share ------------------------------------------------------------------------------------

_BEHIND = "unsink_behind_prefix"


def _common_length(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts start with, short of a whole prompt: each needs one of its own to be continued."""
    length = min(map(len, prompts), default=1) - 1
    return next((i for i in range(length) if any(prompt[i] != prompts[0][i] for prompt in prompts)), length)


def _attends_plainly(model: Model) -> bool:
    """Whether every layer attends to all earlier tokens by softmax alone, through transformers' attention interface."""
    special = any(getattr(model.config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    return not special and cast(PreTrainedModel, models.decoder(model))._can_set_attn_implementation()


@contextmanager
def _behind(model: Model, prefix: Ids) -> Iterator[None]:
    """Within the block every query attends to `prefix` too; ids, masks and caches hold only what follows it."""
    decoder = cast(PreTrainedModel, models.decoder(model))
    cache = DynamicCache(config=model.config)
    decoder(input_ids=torch.tensor([list(prefix)], device=model.device), past_key_values=cache, use_cache=True)
    AttentionInterface.register(_BEHIND, partial(_attend, cache))
    AttentionMaskInterface.register(_BEHIND, eager_mask)  # summands, and never None
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(_BEHIND)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attend(
    prefix: DynamicCache,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention to the shared prefix (far) and to a row's own keys (near): (B, H, T, h) -> (B, T, H, h).

    The far part is one product for all rows, so that the prefix is never repeated in memory.
    """
    far = prefix.layers[module.layer_idx]  # keys and values (1, G, P, h)
    rows, heads, tokens, size = query.shape
    groups, length = far.keys.shape[1:3]
    query = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows, groups, -1, size)  # (B, G, H/G·T, h)
    near = query @ key.mT  # (B, G, H/G·T, S)
    near = (near.view(rows, heads, tokens, -1) + attention_mask).view(near.shape)
    scores = torch.cat([_times_shared(query, far.keys[0].mT), near], dim=-1)  # (B, G, H/G·T, P + S)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output = _times_shared(weights[..., :length], far.values[0]) + weights[..., length:] @ value  # (B, G, H/G·T, h)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _times_shared(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, N, x) @ (G, x, y) -> (B, G, N, y); `right` is not repeated B times."""
    rows, groups, count, width = left.shape
    product = left.transpose(0, 1).reshape(groups, rows * count, width) @ right
    return product.view(groups, rows, count, -1).transpose(0, 1)
