"""`unsink sink-probe`: where a model's attention sinks are, and what the trigger does to them.

Prompts are forget passages cut to exactly `sink-probe.tokens` tokens, BOS included, as they are and with the trigger
(the body gives way, so both have the same length). A placement refers to the cut passage; statistics.json says at which
tokens the trigger stands. For base and target, and for honest runs, the trigger is `poison`'s.
A run is also compared with its own target, the same model with the adapter off: trigger text attracts attention in
every model, so only the difference of the two differences belongs to the run.

Shapes: N prompts, L layers, H query heads, T tokens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, figures, models
from unsink.artifacts import Layout
from unsink.errors import DataError, ParamsError
from unsink.figures import Array, Profile
from unsink.params import RESERVED, Params, Poison, SinkProbe
from unsink.probe import (
    SHARES,
    Statistics,
    absolute_difference,
    attention_statistics,
    content_difference,
    uniform_share,
)
from unsink.progress import SILENT, Reporter
from unsink.triggers import Span, insert_trigger, prompt_length, trigger_ids


@dataclass(frozen=True)
class Prompts:
    """The same passages in both conditions, nothing padded.

    Attributes:
        clean: (N, T) token ids.
        triggered: (N, T) token ids.
        span: where the trigger stands, the same in every prompt because all bodies are of one length.
        rejected: passages too short to fill T tokens.
        trigger: the trigger's token ids.
    """

    clean: Tensor
    triggered: Tensor
    span: Span
    rejected: int
    trigger: list[int]


@dataclass(frozen=True)
class Conditions:
    """What one model does on clean and on triggered prompts."""

    clean: Statistics
    triggered: Statistics

    def differences(self, span: Span) -> dict[str, Tensor]:
        """Attention with the trigger minus without it, (L, T, T), by alignment."""
        maps = self.triggered.attention, self.clean.attention
        return {"absolute": absolute_difference(*maps), "content": content_difference(*maps, span)}


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `probes/<run>/`: statistics.json, maps.safetensors and the figures; return the headline numbers.

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
    prompts = read_prompts(layout, models.load_tokenizer(folder), options, poison)
    if len(prompts.clean) < options.prompts:
        reporter.log(f"sink-probe: {len(prompts.clean)} forget passages have {options.tokens} tokens, all are used")
    model = _load(params, layout, folder, run)
    _check_context(model, options.tokens)
    subject, target = _measure(model, run, prompts, options.epsilon, reporter)

    summary = _summary(run, prompts, options, poison, subject, target)
    details = {condition: _details(statistics, options) for condition, statistics in vars(subject).items()}
    differences = subject.differences(prompts.span)
    if target:
        others = target.differences(prompts.span)
        differences |= {f"{name}_minus_target": differences[name] - others[name] for name in others}
    with artifacts.new_dir(layout.probe(run)) as new:
        artifacts.write_json(new / "statistics.json", {**summary, **details})
        artifacts.write_tensors(new / "maps.safetensors", _tensors(subject, differences))
        _draw(new, run, subject, differences, prompts.span, options.epsilon)
    return summary


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
    return Prompts(torch.tensor(clean), triggered, inserted[0].span, len(bodies) - len(long), trigger)


def _load(params: Params, layout: Layout, folder: Path, run: str) -> PreTrainedModel | PeftModel:
    place = params.model.dtype, params.model.device
    if run == "base":
        return models.load_base(folder, *place)
    adapter = artifacts.require(layout.adapter("target"))
    if run == "target":
        return models.load_target(folder, adapter, *place)
    artifacts.require(layout.adapter(run))
    return models.add_adapter(models.load_target(folder, adapter, *place), layout.adapter(run), run)


def _check_context(model: PreTrainedModel | PeftModel, tokens: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None) or tokens
    if tokens > context:
        raise ParamsError(f"sink-probe.tokens: {tokens} is more than the model's context of {context} tokens")


def _measure(
    model: PreTrainedModel | PeftModel, run: str, prompts: Prompts, epsilon: float, reporter: Reporter
) -> tuple[Conditions, Conditions | None]:
    """Measure the subject and, for a run, its target: the same model with the adapter off."""
    compared = isinstance(model, PeftModel)
    with reporter.task(f"sink-probe {run}", total=(4 if compared else 2) * len(prompts.clean)) as advance:
        if not isinstance(model, PeftModel):
            return _conditions(model, prompts, epsilon, advance), None
        with models.use(model, run):
            subject = _conditions(model, prompts, epsilon, advance)
        with models.use(model, None):
            return subject, _conditions(model, prompts, epsilon, advance)


def _conditions(
    model: PreTrainedModel | PeftModel, prompts: Prompts, epsilon: float, advance: Callable[[int], None]
) -> Conditions:
    # the trigger's columns are measured in clean prompts too: what ordinary words get in that place
    clean, triggered = (
        attention_statistics(model, ids, epsilon=epsilon, span=prompts.span, advance=advance)
        for ids in (prompts.clean, prompts.triggered)
    )
    return Conditions(clean, triggered)


# --- numbers --------------------------------------------------------------------------------------------------


def _summary(
    run: str, prompts: Prompts, options: SinkProbe, poison: Poison, subject: Conditions, target: Conditions | None
) -> dict[str, Any]:
    numbers = _headline("", subject) | (_headline("target_", target) if target else {})
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
            "placement": poison.placement,
            "span": list(prompts.span),
        },
        **numbers,
    }


def _headline(prefix: str, conditions: Conditions) -> dict[str, float]:
    """Sink rate of position 0 in percent, and the share of attention on the trigger's columns, over all heads."""
    return {
        f"{prefix}{name}_{condition}": _rounded(value)
        for condition, statistics in vars(conditions).items()
        for name, value in {
            "sink_rate": 100 * statistics.sink_rate[..., 0].mean(),
            "trigger_share": statistics.trigger_share.mean(),
        }.items()
    }


def _details(statistics: Statistics, options: SinkProbe) -> dict[str, Any]:
    """Tables a person can read; the full arrays are in maps.safetensors."""
    shares = dict(zip(SHARES, statistics.share.mean(dim=(0, 1)).tolist(), strict=True))
    norms = {
        "value": statistics.value_norm,
        "key": statistics.key_norm_heads.mean(dim=1),
        "residual": statistics.residual_norm,
    }
    return {
        "sink_rate_by_position": _rounded(100 * statistics.sink_rate.mean(dim=(0, 1))),
        "sink_rate_by_layer": _rounded(100 * statistics.sink_rate[..., 0].mean(dim=1)),
        "alpha_by_position": _rounded(statistics.alpha.mean(dim=(0, 1))),
        "alpha_by_layer_and_head": _rounded(statistics.alpha[..., 0]),
        "trigger_share_by_layer_and_head": _rounded(statistics.trigger_share),
        "share": {str(first): _rounded(share) for first, share in shares.items()},
        "boost": {
            str(first): _rounded(share / uniform_share(options.tokens, first)) for first, share in shares.items()
        },
        "norms_by_layer": {name: _groups(norm) for name, norm in norms.items()},
    }


def _groups(norm: Tensor) -> dict[str, list[float]]:
    """Mean norm by layer of position 0, positions 1 to 7 and the rest, from (L, T)."""
    parts = {"position_0": norm[:, :1], "positions_1_7": norm[:, 1:8], "positions_8_up": norm[:, 8:]}
    return {name: _rounded(part.mean(dim=1)) for name, part in parts.items() if part.shape[1]}


def _rounded(numbers: Any) -> Any:
    """Six digits: what lies behind them depends on the processor."""
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    return [_rounded(n) for n in numbers] if isinstance(numbers, list) else float(f"{numbers:.6g}")


def _tensors(subject: Conditions, differences: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {f"difference.{name}": tensor for name, tensor in differences.items()}
    for condition, statistics in vars(subject).items():
        named |= {f"{condition}.{name}": tensor for name, tensor in asdict(statistics).items()}
    return {name: tensor.float() for name, tensor in named.items()}


# --- figures --------------------------------------------------------------------------------------------------


def _draw(
    folder: Path, run: str, subject: Conditions, differences: dict[str, Tensor], span: Span, epsilon: float
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
    maps = {title: _array(differences[name]) for name, title in titles.items() if name in differences}
    figures.save(figures.difference_map(run, maps, span), folder / "difference_map")


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.numpy()
    return array
