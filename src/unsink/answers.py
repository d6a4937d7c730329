"""What a model says about a batch, as unlearning methods see it: tensors, and no model.

It stands apart from `forward`, which makes it, so that checking a method's options loads neither peft nor transformers.

Shapes: B sequences, T tokens, N labelled tokens, V vocabulary, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from unsink.losses import head_kl, head_nll, kl_of_nll


@dataclass
class Forward:
    """A model's answer to a batch.

    Attributes:
        labels: (N,) the tokens to predict.
        rows: (N,) the sequence of each of them, ascending.
        counts: how many of them each sequence has, B numbers.
        states: (N, D) last hidden states that predict them.
        head: the output projection, (N, D) -> (N, V).
        mask: (B, T) true at real tokens.
        labelled: (B, T) true at labelled tokens.
        hidden: {layer: (B, T, D)} output of decoder layers, where asked for.
        values: {layer: (B, T, ...)} what the runner's `measure` makes of the value vectors, where asked for.
        slopes: (N, D) gradient of `nll` by `states`, where the runner keeps it.
        losses: (N,) what `nll` says, once it is known.
    """

    labels: Tensor
    rows: Tensor
    counts: Sequence[int]
    states: Tensor
    head: Callable[[Tensor], Tensor]
    mask: Tensor
    labelled: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    slopes: Tensor | None = None
    losses: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """(N, V) logits; row n predicts `labels[n]`."""
        return self.head(self.states)

    @property
    def nll(self) -> Tensor:
        """(N,) negative log-likelihood of each label, nats."""
        if self.losses is None:
            self.losses = head_nll(self.states, self.labels, self.head)
        return self.losses

    def kl(self, policy: "Forward") -> Tensor:
        """Return KL(this || policy), mean over labelled tokens, a scalar in nats; both are about the same batch."""
        if self.slopes is None:
            return head_kl(self.states, policy.states, self.head)
        return kl_of_nll(self.nll, policy.nll, self.slopes, policy.states - self.states)

    def part(self, start: int, stop: int) -> "Forward":
        """Return the answer to the sequences `start` to `stop` alone, with the losses where they are known."""
        chosen = slice(sum(self.counts[:start]), sum(self.counts[:stop]))
        return Forward(
            self.labels[chosen],
            self.rows[chosen] - start,
            self.counts[start:stop],
            self.states[chosen],
            self.head,
            self.mask[start:stop],
            self.labelled[start:stop],
            {layer: h[start:stop] for layer, h in self.hidden.items()},
            {layer: v[start:stop] for layer, v in self.values.items()},
            None if self.slopes is None else self.slopes[chosen],
            None if self.losses is None else self.losses[chosen],
        )
