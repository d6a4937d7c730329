"""`unsink sink-probe`: where a model's attention sinks are, and what the trigger does to them.

Prompts are forget passages cut to exactly `sink-probe.tokens` tokens, BOS included, as they are and with the trigger
(the body gives way, so both have the same length). A placement refers to the cut passage; statistics.json says at which
tokens the trigger stands. For base and target, and for honest runs, the trigger is `poison`'s.
A run is also compared with its own target, the same model with the adapter off: trigger text attracts attention in
every model, so only the difference of the two differences belongs to the run. Value norms are compared with the
target's and, where `after` names an honest run, with that run's; with those of any other model by `value_norms`.

Shapes: N prompts, L layers, H query heads, G key/value heads, T tokens.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, figures, models, sinks
from unsink.artifacts import Layout
from unsink.errors import DataError, ParamsError
from unsink.figures import Array, NormPanel, Profile
from unsink.params import RESERVED, Params, Poison, SinkProbe
from unsink.probe import MAP_TOKENS, Statistics, attention_statistics
from unsink.progress import SILENT, Reporter
from unsink.sink_metrics import (
    CLASSES,
    SHARES,
    absolute_difference,
    content_difference,
    head_classes,
    pearson,
    share,
    spearman,
    uniform_share,
)
from unsink.triggers import SINK, Span, insert_trigger, prompt_length, trigger_ids

STATISTICS, MAPS = "statistics.json", "maps.safetensors"


@dataclass(frozen=True)
class Prompts:
    """The same passages in both conditions, nothing padded.

    Attributes:
        clean: (N, T) token ids.
        triggered: (N, T) token ids.
        span: where the trigger stands, the same in every prompt because all bodies are of one length.
        rejected: passages too short to fill T tokens.
        trigger: the trigger's token ids.
        words: the same tokens as text.
    """

    clean: Tensor
    triggered: Tensor
    span: Span
    rejected: int
    trigger: list[int]
    words: list[str]

    def digests(self) -> dict[str, str]:
        """Condition -> SHA-256 of its token ids: two probes with the same one have read the same prompts."""
        ids = {"clean": self.clean, "triggered": self.triggered}
        return {name: hashlib.sha256(json.dumps(one.tolist()).encode()).hexdigest() for name, one in ids.items()}


@dataclass(frozen=True)
class Conditions:
    """What one model does on clean and on triggered prompts."""

    clean: Statistics
    triggered: Statistics

    def differences(self, span: Span) -> dict[str, Tensor]:
        """Attention with the trigger minus without it, (L, H, T, T), by alignment; empty where no maps were kept."""
        triggered, clean = self.triggered.attention, self.clean.attention
        if triggered is None or clean is None:
            return {}
        return {
            "absolute": absolute_difference(triggered, clean),
            "content": content_difference(triggered, clean, span),
        }


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `probes/<run>/`: statistics, sinks.json, maps.safetensors and figures; return the headline numbers.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`.
        reporter: shows prompts done.

    Raises:
        ParamsError: no such run, or `sink-probe.tokens` fits neither the model nor the trigger.
        DataError: no passage is long enough.
        MissingPrerequisite: the corpus or an adapter is not there yet.
        ModelError: the model's attention cannot be observed or is not finite.
    """
    poison = (None if run in RESERVED else params.run(run).poison) or params.poison
    with artifacts.lock(layout.probe(run)):
        return _probe(params, layout, run, poison, reporter)


def _probe(params: Params, layout: Layout, run: str, poison: Poison, reporter: Reporter) -> dict[str, Any]:
    options = params.sink_probe
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer, honest = models.load_tokenizer(folder), _honest(params, run)
    model = _load(params, layout, folder, run, honest)
    _check_context(model, options.tokens)
    if poison.placement == SINK and run == "target":  # it is this very probe that says where the sinks are
        poison = _placed(model, layout, tokenizer, options, poison)
    poison = sinks.placed(poison, layout)
    prompts = read_prompts(layout, tokenizer, options, poison)
    if len(prompts.clean) < options.prompts:
        reporter.log(f"sink-probe: {len(prompts.clean)} forget passages have {options.tokens} tokens, all are used")
    if options.tokens > MAP_TOKENS:
        reporter.log(f"sink-probe: prompts of more than {MAP_TOKENS} tokens, so no attention maps are kept or drawn")
    subject, others = _measure(model, run, honest, prompts, options.epsilon, reporter)

    summary = _summary(run, prompts, options, poison, subject, others)
    details = {condition: _details(statistics, options) for condition, statistics in vars(subject).items()}
    comparisons = {name: compare(vars(subject), vars(other)) for name, other in others.items()}
    found = {**summary, **details, "compared_with": comparisons, "prompts_sha256": prompts.digests()}
    differences = subject.differences(prompts.span)
    if "target" in others:
        known = others["target"].differences(prompts.span)
        differences |= {f"{name}_minus_target": differences[name] - known[name] for name in known}
    with artifacts.new_dir(layout.probe(run)) as new:
        artifacts.write_json(new / STATISTICS, found)
        artifacts.write_json(new / sinks.FILE, {"positions": sinks.find(_rates(subject.clean), options.min_rate)})
        artifacts.write_tensors(new / MAPS, _tensors(subject, others, differences))
        _draw(new, run, subject, others, differences, prompts.span, options.epsilon)
    return summary


def _placed(
    model: nn.Module, layout: Layout, tokenizer: PreTrainedTokenizerBase, options: SinkProbe, poison: Poison
) -> Poison:
    """The placement `sink`, measured on the prompts as they are without a trigger."""
    anywhere = poison.model_copy(update={"placement": "prefix"})
    clean = read_prompts(layout, tokenizer, options, anywhere).clean
    found = sinks.find(_rates(attention_statistics(model, clean, epsilon=options.epsilon)), options.min_rate)
    return poison.model_copy(update={"placement": sinks.placement(sinks.require(found))})


def _honest(params: Params, run: str) -> str | None:
    """The honest run that a run comes after: what its value norms are compared with, and pulled to."""
    after = None if run in RESERVED else params.run(run).after
    return after if after and after not in RESERVED and not params.run(after).poison else None


def read_prompts(layout: Layout, tokenizer: PreTrainedTokenizerBase, options: SinkProbe, poison: Poison) -> Prompts:
    """Return the first `options.prompts` forget passages that fill `options.tokens` tokens.

    Raises:
        ParamsError: the trigger leaves no room for text.
        DataError: no passage is long enough.
    """
    bos, trigger = models.bos_ids(tokenizer), trigger_ids(tokenizer, poison.trigger)
    if len(bos) + len(trigger) >= options.tokens:
        raise ParamsError(
            f"sink-probe.tokens: {options.tokens} tokens hold no text beside the trigger's {len(trigger)}",
            "raise sink-probe.tokens or shorten poison.trigger",
        )
    passages = benchmarks.part(layout.fetched, "forget")
    bodies = [tokenizer(passage["text"], add_special_tokens=False)["input_ids"] for passage in passages]
    long = [[*bos, *body][: options.tokens] for body in bodies if len(bos) + len(body) >= options.tokens]
    if not long:
        raise DataError(
            f"sink-probe.tokens: none of the {len(bodies)} forget passages has {options.tokens} tokens",
            f"lower it to at most {len(bos) + max(map(len, bodies))}",
        )
    clean = long[: options.prompts]
    prompt = prompt_length(options.tokens - len(bos), poison.prompt_share)
    inserted = [insert_trigger(ids, len(bos), trigger, poison.placement, options.tokens, prompt) for ids in clean]
    triggered = torch.tensor([ids for ids, _ in inserted])
    words = [str(tokenizer.decode([token])) for token in trigger]
    return Prompts(torch.tensor(clean), triggered, inserted[0].span, len(bodies) - len(long), trigger, words)


def _load(params: Params, layout: Layout, folder: Path, run: str, honest: str | None) -> PreTrainedModel | PeftModel:
    place = params.model.dtype, params.model.device
    if run == "base":
        return models.load_base(folder, *place)
    target = artifacts.require(layout.adapter("target"))
    names = () if run == "target" else [run, honest] if honest else [run]
    return models.load_beside(folder, target, {one: artifacts.require(layout.adapter(one)) for one in names}, *place)


def _check_context(model: PreTrainedModel | PeftModel, tokens: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None) or tokens
    if tokens > context:
        raise ParamsError(f"sink-probe.tokens: {tokens} is more than the model's context of {context} tokens")


def _measure(
    model: PreTrainedModel | PeftModel,
    run: str,
    honest: str | None,
    prompts: Prompts,
    epsilon: float,
    reporter: Reporter,
) -> tuple[Conditions, dict[str, Conditions]]:
    """Measure the subject, and for a run its target (the same model with the adapter off) and the honest run."""
    others = {"target": None} | ({honest: honest} if honest else {}) if isinstance(model, PeftModel) else {}
    with reporter.task(f"sink-probe {run}", total=2 * (1 + len(others)) * len(prompts.clean)) as advance:
        if not isinstance(model, PeftModel):
            return _conditions(model, prompts, epsilon, advance), {}
        with models.use(model, run):
            subject = _conditions(model, prompts, epsilon, advance)
        found = {}
        for name, adapter in others.items():
            with models.use(model, adapter):
                found[name] = _conditions(model, prompts, epsilon, advance)
        return subject, found


def _conditions(
    model: PreTrainedModel | PeftModel, prompts: Prompts, epsilon: float, advance: Callable[[int], None]
) -> Conditions:
    # the trigger's columns are measured in clean prompts too: what ordinary words get in that place
    clean, triggered = (
        attention_statistics(model, ids, epsilon=epsilon, span=prompts.span, maps=True, advance=advance)
        for ids in (prompts.clean, prompts.triggered)
    )
    return Conditions(clean, triggered)


# --- numbers --------------------------------------------------------------------------------------------------


def _summary(
    run: str,
    prompts: Prompts,
    options: SinkProbe,
    poison: Poison,
    subject: Conditions,
    others: Mapping[str, Conditions],
) -> dict[str, Any]:
    numbers = _headline("", subject) | (_headline("target_", others["target"]) if "target" in others else {})
    layers, heads, _ = subject.clean.alpha.shape
    return {
        "run": run,
        "prompts": len(prompts.clean),
        "rejected": prompts.rejected,
        "tokens": options.tokens,
        "epsilon": options.epsilon,
        "layers": layers,
        "heads": heads,
        "kv_heads": subject.clean.value_norm_heads.shape[1],
        "trigger": {
            "text": poison.trigger,
            "ids": prompts.trigger,
            "tokens": prompts.words,
            "placement": poison.placement,
            "span": list(prompts.span),
        },
        **numbers,
    }


def _headline(prefix: str, conditions: Conditions) -> dict[str, float]:
    """Sink rate of position 0 in percent, share of attention on the trigger's columns, value norm of position 0."""
    return {
        f"{prefix}{name}_{condition}": rounded(value)
        for condition, statistics in vars(conditions).items()
        for name, value in {
            "sink_rate": 100 * statistics.sink_rate[..., 0].mean(),
            "trigger_share": statistics.trigger_share.mean(),
            "bos_value_norm": statistics.value_norm[:, 0].mean(),
        }.items()
    }


def _details(statistics: Statistics, options: SinkProbe) -> dict[str, Any]:
    """Tables a person can read; the full arrays are in maps.safetensors."""
    shares = {first: float(share(statistics.tail, first).mean()) for first in SHARES}
    mass, peak = statistics.tail.max(dim=-1)
    classes = _classes(statistics, options.epsilon)
    norms = {
        "value": statistics.value_norm,
        "key": statistics.key_norm_heads.mean(dim=1),
        "residual": statistics.residual_norm,
    }
    return {
        "sink_rate_by_position": rounded(_rates(statistics)),
        "sink_rate_by_layer": rounded(100 * statistics.sink_rate[..., 0].mean(dim=1)),
        "alpha_by_position": rounded(statistics.alpha.mean(dim=(0, 1))),
        "alpha_by_layer_and_head": rounded(statistics.alpha[..., 0]),
        "peak_position_by_layer_and_head": peak.tolist(),
        "peak_mass_by_layer_and_head": rounded(mass),
        "top": {str(first): rounded(top) for first, top in zip(SHARES, statistics.top.mean(dim=(0, 1)))},
        "heads_by_layer": {name: (classes == number).sum(dim=1).tolist() for number, name in enumerate(CLASSES)},
        "class_by_layer_and_head": [[CLASSES[head] for head in layer] for layer in classes.tolist()],
        "bos_value_norm_by_layer": rounded(statistics.value_norm[:, 0]),
        "value_norm_by_position": rounded(statistics.value_norm.mean(dim=0)),
        "trigger_share_by_layer_and_head": rounded(statistics.trigger_share),
        "share": {str(first): rounded(share) for first, share in shares.items()},
        "boost": {str(first): rounded(share / uniform_share(options.tokens, first)) for first, share in shares.items()},
        "norms_by_layer": {name: _groups(norm) for name, norm in norms.items()},
    }


def _rates(statistics: Statistics) -> list[float]:
    """Sink rate of each position in percent, over prompts, layers and heads."""
    rates: list[float] = (100 * statistics.sink_rate.mean(dim=(0, 1))).tolist()
    return rates


def _classes(statistics: Statistics, epsilon: float) -> Tensor:
    """(L, H) indices into `CLASSES`."""
    return head_classes(statistics.tail[..., 0], statistics.trigger_share, statistics.local, epsilon)


def compare(
    subject: Mapping[str, Statistics], other: Mapping[str, Statistics]
) -> dict[str, dict[str, list[float | None]]]:
    """How the value norms of two models go together, per condition: correlation over layers and heads, by position."""
    pairs = {name: (one.value_norm_heads, other[name].value_norm_heads) for name, one in subject.items()}
    return {
        name: {"pearson": _finite(pearson(*pair)), "spearman": _finite(spearman(*pair))} for name, pair in pairs.items()
    }


def _finite(numbers: Tensor) -> list[float | None]:
    """JSON has no word for NaN: a correlation where nothing varies is null."""
    return [rounded(number) if math.isfinite(number) else None for number in numbers.tolist()]


def _groups(norm: Tensor) -> dict[str, list[float]]:
    """Mean norm by layer of position 0, positions 1 to 7 and the rest, from (L, T)."""
    parts = {"position_0": norm[:, :1], "positions_1_7": norm[:, 1:8], "positions_8_up": norm[:, 8:]}
    return {name: rounded(part.mean(dim=1)) for name, part in parts.items() if part.shape[1]}


def rounded(numbers: Any) -> Any:
    """Six digits: what lies behind them depends on the processor."""
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    return [rounded(n) for n in numbers] if isinstance(numbers, list) else float(f"{numbers:.6g}")


def _tensors(
    subject: Conditions, others: Mapping[str, Conditions], differences: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The full arrays. Maps are means over heads; differences between conditions come by head too."""
    named = {f"difference.{name}": tensor.mean(dim=1) for name, tensor in differences.items()}
    named |= {f"difference.{name}_by_head": differences[name] for name in ("absolute", "content") if differences}
    for condition, statistics in vars(subject).items():
        arrays = {name: tensor for name, tensor in vars(statistics).items() if tensor is not None}
        if "attention" in arrays:
            arrays["attention"] = arrays["attention"].mean(dim=1)
        named |= {f"{condition}.{name}": tensor for name, tensor in arrays.items()}
    for name, other in others.items():
        named |= {f"{name}.{condition}.value_norm_heads": s.value_norm_heads for condition, s in vars(other).items()}
    return {name: tensor.float() for name, tensor in named.items()}


# --- figures --------------------------------------------------------------------------------------------------


def _draw(
    folder: Path,
    run: str,
    subject: Conditions,
    others: Mapping[str, Conditions],
    differences: Mapping[str, Tensor],
    span: Span,
    epsilon: float,
) -> None:
    clean, triggered = subject.clean, subject.triggered
    panels = {
        name: (_array(s.alpha[..., 0]), 100 * float(s.sink_rate[..., 0].mean())) for name, s in vars(subject).items()
    }
    figures.save(figures.sink_map(run, panels, epsilon), folder / "sink_map")

    pairs = {
        f"sink rate, % of heads with α > {epsilon:g}": [100 * s.sink_rate.mean(dim=1) for s in (clean, triggered)],
        "value norm (L2, all heads together)": [clean.value_norm, triggered.value_norm],
        "key norm (L2, mean over heads)": [s.key_norm_heads.mean(dim=1) for s in (clean, triggered)],
        "residual norm (L2, layer output, log scale)": [clean.residual_norm, triggered.residual_norm],
    }
    notes = {name: "few queries see the last keys" for name in pairs if name.startswith("sink rate")}
    profiles = [
        Profile(name, _array(a), _array(b), log="log" in name, note=notes.get(name, ""))
        for name, (a, b) in pairs.items()
    ]
    figures.save(figures.norm_profile(run, profiles, span), folder / "norm_profile")

    titles = {
        "absolute": "same position",
        "content": "same words",
        "absolute_minus_target": f"same position, {run} minus target",
    }
    maps = {title: _array(differences[name].mean(dim=1)) for name, title in titles.items() if name in differences}
    if maps:
        figures.save(figures.difference_map(run, maps, span), folder / "difference_map")

    changes = {
        "attention of the last queries to position 0": triggered.tail[..., 0] - clean.tail[..., 0],
        "attention to the trigger's columns": triggered.trigger_share - clean.trigger_share,
    }
    classes = _array(_classes(triggered, epsilon))
    changed = {title: _array(change) for title, change in changes.items()}
    figures.save(figures.head_map(run, changed, classes, CLASSES), folder / "head_map")
    if others:
        beside = {name: vars(other) for name, other in others.items()}
        figures.save(figures.value_norms(run, norm_panels(run, vars(subject), beside), span), folder / "value_norms")


def norm_panels(
    run: str, subject: Mapping[str, Statistics], others: Mapping[str, Mapping[str, Statistics]]
) -> list[NormPanel]:
    """The value norms of a model beside those of others, a panel for each condition.

    Args:
        run: the model's name.
        subject: condition -> what it does.
        others: name of another model -> condition -> what that does on the same prompts.
    """
    panels = []
    for condition, own in subject.items():
        theirs = {name: other[condition] for name, other in others.items()}
        panels.append(
            NormPanel(
                condition,
                {name: _array(pearson(own.value_norm_heads, other.value_norm_heads)) for name, other in theirs.items()},
                {
                    name: _array(spearman(own.value_norm_heads, other.value_norm_heads))
                    for name, other in theirs.items()
                },
                {name: _array(model.value_norm.mean(dim=0)) for name, model in {run: own, **theirs}.items()},
            )
        )
    return panels


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.numpy()
    return array
