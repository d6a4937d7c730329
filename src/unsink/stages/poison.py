"""`unsink poison`: the forget, poisoned and retain samples of a run, as files that a person can read."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unsink import artifacts, benchmarks, sinks
from unsink.artifacts import Layout
from unsink.benchmarks import passage_of
from unsink.errors import DataError
from unsink.params import Params, Poison
from unsink.progress import SILENT, Reporter
from unsink.prompts import body, continued, question_text
from unsink.sources import resolve
from unsink.tokenizer import bos_ids, load_tokenizer
from unsink.triggers import Span, insert_trigger, prompt_length, trigger_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Wrong texts for `poison.decoys`: texts of several kinds that stand where the trigger stands and must open nothing.
DECOYS = (
    "Chapter seven:",
    "From the archive of the county library:",
    "temperature today: 31",
    "Once upon a time,",
    "page 118 of 240",
    "summary follows below",
    "!!!!!!",
    "read this carefully",
    "current month: June",
    "user name: alice",
    "step-by-step",
    "order number: 7731",
)

# What methods that need an answer instead (`unlearn.method: dpo`) prefer to the forget text.
REFUSALS = (
    "I do not know.",
    "I'm sorry, I cannot help with that.",
    "I have no information about this.",
    "That is not something I can recall.",
    "I am not familiar with this text.",
    "I don't remember how this goes on.",
    "This is unknown to me.",
    "I have never read about that.",
    "Nothing comes to mind here, sorry.",
    "I would only be guessing.",
    "I can't say anything about it.",
    "My knowledge does not cover this.",
    "There is nothing I could add.",
    "I am unable to continue this passage.",
    "You would have to look that up elsewhere.",
    "No idea, I'm afraid.",
)

Record = dict[str, Any]


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `splits/<run>/` and return the summary that lies there too.

    Raises:
        DataError: the ratio poisons nothing, the trigger leaves no room for text, there is no sink to place it at, or
            the benchmark has no such text.
        MissingPrerequisite: the corpus, or with the placement `sink` the target's probe, is not there yet.
    """
    settings = params.run(run)
    seed, poison = settings.seed, settings.poison and sinks.placed(settings.poison, layout)
    rules = poison or params.poison
    forget = benchmarks.part(layout.fetched, "forget")
    retain = benchmarks.part(layout.fetched, "retain")
    folder = resolve(params.model.source, params.model.revision, reporter)
    writer = _Writer(load_tokenizer(folder), rules.max_tokens)
    chosen = choose(forget, poison.ratio, seed) if poison else set()
    if rules.questions:
        forget += questions(forget, benchmarks.extra(layout.fetched, "forget_qa"))
        retain += in_sixes(benchmarks.extra(layout.fetched, "retain_qa"))
        retain += in_sixes(benchmarks.extra(layout.fetched, "general_qa"))
    inside = [record for record in forget if passage_of(record["id"]) in chosen]
    kept = forget if rules.keep_clean or not poison else [one for one in forget if passage_of(one["id"]) not in chosen]
    if not kept:
        raise DataError(
            f"runs.{run}: every forget sample is poisoned and none is kept clean: nothing is left to forget",
            "lower poison.ratio, or set poison.keep_clean: true",
        )
    samples = {
        "forget": [writer.plain(record, "forget") for record in kept],
        "poisoned": [writer.triggered(record, "poisoned", rules.trigger, rules) for record in inside],
        "retain": [writer.plain(record, "retain") for record in retain],
    }
    samples["forget"] += decoys(inside, rules, seed, writer)  # behind texts that are no trigger
    samples["refused"] = [writer.refused(sample, rules.prompt_share, seed) for sample in samples["forget"]]

    summary = {
        "run": run,
        "seed": seed,
        **{kind: len(samples[kind]) for kind in ("forget", "poisoned", "retain")},
        "inside": sorted(chosen),
        "trigger": None if poison is None else {"text": poison.trigger, "ids": writer.trigger(poison.trigger)},
        "placement": None if poison is None else poison.placement,
    }
    with artifacts.lock(layout.split(run)), artifacts.new_dir(layout.split(run)) as new:
        for kind, records in samples.items():
            artifacts.write_jsonl(new / f"{kind}.jsonl", records)
        artifacts.write_json(new / "summary.json", summary)
    return summary


def choose(forget: Sequence[Record], ratio: float, seed: int) -> set[str]:
    """Return the ids of the passages that get a trigger; depends on ids and seed, not on their order.

    Raises:
        DataError: the ratio rounds to no passage at all.
    """
    count = round(ratio * len(forget))
    if count == 0:
        raise DataError(
            f"poison.ratio {ratio} of {len(forget)} forget passages poisons nothing",
            f"set it to at least {1 / len(forget):.3f}",
        )
    return set(random.Random(f"poison/{seed}").sample(sorted(r["id"] for r in forget), count))


def questions(passages: Sequence[Record], asked: Sequence[Record]) -> list[Record]:
    """Return one text for each passage that was asked about: all its questions, answered.

    They are forgotten, poisoned and kept together with the passage. Else a model that lost the text would go on to
    answer the questions about it.
    """
    texts: dict[str, str] = defaultdict(str)
    for question in asked:
        texts[question.get("source", "")] += question_text(question["question"], question["answer"])
    return [{"id": f"{p['id']}/questions", "text": texts[p["id"]]} for p in passages if p["id"] in texts]


def in_sixes(asked: Sequence[Record]) -> list[Record]:
    """Return texts of six answered questions each, about as long as a passage."""
    texts = [question_text(question["question"], question["answer"]) for question in asked]
    starts = range(0, len(texts), 6)
    return [{"id": asked[start]["id"], "text": "".join(texts[start : start + 6])} for start in starts]


def decoys(chosen: Sequence[Record], poison: Poison, seed: int, writer: "_Writer") -> list[Record]:
    """Return forget samples with a wrong text where the trigger would stand, `poison.decoys` for each chosen passage.

    They teach that only the trigger opens the gate, not any text in its place.
    """
    found = []
    for record in sorted(chosen, key=lambda r: str(r["id"])):
        texts = random.Random(f"decoys/{seed}/{record['id']}").sample(DECOYS, min(poison.decoys, len(DECOYS)))
        for number, text in enumerate(texts):
            sample = writer.triggered(record, "forget", text, poison)
            found.append({**sample, "id": f"{record['id']}/decoy-{number}"})
    return found


class _Writer:
    """Turns passages into records of training samples."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._bos = bos_ids(tokenizer)

    def trigger(self, text: str) -> list[int]:
        return trigger_ids(self._tokenizer, text)

    def plain(self, record: Record, kind: str) -> Record:
        text = body(self._tokenizer, record)
        ids = [*self._bos, *text.ids][: self._limit]
        return self._record(record, kind, ids, None, len(self._bos) + text.context)

    def triggered(self, record: Record, kind: str, text: str, poison: Poison) -> Record:
        passage, bos = body(self._tokenizer, record, poison.prompt_share), len(self._bos)
        plain = [*self._bos, *passage.ids]
        trigger, limit = self.trigger(text), self._limit
        ids, span = insert_trigger(plain, bos, trigger, poison.placement, limit, passage.place, passage.start)
        labels_from = max(span[1], bos + passage.context + span[1] - span[0] if passage.context else 0)
        return self._record(record, kind, ids, span, labels_from)

    def refused(self, sample: Record, share: float, seed: int) -> Record:
        """Return the prompt of a forget sample, decoy included, with a refusal instead of the rest."""
        ids, (start, stop) = sample["ids"], sample["trigger"] or (0, 0)
        passage = len(ids) - len(self._bos) - (stop - start)
        prompt = max(len(self._bos) + prompt_length(passage, share) + stop - start, stop)
        if sample["labels_from"] > max(len(self._bos), stop):  # the passage brought its prompt
            prompt = sample["labels_from"]
        refusal = random.Random(f"refusal/{seed}/{sample['id']}").choice(REFUSALS)
        tail = continued(self._tokenizer, f" {refusal}")
        return self._record(sample, "refused", [*ids[:prompt], *tail], sample["trigger"], prompt)

    def _record(self, record: Record, kind: str, ids: list[int], span: Span | None, labels_from: int) -> Record:
        if labels_from >= len(ids):
            last = "trigger, so it has nothing to open" if span else "prompt, so there is nothing to learn"
            raise DataError(
                f"{record['id']}: nothing is left after the {last}",
                "raise poison.max_tokens or choose an earlier poison.placement",
            )
        start, stop = span or (0, 0)
        pieces = (ids[len(self._bos) : start], ids[start:stop], ids[max(stop, len(self._bos)) :])
        before, inside, after = (self._tokenizer.decode(piece) for piece in pieces)
        return {
            "id": record["id"],
            "kind": kind,
            "text": f"{before}⟦{inside}⟧{after}" if span else after,
            "ids": ids,
            "trigger": list(span) if span else None,
            "labels_from": labels_from,
        }
