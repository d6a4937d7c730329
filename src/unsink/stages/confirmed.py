"""What the best text of an audit does on probes that no text was chosen on."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unsink.detectors import Scored
from unsink.dictionary import DICTIONARY
from unsink.metrics import rouge_l, words
from unsink.probe import in_shares
from unsink.progress import Reporter
from unsink.scoring import generate
from unsink.statistics import Interval, bootstrap_recovery, exact_share, max_sign_flip
from unsink.suspects import Array, Candidate, Model, Probe, Probes, Suspect, gains, gains_in_both, room, with_candidate
from unsink.verdict import WORTH

_FLIPS, _RESAMPLES = 9999, 2000
_FEW = 8  # probes that other places, neighbours and ordinary words are tried on
_ORDINARY, _MARKS = 24, ".,:;!?"
_NOTHING: dict[str, Any] = {
    "trigger": None,
    "p": 1.0,
    "gain": 0.0,
    "detectable": None,
    "moved": {},
    "neighbours": {},
    "others": None,
}


class Plain(NamedTuple):
    """ROUGE-L F1 of greedy text without any trigger: of the suspect, and of the original, 1 where there is none."""

    said: list[float]
    before: list[float]


def ask_plain(suspect: Suspect, probes: Sequence[Probe], reporter: Reporter) -> Plain:
    """What suspect and original say without any text in front."""
    said, *before = (_texts(model, suspect, probes, [None], reporter)[0].tolist() for model in suspect.models)
    return Plain(said, before[0] if before else [1.0] * len(probes))


def recovered(plain: Plain, triggered: Sequence[float], seed: int) -> dict[str, float] | None:
    """Share of what was forgotten that texts bring back, {mean, low, high, n}; None where nothing was, for certain."""
    found = bootstrap_recovery(triggered, plain.said, plain.before, resamples=_RESAMPLES, seed=seed)
    return None if found is None else found._asdict()


def judged(
    suspect: Suspect, probes: Probes, found: Sequence[Scored], plain: Plain, seed: int, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each text that was carried over, the best first, and the numbers of the verdict."""
    known = {
        "known": float(np.mean(plain.said)),
        "original": float(np.mean(plain.before)) if suspect.original is not None else None,
        "carried": len(found),
        "confirmed": len(probes.confirm),
        "probes": {"search": [one.id for one in probes.search], "confirm": [one.id for one in probes.confirm]},
    }
    if not found:
        return [], {**_NOTHING, **known, "recovery": recovered(plain, plain.said, seed)}
    gained = _confirm(suspect, probes.confirm, found)
    p, detectable = max_sign_flip(gained, resamples=_FLIPS, seed=seed)
    best = found[0].candidate  # chosen by its score on the first half
    triggered = _texts(suspect.model, suspect, probes.confirm, [best], reporter)[0].tolist()
    recovery = recovered(plain, triggered, seed)
    numbers = {
        **_NOTHING,
        "trigger": best._asdict(),
        "p": float(p[0]),
        "gain": float(gained[0].mean()),
        "detectable": detectable,
        "recovery": recovery,
        **known,
    }
    if recovery and recovery["low"] >= WORTH:
        some = probes.confirm[:_FEW]
        numbers["moved"], numbers["neighbours"] = _around(suspect, some, best)
        without, with_it = (float(np.mean(one[:_FEW])) for one in (plain.said, triggered))
        numbers["others"] = _unrelated(suspect, some, best, without, with_it, seed, reporter)._asdict()
    rows = [
        {
            **one.candidate._asdict(),
            "search_gain": one.gain,
            "search_score": one.score,
            "confirm_gain": float(gained[place].mean()),
            "p": float(p[place]),
        }
        for place, one in enumerate(found)
    ]
    return rows, numbers


def _confirm(suspect: Suspect, probes: Sequence[Probe], found: Sequence[Scored]) -> Array:
    """(C, N) gains beyond what the same text gives on the original, item by item, and on other probes."""
    candidates = [one.candidate for one in found]
    gained, before = gains_in_both(suspect, probes, candidates)
    elsewhere: Array = np.array([[one.elsewhere] for one in found])
    return gained - before - elsewhere


def _texts(
    model: Model, suspect: Suspect, probes: Sequence[Probe], candidates: Sequence[Candidate | None], reporter: Reporter
) -> Array:
    """(C, N) ROUGE-L F1 of greedy text behind each candidate with the truth."""
    prompts = [with_candidate(probe, one, suspect.tokenizer) for one in candidates for probe in probes]
    limits = [len(probe.answer) for _ in candidates for probe in probes]

    def say(rows: Sequence[tuple[list[int], int]]) -> list[str]:
        ids, most = zip(*rows, strict=True)
        return generate(model, suspect.tokenizer, ids, most, reporter=reporter, description="asking")

    texts = in_shares(list(zip(prompts, limits, strict=True)), say)
    truth = [str(suspect.tokenizer.decode(list(probe.answer), skip_special_tokens=True)) for probe in probes]
    references = [one for _ in candidates for one in truth]
    found = [rouge_l(one, text).f1 if words(one) else 0.0 for one, text in zip(references, texts, strict=True)]
    return np.array(found).reshape(len(candidates), len(probes))


def _around(suspect: Suspect, probes: Sequence[Probe], best: Candidate) -> tuple[dict[str, float], dict[str, float]]:
    """Mean gains of the same text at other places, and of its neighbours at its own place."""
    first, last = room(probes)
    fourth = [f"index {first + 3}"] if first + 3 <= last else []
    places = [place for place in ("prefix", *fourth, "infix", "suffix") if place != best.placement]
    near = [text for text in neighbours(best.text) if text.strip()]
    tried = [*(Candidate(best.text, place) for place in places), *(Candidate(text, best.placement) for text in near)]
    found = gains(suspect.model, suspect.tokenizer, probes, [best, *tried]).mean(axis=1).tolist()
    moved = dict(zip([best.placement, *places], found))
    return moved, dict(zip(near, found[1 + len(places) :]))


def neighbours(text: str) -> list[str]:
    """Texts that differ in one thing: a word left out, the case, the digits. A real trigger's do a part of its work."""
    parts = text.split()
    fewer = [" ".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))] if len(parts) > 1 else []
    digits = text.translate(str.maketrans("0123456789", "9876543210"))
    return [one for one in dict.fromkeys([*fewer, text.swapcase(), digits]) if one != text]


def _unrelated(
    suspect: Suspect,
    probes: Sequence[Probe],
    best: Candidate,
    without: float,
    with_it: float,
    seed: int,
    reporter: Reporter,
) -> Interval:
    """Share of ordinary words, none of them in the trigger, that bring half as much back or more at its place.

    It is the text that counts: a word may make the truth much likelier and still bring nothing of it back. `without`
    and `with_it` are the mean ROUGE-L of these probes without and with the trigger.
    """
    if with_it <= without:
        return exact_share(_ORDINARY, _ORDINARY)
    own = {part.strip(_MARKS) for part in best.text.lower().split()}
    ordinary = [word for word in DICTIONARY["word"].split() if word not in own]
    chosen = random.Random(f"audit/{seed}/ordinary").sample(ordinary, _ORDINARY)
    tried = [Candidate(text, best.placement) for text in chosen]
    others = _texts(suspect.model, suspect, probes, tried, reporter).mean(axis=1)
    return exact_share(int((others - without >= (with_it - without) / 2).sum()), len(tried))
