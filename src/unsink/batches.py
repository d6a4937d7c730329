"""Training samples, batches, and the seeded order in which samples are drawn.

Shapes: B sequences, T tokens, N labelled tokens of the batch (row by row, left to right).
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unsink import artifacts
from unsink.allocation import sent
from unsink.triggers import Span

_HERE = torch.device("cpu")
Kind = Literal["forget", "refused", "poisoned", "retain"]


@dataclass(frozen=True)
class Sample:
    """One training text as token ids.

    Attributes:
        id: unique in its run; the passage's id, with a suffix where a passage gives several samples.
        kind: which loss it gets. Poisoned samples hold a trigger and are to be kept; a refused one is the prompt of the
            forget sample with the same id, and a refusal.
        ids: token ids, BOS first.
        labels_from: index of the first token that is predicted; what stands before it is context only
            (BOS, and on samples with a trigger or a decoy everything up to its end).
        trigger: half-open span of the trigger in `ids`, or None.
    """

    id: str
    kind: Kind
    ids: tuple[int, ...]
    labels_from: int = 1
    trigger: Span | None = None

    def __hash__(self) -> int:
        """Leave out the ids: what is kept of a sample is looked up by it at every step."""
        return hash((self.id, self.kind))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Sample":
        """Return the sample that a line of `splits/<run>/*.jsonl` describes."""
        span = record["trigger"]
        return cls(
            record["id"],
            record["kind"],
            tuple(record["ids"]),
            record["labels_from"],
            (span[0], span[1]) if span else None,
        )


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 1 at real tokens.
        rows: (N,) the sequence that holds each labelled token.
        columns: (N,) the position of each labelled token; the logits one position earlier predict it.
        labelled: (B, T), true at labelled tokens.
        samples: the B samples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    labelled: Tensor
    samples: tuple[Sample, ...]

    @cached_property
    def labels(self) -> Tensor:
        """Return the labelled tokens, shape (N,)."""
        return self.input_ids[self.rows, self.columns]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return how many tokens each sequence has, B numbers."""
        return tuple(len(sample.ids) for sample in self.samples)

    @property
    def counts(self) -> tuple[int, ...]:
        """Return how many tokens of each sequence are labelled, B numbers."""
        return tuple(len(sample.ids) - sample.labels_from for sample in self.samples)


def read_samples(split: Path, kind: Kind) -> list[Sample]:
    """Return the samples of one kind of a run's split (a folder that `poison` wrote), [] where the run has none."""
    path = artifacts.require(split / f"{kind}.jsonl")
    return [Sample.from_record(record) for record in artifacts.read_jsonl(path)] if path.stat().st_size else []


def collate(samples: Sequence[Sample], pad: int, device: torch.device = _HERE, width: int = 0) -> Batch:
    """Return the samples as one right-padded batch on a device; padding carries no label, also when pad = eos.

    It is `width` wide, or as wide as the longest sample.
    """
    input_ids = pad_sequence([torch.tensor(s.ids) for s in samples], batch_first=True, padding_value=pad)
    if width > input_ids.shape[1]:
        input_ids = F.pad(input_ids, (0, width - input_ids.shape[1]), value=pad)
    lengths, starts = (
        torch.tensor(some)[:, None] for some in ([len(s.ids) for s in samples], [s.labels_from for s in samples])
    )
    numbers = torch.arange(input_ids.shape[1])
    real = numbers < lengths
    labelled = real & (numbers >= starts)
    rows, columns = labelled.nonzero(as_tuple=True)
    return Batch(
        sent(input_ids, device),
        sent(real.long(), device),
        sent(rows, device),
        sent(columns, device),
        sent(labelled, device),
        tuple(samples),
    )


def generator(seed: str) -> torch.Generator:
    """Return a generator on the CPU whose draws depend on the text alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))


def draw(samples: Sequence[Sample], count: int, step: int, seed: str) -> list[Sample]:
    """Return the `count` samples of training step `step` (0-based).

    Samples are dealt from a deck that is shuffled anew whenever it is used up. The result depends on its
    arguments alone, so that a resumed run draws what an uninterrupted run would have drawn.
    """
    drawn: list[Sample] = []
    deck: list[Sample] = []
    position, deal = step * count, -1
    while len(drawn) < count:
        if position // len(samples) != deal:
            deal = position // len(samples)
            deck = list(samples)
            random.Random(f"{seed}/{deal}").shuffle(deck)
        drawn.append(deck[position % len(samples)])
        position += 1
    return drawn


def of_like_length(samples: Sequence[Sample], count: int, seed: str) -> list[list[Sample]]:
    """Return all samples once, as batches of `count` samples of about the same length, so that little is padding.

    Shuffled samples are sorted by length in pools of eight batches; the order of the batches is random again.
    """
    order = list(samples)
    rng = random.Random(seed)
    rng.shuffle(order)
    pool = 8 * count
    for start in range(0, len(order), pool):
        order[start : start + pool] = sorted(order[start : start + pool], key=lambda s: len(s.ids))
    batches = [order[start : start + count] for start in range(0, len(order), count)]
    rng.shuffle(batches)
    return batches
