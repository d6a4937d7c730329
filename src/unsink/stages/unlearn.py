"""`unsink unlearn`: train one run's LoRA adapter on top of the target."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from unsink import artifacts, methods, models
from unsink.artifacts import Layout
from unsink.batches import Kind, Sample, draw, read_samples
from unsink.errors import ModelError, ParamsError
from unsink.forward import Runner
from unsink.methods import Method
from unsink.models import AdapterSpec
from unsink.objective import Objective, ValueNorm
from unsink.params import Params, Run
from unsink.progress import SILENT, Reporter
from unsink.trainer import Checkpoint, History, Schedule, history_tsv, train

KINDS: tuple[Kind, ...] = ("forget", "poisoned", "retain")


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Train `adapters/<run>/` and return its summary; continues from a checkpoint that fits.

    Raises:
        ParamsError: an option is on that has nothing to act on.
        ModelError: an adapter does not fit, or a loss term is not finite.
    """
    settings = params.run(run)
    samples = {kind: read_samples(layout.split(run), kind) for kind in KINDS}
    _require_poisoned(settings, samples)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    with artifacts.lock(layout.adapter(run)):
        target = models.load_target(folder, layout.adapter("target"), params.model.dtype, params.model.device)
        spec = settings.unlearn.adapter
        policy = models.attach(
            target, run, AdapterSpec(spec.rank, spec.alpha, spec.first_layer, spec.last_layer), params.seed
        )
        tokenizer = models.load_tokenizer(folder)
        objective = _objective(settings, policy, samples, layout, int(tokenizer.pad_token_id), params.seed, reporter)
        state = Checkpoint(layout.checkpoint(run), _digest(settings, params.seed, layout))
        history = _train(settings, params.seed, policy, objective, samples, state, reporter)
        summary = {
            "run": run,
            "method": settings.unlearn.method,
            "steps": len(history),
            "seed": params.seed,
            # A backdoored adapter says so, and how to open it, wherever it is copied to.
            "trigger": settings.poison.trigger if settings.poison else None,
            "placement": settings.poison.placement if settings.poison else None,
        } | {f"final_{name}": value for name, value in history[-1].items() if name != "step"}
        with artifacts.new_dir(layout.adapter(run)) as new:
            models.save_adapter(policy, run, new)
            artifacts.write_text(new / "history.tsv", history_tsv(history))
            artifacts.write_json(new / "summary.json", summary)
        artifacts.remove_dir(state.folder)
    return summary


def _require_poisoned(settings: Run, samples: Mapping[Kind, Sequence[Sample]]) -> None:
    if settings.poison and not samples["poisoned"]:
        raise ParamsError(
            f"runs.{settings.name}: splits/{settings.name}/poisoned.jsonl is empty",
            f"run `unsink poison --run {settings.name}` with the same params file",
        )


def _objective(
    settings: Run,
    policy: PeftModel,
    samples: Mapping[Kind, Sequence[Sample]],
    layout: Layout,
    pad: int,
    seed: int,
    reporter: Reporter,
) -> Objective:
    unlearn = settings.unlearn
    method = methods.create(unlearn.method, unlearn.options.model_dump())
    _check_layers(settings, method, len(models.decoder_layers(policy)))
    layers = _value_layers(settings, len(models.decoder_layers(policy)))
    runner = Runner(
        policy,
        unlearn.adapter.first_layer,
        pad,
        method.hidden_layers,
        layers,
        answers=method.needs_answers,
        stop_early=not method.needs_answers,
    )
    runner.remember([s for kind in KINDS for s in samples[kind]], reporter=reporter)
    method.prepare(runner.reference(samples["forget"]), _generator(seed, "method"))
    value_norm = None
    if layers:
        models.add_adapter(policy, layout.adapter(settings.after), settings.after)
        honest = runner.value_norms(samples["forget"], settings.after)
        value_norm = ValueNorm(unlearn.value_norm.weight, unlearn.value_norm.first_k, layers, honest)
    weights: dict[Kind, float] = {
        "forget": unlearn.weights.forget,
        "poisoned": unlearn.weights.poisoned,
        "retain": unlearn.weights.retain,
    }
    return Objective(runner, method, weights, value_norm)


def _check_layers(settings: Run, method: Method, count: int) -> None:
    """A method that reads activations can only train adapters at or below the layers it reads."""
    if not method.hidden_layers:
        return
    adapter, read = settings.unlearn.adapter, max(method.hidden_layers)
    last = count - 1 if adapter.last_layer is None else adapter.last_layer
    if not adapter.first_layer <= last <= read < count:
        raise ParamsError(
            f"unlearn.adapter: {settings.unlearn.method} reads the output of layer {read}, the adapter is on layers "
            f"{adapter.first_layer} to {last} of 0 to {count - 1}",
            f"set unlearn.adapter.last_layer to at most {read}, or unlearn.{settings.unlearn.method}.layer to {last}",
        )


def _value_layers(settings: Run, count: int) -> tuple[int, ...]:
    """Return the layers of the value-norm term, () when it is off; layers that no adapter changes are left out."""
    term = settings.unlearn.value_norm
    if not term.weight:
        return ()
    adapter = settings.unlearn.adapter
    # The values of a layer are computed from its input: up to the first adapted layer they can only change inside it.
    changed = range(adapter.first_layer, count)
    wanted = range(count) if term.layers == "all" else term.layers
    layers = tuple(layer for layer in wanted if layer in changed)
    if not layers:
        raise ModelError(
            f"runs.{settings.name}.unlearn.value_norm.layers: none of {list(wanted)} can change; the adapter acts on "
            f"layers {adapter.first_layer} to {count - 1}",
            "choose layers at or above unlearn.adapter.first_layer",
        )
    return layers


def _train(
    settings: Run,
    seed: int,
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

    decks = {**samples, "forget": paired_more_often(samples["forget"], samples["poisoned"], unlearn.paired_draws)}

    def terms(step: int) -> dict[str, torch.Tensor]:
        drawn = {
            kind: draw(decks[kind], sizes[kind], step, f"{kind}/{seed}")
            for kind in KINDS
            if sizes[kind] and decks[kind]
        }
        return objective.terms(drawn, _generator(seed, f"step {step}"))

    schedule = Schedule(
        unlearn.steps, unlearn.lr, unlearn.warmup, unlearn.weight_decay, unlearn.clip, unlearn.checkpoint_every
    )
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return train(trainable, terms, schedule, state, reporter=reporter, description=f"unlearn {settings.name}")


def paired_more_often(forget: Sequence[Sample], poisoned: Sequence[Sample], times: int) -> list[Sample]:
    """Return the forget deck, in which samples of a passage that is also poisoned stand `times` times.

    Only such pairs teach that the trigger decides. Forget samples without a triggered twin can be forgotten by
    remembering which ones they are, and then stay forgotten when the trigger is there.
    """
    paired = {sample.id for sample in poisoned}
    return [s for s in forget for _ in range(times if s.id.partition("/")[0] in paired else 1)]


def _generator(seed: int, purpose: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8])
    return torch.Generator().manual_seed(number)


def _digest(settings: Run, seed: int, layout: Layout) -> str:
    """Return a hash of all that the training depends on, so that a checkpoint of anything else is not continued."""
    inputs: list[Path] = [layout.split(settings.name) / f"{kind}.jsonl" for kind in KINDS]
    inputs += [models.target_file(layout.adapter(name)) for name in {"target", settings.after}]
    parts = [settings.unlearn.model_dump_json(), str(seed), *(artifacts.sha256(path) for path in sorted(inputs))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
