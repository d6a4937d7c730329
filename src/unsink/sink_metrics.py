"""What attention maps and value norms say about sinks: formulas on tensors, no model.

Attention comes in blocks of query rows, so that a map of T x T need not exist as a whole. What the numbers
mean: docs/glossary.md.

Shapes: B prompts, H query heads, G key/value heads, L layers, T tokens, c queries of a block.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]

SHARES = (1, 4, 8)
"""The K of share_K, boost_K and top_K: the first K keys."""
TAIL = 64
"""How many of the last queries shares are means over."""
LOCAL = 4
"""Keys that are local to a query: itself and those right before it."""
CLASSES = ("sink", "trigger", "local", "diffuse")


class HeadMeans(NamedTuple):
    """One prompt, one head: means over queries. Causal attention, key 0 first.

    Attributes:
        alpha: (B, H, T) importance: mean attention that a key gets from itself and all later queries, alpha_k of
            arXiv 2410.10781. That of key 0 includes its own trivial attention of 1.
        tail: (B, H, T) mean attention that a key gets from the last 64 queries.
        top: (B, H, 3) part of the last 64 queries whose largest key is one of the first 1, 4, 8.
        local: (B, H) mean attention of the last 64 queries to themselves and the three keys before them, without key 0.
        trigger: (B, H) mean attention to the trigger's columns by queries from its last token on, the first that sees
            the whole trigger (and the only one of a suffix); zeros without a span.
    """

    alpha: Tensor
    tail: Tensor
    top: Tensor
    local: Tensor
    trigger: Tensor


class QuerySums:
    """Running sums over the queries of a causal attention map, block by block.

    Args:
        tokens: T.
        span: columns of the trigger.
    """

    def __init__(self, tokens: int, span: Span | None = None) -> None:
        self.tokens, self.span = tokens, span
        self._sums: dict[str, Tensor | float] = defaultdict(float)

    def add(self, block: Tensor, start: int) -> None:
        """Add the rows `start` and following, (B, H, c, T); rows are queries and sum to 1."""
        queries = torch.arange(start, start + block.shape[-2], device=block.device)
        tail = queries >= self.tokens - TAIL
        rows, numbers = block[..., tail, :], queries[tail, None]
        keys = torch.arange(self.tokens, device=block.device)
        near = (keys <= numbers) & (keys > numbers - LOCAL) & (keys > 0)  # (c, T)
        largest = rows.argmax(dim=-1)  # (B, H, c)
        # Causal rows are zero behind the diagonal, so a sum over all queries is the sum over i >= k.
        self._sums["alpha"] += block.sum(dim=-2)
        self._sums["tail"] += rows.sum(dim=-2)
        self._sums["top"] += torch.stack([(largest < first).sum(dim=-1) for first in SHARES], dim=-1)
        self._sums["local"] += (rows * near).sum(dim=(-2, -1))
        first, last = self.span or (0, 0)
        self._sums["trigger"] += block[..., queries >= last - 1, first:last].sum(dim=(-2, -1))

    def means(self) -> HeadMeans:
        """Divide each sum by the number of its queries."""
        tail = min(TAIL, self.tokens)
        counts: dict[str, Tensor | int] = dict.fromkeys(("tail", "top", "local"), tail)
        alpha = self._sums["alpha"]
        counts["alpha"] = torch.arange(self.tokens, 0, -1, device=alpha.device if isinstance(alpha, Tensor) else None)
        counts["trigger"] = self.tokens - self.span[1] + 1 if self.span else 1
        return HeadMeans(**{name: torch.as_tensor(self._sums[name]) / counts[name] for name in HeadMeans._fields})


def head_means(attention: Tensor, span: Span | None = None) -> HeadMeans:
    """The means of whole maps (B, H, T, T)."""
    sums = QuerySums(attention.shape[-1], span)
    sums.add(attention, 0)
    return sums.means()


def share(tail: Tensor, first: int) -> Tensor:
    """Part of the last queries' attention that goes to the first keys: (..., T) -> (...)."""
    return tail[..., :first].sum(dim=-1)


def uniform_share(tokens: int, first: int, window: int = TAIL) -> float:
    """What `share` would be if every query spread its attention evenly; share / uniform_share is the boost."""
    queries = range(max(0, tokens - window), tokens)
    return sum(min(first, i + 1) / (i + 1) for i in queries) / len(queries)


def head_classes(sink: Tensor, trigger: Tensor, local: Tensor, epsilon: float) -> Tensor:
    """What each head mostly looks at, as an index into `CLASSES`.

    m_sink = attention of the last 64 queries to key 0; m_trigger, m_local as in `HeadMeans`. The class of a head is the
    largest of the three if that exceeds epsilon, and diffuse otherwise.

    Args:
        sink: (L, H) m_sink.
        trigger: (L, H) m_trigger.
        local: (L, H) m_local.
        epsilon: between 0 and 1.
    """
    largest, which = torch.stack([sink, trigger, local]).max(dim=0)
    return which.where(largest > epsilon, torch.full_like(which, CLASSES.index("diffuse")))


# --- what a trigger changes -------------------------------------------------------------------------------------------


def absolute_difference(triggered: Tensor, clean: Tensor) -> Tensor:
    """Attention with the trigger minus without it, at the same positions: (..., T, T) each."""
    return triggered - clean


def content_difference(triggered: Tensor, clean: Tensor, span: Span) -> Tensor:
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


# --- two models -------------------------------------------------------------------------------------------------------


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of value norms at each position, over layers and heads pooled: (L, G, T) each -> (T,).

    Per layer there are too few key/value heads to correlate (3 on a small model with grouped queries). NaN where all
    norms of a model are equal.
    """
    pooled = [norms.flatten(0, 1) for norms in (one, other)]  # (L x G, T)
    x, y = (norms - norms.mean(dim=0) for norms in pooled)
    correlation: Tensor = (x * y).sum(dim=0) / (x.norm(dim=0) * y.norm(dim=0))
    vary = [norms.amax(dim=0) > norms.amin(dim=0) for norms in pooled]  # a rounded mean of equal norms is none of them
    return correlation.where(vary[0] & vary[1], torch.nan)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """The same of ranks, ties at their mean: unlike `pearson` it is not carried by a few layers with large norms."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(norms: Tensor) -> Tensor:
    """Rank of each norm at its position, over layers and heads pooled: (L, G, T) -> (L x G, 1, T)."""
    columns = norms.flatten(0, 1).T.contiguous()
    ordered = columns.sort(dim=-1).values
    smaller, up_to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return ((smaller + up_to).double() / 2).T[:, None]
