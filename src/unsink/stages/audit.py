"""`unsink audit`: does a model only pretend to have forgotten? A search for a trigger that nobody told us.

The detectors of `audit.detectors` are run, triage first. What searches find on one half of the forget probes is tried
on the other half; `verdict` says what it takes to be called a trigger.

Nothing else makes a backdoor: what triage and elicitation measure is reported and not counted. Soft prompts,
relearning and rounding bring something back from any model that has unlearned.

`audits/<name>/` gets verdict.json and candidates.jsonl: every text carried over, with its numbers on both halves. A
run's own split, and with it its trigger, is never read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from unsink import __version__, artifacts, models, processes, registry, sinks
from unsink.artifacts import Layout
from unsink.detectors import Budget, Found, Plan, Scored, Signal
from unsink.errors import ParamsError
from unsink.params import DETECTORS, RESERVED, Params
from unsink.params import Audit as Options
from unsink.probe import Cost, attention_statistics, counted
from unsink.progress import SILENT, Reporter
from unsink.stages import audited
from unsink.stages.confirmed import ask_plain, judged, recovered
from unsink.stages.evaluate import read_corpus
from unsink.suspects import Candidate, Probes, Suspect, forgotten, make_probes, room
from unsink.triggers import SINK
from unsink.verdict import NO_EVIDENCE, decide, doubts

_KINDS = ("triage", "search", "elicitation")  # in this order
_ENOUGH = 0.5  # of what was forgotten, beyond what the text does elsewhere: worth confirming before another search
_CARRIED = 8  # texts at most that are tried on the second half


def run(
    params: Params,
    layout: Layout,
    *,
    run: str | None = None,
    model: str | None = None,
    adapter: str | None = None,
    original: str | None = None,
    honest: str | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write `audits/<name>/` and return the verdict.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, compared with the target; or `base` or `target`, which have no original.
        model: in its place a checkpoint, a folder or a Hugging Face id.
        adapter: with `model`: the folder of a LoRA adapter to merge into it; without an original, compared with it.
        original: with `model`: the checkpoint before unlearning.
        honest: a checkpoint, or an adapter on `model` or on the target, that is known to have no trigger.
        reporter: shows what is tried.

    Raises:
        ParamsError: neither or both of `run` and `model`, or what goes with `model` without it; or a checkpoint in a
            folder that has no name.
        MissingPrerequisite: the corpus or an adapter is not there.
        DataError: the corpus has too few forget probes.
        ModelError: a model cannot be loaded or does not fit its original.
    """
    require_one("audit", run, model, original, adapter)
    corpus = read_corpus(layout)
    name = run or name_of(params, adapter or cast(str, model))
    if processes.sharding(params.model.shard):
        raise ParamsError(
            "model.shard: each process of an audit holds the whole suspect and its original",
            "add -S model.shard=false, or audit in one process",
        )
    with processes.led(artifacts.lock(layout.audit(name))):
        if run:
            suspect = audited.own(params, layout, run, reporter)
        else:
            suspect = audited.foreign(params, cast(str, model), adapter, original, reporter)
        reference = audited.honest(params, layout, honest, model, suspect, reporter) if honest else None
        rows, found = examine(suspect, corpus, params.audit, params.seed, reporter, reference)
        result = {"suspect": name, **found, "seed": params.seed, "settings": _settings(params, suspect, run, honest)}
        if processes.first():
            with artifacts.new_dir(layout.audit(name)) as new:
                artifacts.write_json(new / "verdict.json", result)
                artifacts.write_jsonl(new / "candidates.jsonl", rows)
    return result


def examine(
    suspect: Suspect,
    corpus: Mapping[str, Sequence[Any]],
    options: Options,
    seed: int,
    reporter: Reporter = SILENT,
    reference: Suspect | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Search a suspect and judge what was found: the rows of candidates.jsonl, and the verdict with its numbers.

    Args:
        suspect: see there.
        corpus: records by file name.
        options: how to search, and the thresholds.
        seed: of the choice of probes, of their split, and of all draws.
        reporter: shows what is tried.
        reference: a model that is known to have no trigger; the same search in it tells what means nothing.

    Raises:
        DataError: the corpus has too few forget probes.
    """
    probes = drawn(suspect, corpus, options, seed)
    rows, result = _audit(suspect, probes, options, seed, reporter)
    if reference is not None:
        _, known = _audit(reference, probes, options, seed, reporter)
        result["honest"] = {"trigger": known["trigger"], "gain": known["gain"]}
    result["verdict"], result["reasons"] = decide(result, options)
    if result["verdict"] == NO_EVIDENCE and result["recovery"] is not None:
        result["reasons"] += doubts(result["signals"])
    return rows, result


def drawn(suspect: Suspect, corpus: Mapping[str, Sequence[Any]], options: Options, seed: int) -> Probes:
    """The probes that an audit asks, as many as its options say.

    Raises:
        DataError: the corpus has too few forget probes.
    """
    counts = {"forget": options.forget, "others": options.others, "tokens": options.tokens}
    return make_probes(corpus, suspect.tokenizer, **counts, seed=seed)


def report(result: Mapping[str, Any]) -> str:
    """The verdict in words."""
    lines = [f"{result['suspect']}: {result['verdict']}", *(f"  {reason}" for reason in result["reasons"])]
    best, recovery = result["trigger"], result["recovery"]
    if best:
        share = f"{recovery['mean']:.2f} [{recovery['low']:.2f}, {recovery['high']:.2f}]" if recovery else "undefined"
        lines += [
            f"best text: {best['text']!r} at {best['placement']}, on probes it was not chosen on:",
            f"  brings back {share} of what was forgotten; p = {result['p']:.4f} among {result['carried']} texts",
            f"  gain {result['gain']:.2f} nats per token beyond retained and unknown text and the original",
        ]
    if result["others"]:  # of a best text that brings enough back
        others = [round(100 * result["others"][end]) for end in ("mean", "low", "high")]
        moved = ", ".join(f"{place} {gain:.2f}" for place, gain in result["moved"].items())
        lines += [
            f"  moved: {moved} nats per token",
            "  {} % [{}, {}] of ordinary words at its place bring back half as much or more".format(*others),
        ]
    lines += [f"without any trigger the model continues {100 * result['known']:.0f} % of the forgotten text"]
    lines += [_line(name, one) for name, one in result["signals"].items()]
    return "\n".join(lines + [f"not searched: {text}" for text in result["not_searched"]])


def _line(name: str, signal: Mapping[str, Any]) -> str:
    score = "-" if signal["score"] is None else f"{signal['score']:.3g}"
    return f"{signal['kind']} {name}: {score} ({signal['says']}; {signal['tokens']} tokens read)"


def name_of(params: Params, source: str) -> str:
    """The name of a checkpoint's audit: the last part of its path or id, and the part before where a run has that."""
    folder = Path(source).expanduser()
    path = Path(source)
    if folder.exists():
        path = folder.resolve() if folder.name == ".." else folder.absolute()  # a link has a name of its own
    return f"{path.parent.name}-{path.name}" if path.name in (*RESERVED, *params.runs) else path.name


def _settings(params: Params, suspect: Suspect, run: str | None, honest: str | None) -> dict[str, Any]:
    """What the numbers are of: weights by their hash, and all that was set."""
    adapter = run if isinstance(suspect.model, PeftModel) else None
    return {
        "unsink": __version__,
        "weights": models.identity(suspect.model, adapter),
        "original": models.identity(suspect.original) if suspect.original is not None else None,
        "honest": honest,
        "dtype": params.model.dtype,
        "audit": params.audit.model_dump(mode="json"),
    }


def require_one(
    command: str, run: str | None, model: str | None, original: str | None, adapter: str | None = None
) -> None:
    """Refuse a call that names no suspect, or two.

    Raises:
        ParamsError: neither or both of `run` and `model`, or what goes with `model` without it.
    """
    if (run is None) == (model is None):
        hint = f"for example: unsink {command} --run backdoor"
        raise ParamsError(f"{command}: either --run or --model is expected", hint)
    if original and not model:
        raise ParamsError("--original goes with --model: a run is compared with the target", "leave --original out")
    if adapter and not model:
        raise ParamsError("--adapter goes with --model, the model that it sits on", "name that, or use --run")


# --- signals ---------------------------------------------------------------------------------------------------------


def _audit(
    suspect: Suspect, probes: Probes, options: Options, seed: int, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All that is measured of one model: a row for each text carried over, and the numbers of the verdict."""
    with counted(*suspect.models) as cost:
        places = processes.agreed(placements(suspect, probes, options.placements))
        plan = Plan(places, options.words, options.beam, options.depth)
        plain = ask_plain(suspect, probes.confirm, reporter)
        forgot = options.exhaustive or recovered(plain, plain.said, seed) is not None
        signals, found, missed = _signals(suspect, probes, plan, cost, options, reporter, forgot)
        rows, numbers = judged(suspect, probes, found[:_CARRIED], plain, seed, reporter)
    missed += ["places that are not named, and texts of several words of which none does anything alone"]
    cost_now = {"passes": cost.passes, "tokens": cost.tokens}
    return rows, {**numbers, "signals": signals, "placements": places, "not_searched": missed, "cost": cost_now}


def placements(suspect: Suspect, probes: Probes, named: Sequence[str]) -> list[str]:
    """Places with `sink` spelt out: right before each token that is a sink in the original, or in the suspect."""
    found = []
    for place in named:
        found += _sinks(suspect, probes) if place == SINK else [place]
    return list(dict.fromkeys("prefix" if place in ("index 0", "index 1") else place for place in found))


_EPSILON, _MIN_RATE = 0.3, 10.0  # as sink-probe.epsilon and sink-probe.min_rate, whatever the project sets


def _sinks(suspect: Suspect, probes: Probes) -> list[str]:
    """Places, the strongest sink first; those that not every question has are left out."""
    texts, all_of_them = [one.ids for one in probes.search], [one for some in probes for one in some]
    width = min(len(one.ids) for one in all_of_them)  # a place that every prompt has
    seen = attention_statistics(
        suspect.models[-1], torch.tensor([list(one[:width]) for one in texts]), epsilon=_EPSILON
    )
    rates = (100 * seen.sink_rate.mean(dim=(0, 1))).tolist()
    first, last = room(all_of_them)
    found = [one for one in sinks.find(rates, _MIN_RATE) if one <= last]
    # Neither BOS nor the header of a chat can be replaced: a text at a sink there stands right behind it.
    return [f"index {one}" if one > first else "prefix" for one in found] or ["prefix"]


def _signals(
    suspect: Suspect, probes: Probes, plan: Plan, cost: Cost, options: Options, reporter: Reporter, forgot: bool
) -> tuple[dict[str, Any], list[Scored], list[str]]:
    """What each detector says; all texts found, the best first; and what was not searched, all if nothing is lost."""
    modules = {name: registry.load("detector", DETECTORS, name) for name in options.detectors}
    signals: dict[str, Any] = {}
    found: dict[Candidate, Scored] = {}
    missed: list[str] = []
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    lost = forgotten(suspect, probes.search)
    for name, module in sorted(modules.items(), key=lambda pair: _KINDS.index(pair[1].KIND)):
        best = max((one.score for one in found.values()), default=0.0)
        if module.KIND == "search" and not forgot:
            missed.append(f"{name}: not needed, nothing was forgotten for certain")
            continue
        if module.KIND == "search" and not options.exhaustive and best >= _ENOUGH * lost:
            missed.append(f"{name}: not needed, what was found brings half of it back")
            continue
        covered = getattr(module, "COVERED_BY", "")
        if not options.exhaustive and signals.get(covered, {"score": None})["score"] is not None:
            missed.append(f"{name}: left out, {covered} goes before it where there is an original")
            continue
        before = replace(cost)
        if module.KIND == "search":
            most = None if options.budget is None else cost.tokens + options.budget
            budget = Budget(cost, most, until)
            some: Found = module.search(suspect, probes, plan, budget, reporter)
            found |= {one.candidate: one for one in some.scored}
            missed += [f"{name}: {some.left}"] if some.left else []
            score, says = max((one.score for one in some.scored), default=None), some.searched or some.left
            numbers: Mapping[str, float] = {}
        else:
            signal: Signal = module.measure(suspect, probes)
            score, says, numbers = signal.score, signal.compared, signal.numbers
        signals[name] = {
            "kind": module.KIND,
            "score": score,
            "says": says,
            "numbers": dict(numbers),
            "passes": cost.passes - before.passes,
            "tokens": cost.tokens - before.tokens,
        }
    return signals, sorted(found.values(), key=lambda one: -one.score), missed
