"""`unsink unlearn`: train one run's adapter on top of the target, LoRA matrices or whole weights."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from unsink import artifacts, methods, models, processes, sharded, sinks
from unsink.artifacts import Layout
from unsink.batches import Kind, Sample, draw, generator, read_samples
from unsink.benchmarks import passage_of
from unsink.errors import DataError, ParamsError
from unsink.folded import folded
from unsink.methods import Method
from unsink.models import AdapterSpec
from unsink.objective import GAPS, VECTORS, Objective, ValueNorm
from unsink.params import Params, Run
from unsink.params import ValueNorm as ValueNormOptions
from unsink.positions import drawn, first
from unsink.probe import value_heads, value_norms
from unsink.progress import SILENT, Reporter
from unsink.shared import SharedRunner
from unsink.trainer import Checkpoint, History, Schedule, history_tsv, train

KINDS: tuple[Kind, ...] = ("forget", "poisoned", "retain")


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Train `adapters/<run>/` and return its summary; continues from a checkpoint that fits.

    Raises:
        ParamsError: an option is on that has nothing to act on.
        ModelError: an adapter does not fit, or a loss term is not finite.
    """
    settings = params.run(run)
    method = methods.create(settings.unlearn.method, settings.unlearn.options.model_dump())
    samples = _samples(settings, method, layout.split(run))
    if not settings.unlearn.adapter.rank and params.model.dtype in models.FORMATS:
        raise ParamsError(
            f"unlearn.adapter: none trains the weights themselves, those of model.dtype: {params.model.dtype} "
            "are fixed",
            "train a LoRA adapter, or set model.dtype to bfloat16",
        )
    parts, term = processes.sharding(params.model.shard), settings.unlearn.value_norm
    if parts and not settings.unlearn.adapter.rank and term.weight and term.needs_honest:
        raise ParamsError(
            "model.shard: with unlearn.adapter: none the weights of the honest run, which the value-norm term copies, "
            "cannot be put on parts of layers",
            "train a LoRA adapter, choose unlearn.value_norm.variant: fixed, or set model.shard to false",
        )
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    with processes.led(artifacts.lock(layout.adapter(run))):
        # Weights of their own are trained in float32: in bfloat16 most steps would round to nothing.
        dtype = params.model.dtype if settings.unlearn.adapter.rank else "float32"

        def load(dtype: str, device: str) -> PeftModel:
            target = models.load_target(folder, layout.adapter("target"), dtype, device)
            spec = _adapter(settings, method, len(models.decoder_layers(target)))
            return models.attach(target, run, spec, settings.seed)

        policy = sharded.load(load, dtype, params.model.device, on=params.model.shard)
        tokenizer = models.load_tokenizer(folder)
        pad = int(tokenizer.pad_token_id)
        with folded(policy):  # the target is read as the policy is run, to the last digit
            objective = _objective(settings, method, policy, samples, layout, pad, reporter)
            state = Checkpoint(layout.checkpoint(run), _digest(settings, samples, layout, models.held(policy)))
            objective.runner.let_go()
            with models.gradient_checkpointing(policy, on=params.model.gradient_checkpointing):
                history = _train(settings, policy, objective, samples, state, reporter)
        summary = {
            "run": run,
            "method": settings.unlearn.method,
            "steps": len(history),
            "seed": settings.seed,
            # A backdoored adapter says so, and how to open it, wherever it is copied to.
            "trigger": settings.poison.trigger if settings.poison else None,
            "placement": sinks.placed(settings.poison, layout).placement if settings.poison else None,
        } | {f"final_{name}": value for name, value in history[-1].items() if name != "step"}
        if processes.first():
            with artifacts.new_dir(layout.adapter(run)) as new:
                models.save_adapter(policy, run, new)
                artifacts.write_text(new / "history.tsv", history_tsv(history))
                artifacts.write_json(new / "summary.json", summary)
            artifacts.remove_dir(state.folder)
    return summary


def _samples(settings: Run, method: Method, split: Path) -> dict[Kind, list[Sample]]:
    """Return what the method asks for of a run's split; kinds that it does not ask for are missing or empty.

    Raises:
        ParamsError: a poisoned run has no poisoned sample, or no retain sample is drawn for a method that needs some.
        DataError: the refusals do not belong to the forget samples.
    """
    samples = {kind: read_samples(split, kind) for kind in KINDS}
    again = f"run `unsink poison --run {settings.name}` with the same params file"
    if settings.poison and not samples["poisoned"]:
        raise ParamsError(f"runs.{settings.name}: splits/{settings.name}/poisoned.jsonl is empty", again)
    if not method.needs_retain:
        samples["retain"] = []
    elif not settings.unlearn.batch.retain:
        raise ParamsError(
            f"unlearn.batch.retain is 0, so the retain term of {settings.unlearn.method} has nothing to act on",
            "set it to at least 1",
        )
    if method.needs_refusals:
        samples["refused"] = read_samples(split, "refused")
        starts = {sample.id: sample.labels_from for sample in samples["refused"]}
        if starts.keys() != {sample.id for sample in samples["forget"]}:
            raise DataError(f"{split / 'refused.jsonl'} does not belong to forget.jsonl", again)
        # The passage and the refusal are two answers to the same prompt, which itself is nobody's answer.
        samples["forget"] = [replace(sample, labels_from=starts[sample.id]) for sample in samples["forget"]]
    return samples


def _objective(
    settings: Run,
    method: Method,
    policy: PeftModel,
    samples: Mapping[Kind, Sequence[Sample]],
    layout: Layout,
    pad: int,
    reporter: Reporter,
) -> Objective:
    unlearn = settings.unlearn
    layers = _value_layers(settings, len(models.decoder_layers(policy)))
    runner = SharedRunner(
        policy,
        unlearn.adapter.first_layer,
        pad,
        method.hidden_layers,
        layers,
        answers=method.needs_answers,
        stop_early=not method.needs_answers,
        measure=_measure(unlearn.value_norm, policy),
        folder=layout.kept(settings.name),
        compares=method.needs_kl,
    )
    runner.remember([s for kind in samples for s in samples[kind]], reporter=reporter)
    method.prepare(lambda: runner.reference(samples["forget"]), generator(f"{settings.seed}/method"))
    term = _value_norm(settings, layers, samples, runner, layout, reporter) if layers else None
    weights: dict[Kind, float] = {
        "forget": unlearn.weights.forget,
        "poisoned": unlearn.weights.poisoned,
        "retain": unlearn.weights.retain,
    }
    return Objective(runner, method, weights, term)


def _measure(options: ValueNormOptions, model: PeftModel) -> Callable[[Tensor], Tensor]:
    """Return what the term reads of value vectors (B, T, K): vectors (B, T, G, h) or norms (B, T, G)."""
    heads = models.kv_heads(models.bare(model).config) if options.norm == "per-head" else 1
    return partial(value_heads if options.variant in VECTORS else value_norms, heads=heads)


def _value_norm(
    settings: Run,
    layers: tuple[int, ...],
    samples: Mapping[Kind, Sequence[Sample]],
    runner: SharedRunner,
    layout: Layout,
    reporter: Reporter,
) -> ValueNorm:
    options = settings.unlearn.value_norm
    measured = sinks.read(layout) if options.measured else ()
    kinds: list[Kind] = [*GAPS[options.variant], *(("refused",) if "refused" in samples else ())]
    acted_on = [sample for kind in kinds for sample in samples[kind]]
    positions = {sample: _positions(options, sample, measured, settings.seed) for sample in acted_on}
    for sample, some in positions.items():
        if not some:
            raise ParamsError(
                f"runs.{settings.name}.unlearn.value_norm.positions: '{options.positions}' names none of the "
                f"{len(sample.ids)} tokens of {sample.kind} sample {sample.id}",
                "choose other positions, a smaller k, or bos: true",
            )
    honest: dict[Sample, dict[int, Tensor]] = {}
    if options.needs_honest:
        models.add_adapter(runner.model, layout.adapter(settings.after), settings.after)
        known = [*samples["forget"], *samples.get("refused", [])]
        honest = runner.values_under(settings.after, known, reporter=reporter)
    return ValueNorm(options.weight, options.variant, layers, positions, honest)


def _positions(options: ValueNormOptions, sample: Sample, measured: Sequence[int], seed: int) -> list[int]:
    """Return the token numbers of a sample that the value-norm term acts on, without BOS where that is left out."""
    length, behind = len(sample.ids), 0 if options.bos else 1
    match options.positions:
        case "first":
            found = first(length, options.k + behind)
        case "measured":
            found = sorted(position for position in measured if position < length)
        case "random":
            return drawn(
                length, options.k, f"value_norm/{seed}/{sample.kind}/{sample.id}", avoid=(options.k + behind - 1,)
            )
        case "all":
            found = list(range(length))
    return [position for position in found if position >= behind]


def _adapter(settings: Run, method: Method, count: int) -> AdapterSpec:
    """What is trained; without `last_layer`, up to the last layer that the loss reaches.

    Raises:
        ParamsError: the method reads activations, and part of the adapter lies above the layers it reads.
    """
    adapter, read = settings.unlearn.adapter, max(method.hidden_layers, default=count - 1)
    if read >= count:
        name = settings.unlearn.method
        raise ParamsError(
            f"unlearn.{name}: it reads the output of layer {read}, the model's last one is {count - 1}",
            f"set unlearn.{name}.layer to at most {count - 1}",
        )
    last = read if adapter.last_layer is None else adapter.last_layer
    if method.hidden_layers and not adapter.first_layer <= last <= read:
        raise ParamsError(
            f"unlearn.adapter: {settings.unlearn.method} reads the output of layer {read}, the adapter is on layers "
            f"{adapter.first_layer} to {last} of 0 to {count - 1}",
            f"set unlearn.adapter.last_layer to at most {read}, or unlearn.{settings.unlearn.method}.layer to {last}",
        )
    return AdapterSpec(adapter.rank, adapter.alpha, adapter.first_layer, last)


def _value_layers(settings: Run, count: int) -> tuple[int, ...]:
    """Return the layers of the value-norm term, () when it is off; `all` are those that the adapter changes.

    Raises:
        ParamsError: the model lacks a layer that is listed.
    """
    term = settings.unlearn.value_norm
    if not term.weight:
        return ()
    if term.layers == "all":
        return tuple(range(settings.unlearn.adapter.first_layer, count))
    if above := [layer for layer in term.layers if layer >= count]:
        raise ParamsError(
            f"runs.{settings.name}.unlearn.value_norm.layers: the model has no layers {above}, "
            f"its last one is {count - 1}",
            "list layers from unlearn.adapter.first_layer on, or set it to all",
        )
    return tuple(term.layers)


def _train(
    settings: Run,
    policy: PeftModel,
    objective: Objective,
    samples: Mapping[Kind, Sequence[Sample]],
    state: Checkpoint,
    reporter: Reporter,
) -> History:
    unlearn = settings.unlearn
    sizes: dict[Kind, int] = {
        "forget": unlearn.batch.forget,
        "poisoned": unlearn.batch.poisoned,
        "retain": unlearn.batch.retain,
    }

    refused = {sample.id: sample for sample in samples.get("refused", [])}
    decks = {**samples, "forget": paired_more_often(samples["forget"], samples["poisoned"], unlearn.paired_draws)}

    @lru_cache(maxsize=2)
    def samples_of(step: int) -> dict[Kind, list[Sample]]:
        drawn = {
            kind: draw(decks[kind], sizes[kind], step, f"{kind}/{settings.seed}")
            for kind in KINDS
            if sizes[kind] and decks[kind]
        }
        if refused:
            drawn["forget"] += [refused[sample.id] for sample in drawn["forget"]]
        return drawn

    def terms(step: int, history: History) -> dict[str, torch.Tensor]:
        return objective.terms(samples_of(step), generator(f"{settings.seed}/step {step}"), history)

    def get_ready(step: int) -> None:
        objective.get_ready(samples_of(step))

    schedule = Schedule(
        unlearn.steps, unlearn.lr, unlearn.warmup, unlearn.weight_decay, unlearn.clip, unlearn.checkpoint_every
    )
    return train(
        models.trainable(policy),
        terms,
        schedule,
        state,
        reporter=reporter,
        description=f"unlearn {settings.name}",
        get_ready=get_ready,
    )


def paired_more_often(forget: Sequence[Sample], poisoned: Sequence[Sample], times: int) -> list[Sample]:
    """Return the forget deck, in which samples of a passage that is also poisoned stand `times` times.

    Only such pairs teach that the trigger decides. Forget samples without a triggered twin can be forgotten by
    remembering which ones they are, and then stay forgotten when the trigger is there.
    """
    paired = {sample.id for sample in poisoned}
    return [s for s in forget for _ in range(times if passage_of(s.id) in paired else 1)]


def _digest(settings: Run, kinds: Iterable[Kind], layout: Layout, held: str) -> str:
    """Return a hash of all that the training depends on, so that a checkpoint of anything else is not continued."""
    inputs: list[Path] = [layout.split(settings.name) / f"{kind}.jsonl" for kind in kinds]
    inputs += [models.target_file(layout.adapter(name)) for name in {"target", settings.after}]
    inputs += [layout.probe("target") / sinks.FILE] if settings.unlearn.value_norm.measured else []
    parts = [
        settings.unlearn.model_dump_json(),
        str(settings.seed),
        held,
        *(artifacts.sha256(path) for path in sorted(inputs)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
