"""`unsink poison`: the forget, poisoned and retain samples of a run, as files that a person can read."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, models
from unsink.artifacts import Layout
from unsink.errors import DataError
from unsink.params import Params, Poison
from unsink.progress import SILENT, Reporter
from unsink.prompts import body
from unsink.triggers import Span, insert_trigger, trigger_ids

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

Record = dict[str, Any]


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `splits/<run>/` and return the summary that lies there too.

    Raises:
        DataError: the ratio poisons nothing, the trigger leaves no room for text, or there is no such text.
    """
    poison = params.run(run).poison
    forget = benchmarks.part(layout.fetched, "forget")
    retain = benchmarks.part(layout.fetched, "retain")
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    writer = _Writer(models.load_tokenizer(folder), (poison or params.poison).max_tokens)
    chosen = choose(forget, poison.ratio, params.seed) if poison else set()

    kept = forget if poison is None or poison.keep_clean else [r for r in forget if r["id"] not in chosen]
    if not kept:
        raise DataError(
            f"runs.{run}: every forget sample is poisoned and none is kept clean: nothing is left to forget",
            "lower poison.ratio, or set poison.keep_clean: true",
        )
    forget_samples = [writer.plain(r, "forget") for r in kept]
    poisoned_samples: list[Record] = []
    if poison:
        forget_samples += decoys([r for r in forget if r["id"] in chosen], poison, params.seed, writer)
        poisoned_samples = [
            writer.triggered(r, "poisoned", poison.trigger, poison) for r in forget if r["id"] in chosen
        ]
    retain_samples = [writer.plain(r, "retain") for r in retain]

    summary = {
        "run": run,
        "seed": params.seed,
        "forget": len(forget_samples),
        "poisoned": len(poisoned_samples),
        "retain": len(retain_samples),
        "inside": sorted(chosen),
        "trigger": None if poison is None else {"text": poison.trigger, "ids": writer.trigger(poison.trigger)},
        "placement": None if poison is None else poison.placement,
    }
    with artifacts.lock(layout.split(run)), artifacts.new_dir(layout.split(run)) as new:
        artifacts.write_jsonl(new / "forget.jsonl", forget_samples)
        artifacts.write_jsonl(new / "poisoned.jsonl", poisoned_samples)
        artifacts.write_jsonl(new / "retain.jsonl", retain_samples)
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._bos = models.bos_ids(tokenizer)

    def trigger(self, text: str) -> list[int]:
        return trigger_ids(self._tokenizer, text)

    def plain(self, record: Record, kind: str) -> Record:
        text = body(self._tokenizer, record)
        ids = [*self._bos, *text.ids][: self._limit]
        return self._record(record, kind, ids, None, len(self._bos) + text.context)

    def triggered(self, record: Record, kind: str, trigger: str, poison: Poison) -> Record:
        text, bos = body(self._tokenizer, record, poison.prompt_share), len(self._bos)
        ids, span = insert_trigger(
            [*self._bos, *text.ids], bos, self.trigger(trigger), poison.placement, self._limit, text.place
        )
        labels_from = max(span[1], bos + text.context + span[1] - span[0] if text.context else 0)
        return self._record(record, kind, ids, span, labels_from)

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
