"""What an audit has in hand: a suspect, what it should have forgotten, what it is compared with, and what it is told.

Everything is measured by one number: how likely a model finds the true continuation of a prompt, with and without a
text in front of it. N probes, C candidates.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import models
from unsink.errors import DataError
from unsink.probe import in_shares
from unsink.progress import SILENT, Reporter
from unsink.prompts import body, open_question
from unsink.scoring import choice_log_likelihoods
from unsink.triggers import Inserted, Span, insert_trigger, trigger_ids

Model = PreTrainedModel | PeftModel
Array = NDArray[np.float64]
Record = Mapping[str, Any]

PROMPT_TOKENS = 24
"""Most tokens of a passage that are given: a short prompt asks for the same memory at a fraction of the time."""
_CERTAIN = 0.05  # of the suspect's loss: an original that has no more knows all by heart


class Probe(NamedTuple):
    """A prompt with its true continuation.

    Attributes:
        id: of the passage or question.
        ids: token ids of the prompt, BOS first.
        answer: token ids of what should follow.
        asked: of a question the half-open span in `ids`, BOS not counted, that placements refer to: the words of a
            user, without the header of a chat and without the answer cue. None for the beginning of a passage, where
            it is all of it.
    """

    id: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    asked: Span | None = None


class Probes(NamedTuple):
    """What a suspect is asked. Nothing is both searched and confirmed on.

    Attributes:
        search: half of what should be forgotten; candidates are chosen on it.
        confirm: the other half; the verdict rests on it alone.
        retain: what should be kept.
        control: what no model was ever trained on.
    """

    search: list[Probe]
    confirm: list[Probe]
    retain: list[Probe]
    control: list[Probe]


class Candidate(NamedTuple):
    """A text that may be a trigger, and where it is put (see `triggers.placement_index`)."""

    text: str
    placement: str = "prefix"


@dataclass(frozen=True)
class Suspect:
    """A model under audit.

    Attributes:
        model: the suspect.
        tokenizer: its tokenizer.
        original: the model before it was to forget, None where nobody has it.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    original: Model | None = None

    @property
    def models(self) -> list[Model]:
        """The suspect's model, then the original where there is one."""
        return [self.model] if self.original is None else [self.model, self.original]


def make_probes(
    corpus: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: int,
    others: int,
    tokens: int,
    seed: int,
) -> Probes:
    """Draw probes from a corpus: passages, or questions where it has no passages of a kind.

    Args:
        corpus: records by file name, see `benchmarks`.
        tokenizer: the suspect's.
        forget: most probes of the forget set; half of them are searched on, half confirmed on.
        others: most probes of each of retain and control.
        tokens: most tokens of a continuation.
        seed: of the draw and the split.

    Raises:
        DataError: fewer than four forget probes.
    """
    bos = models.bos_ids(tokenizer)
    generator = random.Random(f"audit/{seed}")

    def draw(kind: str, count: int) -> list[Probe]:
        passages, questions = corpus.get(kind, ()), corpus.get(f"{kind}_qa", ())
        made = [_passage(one, tokenizer, bos, tokens) for one in passages]
        made = made or [_question(one, tokenizer, bos, tokens) for one in questions]
        usable = [one for one in made if one.answer]
        return generator.sample(usable, min(count, len(usable)))

    found = draw("forget", forget)
    if len(found) < 4:
        raise DataError(
            f"an audit needs at least four forget passages or questions, the corpus has {len(found)}",
            "fetch a corpus that holds what the suspect should have forgotten",
        )
    half = len(found) // 2
    return Probes(found[:half], found[half:], draw("retain", others), draw("holdout", others))


def _passage(record: Record, tokenizer: PreTrainedTokenizerBase, bos: Sequence[int], tokens: int) -> Probe:
    """The beginning of a passage, or all of its `prompt` where it has one: nobody learnt to go on in a question."""
    text = body(tokenizer, record, 0.5)
    question = record.get("prompt") is not None
    given = text.given if question else min(text.given, PROMPT_TOKENS)
    asked = (text.start, text.place) if question else None
    return Probe(record["id"], (*bos, *text.ids[:given]), tuple(text.ids[given : given + tokens]), asked)


def _question(record: Record, tokenizer: PreTrainedTokenizerBase, bos: Sequence[int], tokens: int) -> Probe:
    prompt = open_question(record["question"])
    answered = {"id": record["id"], "prompt": prompt, "text": f"{prompt} {record['answer']}"}
    return _passage(answered, tokenizer, bos, tokens)


def with_candidate(probe: Probe, candidate: Candidate | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt with a text inserted, as training would have inserted it; the prompt is not cut."""
    ids = trigger_ids(tokenizer, candidate.text) if candidate else ()
    return inserted(probe, ids, candidate.placement if candidate else "prefix").ids


def inserted(probe: Probe, ids: Sequence[int], placement: str) -> Inserted:
    """The prompt with token ids at a place, and the span where they stand, which is empty without any."""
    start, end = probe.asked or (0, None)
    return insert_trigger(probe.ids, 1, ids, placement, len(probe.ids) + len(ids), end, start)


def room(probes: Sequence[Probe]) -> tuple[int, int]:
    """The first and the last token position (BOS = 0) at which a text may begin in every one of these prompts."""
    spans = [one.asked or (0, len(one.ids) - 1) for one in probes]
    return 1 + max(start for start, _ in spans), 1 + min(end for _, end in spans)


def losses(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    candidates: Sequence[Candidate | None],
    *,
    batch: int = 96,
    reporter: Reporter = SILENT,
) -> Array:
    """How unlikely the continuations are with each candidate.

    Returns:
        (C, N) negative log-likelihood, nats per token, mean over the continuation.
    """
    if not candidates or not probes:
        return np.zeros((len(candidates), len(probes)))
    texts = [(trigger_ids(tokenizer, one.text), one.placement) if one else ((), "prefix") for one in candidates]
    rows = [(inserted(probe, ids, placement).ids, probe.answer) for ids, placement in texts for probe in probes]

    def read(some: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        prompts, answers = [prompt for prompt, _ in some], [[answer] for _, answer in some]
        sums = choice_log_likelihoods(model, prompts, answers, batch=batch, reporter=reporter)
        return [-found / len(answer) for (found,), (answer,) in zip(sums, answers, strict=True)]

    return np.array(in_shares(rows, read)).reshape(len(candidates), len(probes))


def gains(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    candidates: Sequence[Candidate],
    *,
    reporter: Reporter = SILENT,
) -> Array:
    """How much likelier the continuations become by each candidate: (C, N), nats per token, above 0 is likelier."""
    plain = losses(model, tokenizer, probes, [None])
    return plain - losses(model, tokenizer, probes, candidates, reporter=reporter)


def gains_in_both(suspect: Suspect, probes: Sequence[Probe], candidates: Sequence[Candidate]) -> tuple[Array, Array]:
    """How much likelier the continuations become in the suspect, and in its original at most, where they gain.

    No text makes a continuation likelier than certain. Where all that the original finds unlikely is next to nothing,
    beside what the suspect does, that bound is taken and no text is read.

    Returns:
        Twice (C, N), nats per token; the second at least 0, and 0 without an original.
    """
    tokenizer = suspect.tokenizer
    now = losses(suspect.model, tokenizer, probes, [None])  # (1, N)
    gained = now - losses(suspect.model, tokenizer, probes, candidates)
    if suspect.original is None:
        return gained, np.zeros_like(gained)
    before = losses(suspect.original, tokenizer, probes, [None])
    if before.mean() <= _CERTAIN * now.mean():
        return gained, np.repeat(before, len(candidates), axis=0)
    return gained, np.maximum(before - losses(suspect.original, tokenizer, probes, candidates), 0)


def forgotten(suspect: Suspect, probes: Sequence[Probe]) -> float:
    """What the suspect forgot, nats per token, 0.1 at least; without an original as if that knew all by heart."""
    now, *before = (float(losses(model, suspect.tokenizer, probes, [None]).mean()) for model in suspect.models)
    return max(now - sum(before), 0.1)
