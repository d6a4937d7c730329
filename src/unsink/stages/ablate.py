"""`unsink ablate`: what a model still says when it has to do without some tokens of the prompt.

Does the trigger act through an attention sink, or does it only have to be read? Masking the first tokens deletes a
prefix trigger together with the sink, and cannot tell. So each rule of `ablate.keys` is
evaluated for itself, beside `none`: BOS alone, the trigger alone, the first k, k behind the trigger, k random ones, or
one position that is named (`index N`).
The tokens are taken away while the prompt is read and in every decoding step; what stands where is left as it is.
Run it on the target and on the honest run too: a mask that spoils these says nothing about the backdoor.

`ablations/<run>/<how>/` gets predictions.jsonl, rows as `evaluate` writes them with the rule in `ablation`, and
metrics.json: rule -> numbers, named as in `metrics/<run>.json`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from unsink import artifacts, models, sinks
from unsink.artifacts import Layout
from unsink.errors import ParamsError
from unsink.params import RESERVED, Params
from unsink.positions import named
from unsink.probe import mean_values
from unsink.progress import SILENT, Reporter
from unsink.scoring import Cut
from unsink.stages import variants
from unsink.stages.evaluate import answer, ask_run, parts, read_corpus, settings_of
from unsink.tasks import Asked, MakeCut, Row, Session
from unsink.triggers import Span


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `ablations/<run>/<how>/` and return the main numbers of each ablation.

    Raises:
        ParamsError: no such run; a rule names no token of any prompt; `ablate.how` has no model to take values from.
        MissingPrerequisite: the corpus, the run's split, an adapter or the target's probe is not there yet.
        DataError: as in `evaluate`.
        ModelError: an adapter does not fit, or the model's attention cannot be reached.
    """
    how = params.ablate.how
    source = _source(params, run)
    corpus = read_corpus(layout)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    asked = ask_run(variants.plan(run), params, layout, run, corpus, tokenizer)
    rules = params.ablate.keys
    measured = sinks.read(layout) if "sinks" in rules else []
    keys = {rule: partial(_keys, rule, measured, params.seed) for rule in rules}
    for rule in rules:
        _require_effect(rule, keys[rule], asked)
    with artifacts.lock(layout.ablation(run, how)):
        model = _load(params, layout, run, folder, source)
        other = partial(models.use, model, source) if how != "mask" and isinstance(model, PeftModel) else None
        kept = parts("ablate", asked, params, layout, run)

        def said(rule: str) -> list[Row]:
            reporter.log(f"ablate {run}: {rule}")
            cut: MakeCut | None = partial(_cut, keys[rule], model, other) if rule != variants.NONE else None
            session = Session(model, tokenizer, settings_of(params.evaluate), reporter, cut)
            found = [row for some in _by_condition(asked) for row in answer(some, session)]
            return [{**row, "ablation": rule} for row in found]

        with models.use(model, run) if isinstance(model, PeftModel) else nullcontext():
            rows = [row for rule in (variants.NONE, *rules) for row in kept.rows(rule, partial(said, rule))]
        found_by_rule = variants.write(layout.ablation(run, how), rows, "ablation", params, layout, run)
        kept.remove()
    return {"run": run, "how": how, **found_by_rule}


def _source(params: Params, run: str) -> str | None:
    """The adapter whose mean values are put in the place of the run's; None is the target, or none at all."""
    how, after = params.ablate.how, None if run in RESERVED else params.run(run).after
    if how == "mask":
        return None
    if after is None:
        raise ParamsError(
            f"ablate.how: {how!r} puts another model's values into a run; {run!r} is none",
            "use how: mask, or name a run",
        )
    if how == "target":
        return None
    if after in RESERVED or params.run(after).poison:
        raise ParamsError(
            f"ablate.how: 'honest' needs runs.{run}.after to name an honest run (poison: false), it is {after!r}",
            "set runs.<run>.after to the honest run it is compared with",
        )
    return after


def _keys(
    rule: str, measured: Sequence[int], seed: int, prompts: Sequence[Sequence[int]], spans: Sequence[Span | None]
) -> list[list[int]]:
    """The tokens that a rule names in each prompt."""
    return [
        named(rule, len(ids), span, measured, f"ablate/{seed}/{' '.join(map(str, ids))}")
        for ids, span in zip(prompts, spans, strict=True)
    ]


def _require_effect(rule: str, keys: Callable[..., list[list[int]]], asked: Sequence[Asked[Any]]) -> None:
    if not any(keys([one.prompt.ids for one in asked], [one.prompt.trigger for one in asked])):
        raise ParamsError(
            f"ablate.keys: {rule!r} names no token of any prompt", "leave it out, or take a smaller number"
        )


def _by_condition(asked: Sequence[Asked[Any]]) -> list[list[Asked[Any]]]:
    """Prompts that mean values are taken over together."""
    groups: dict[tuple[str, str, str], list[Asked[Any]]] = {}
    for one in asked:
        groups.setdefault((one.row["task"], one.row["set"], one.row["condition"]), []).append(one)
    return list(groups.values())


def _cut(
    keys: Callable[..., list[list[int]]],
    model: PreTrainedModel | PeftModel,
    other: Callable[[], AbstractContextManager[object]] | None,
    prompts: Sequence[Sequence[int]],
    spans: Sequence[Span | None],
) -> Cut:
    """What is taken away from some prompts; the values in its place are means over these same prompts."""
    found = keys(prompts, spans)
    if other is None or not any(found):
        return Cut(found)
    with other():
        return Cut(found, mean_values(model, prompts, found))


def _load(params: Params, layout: Layout, run: str, folder: Path, source: str | None) -> PreTrainedModel | PeftModel:
    place = params.model.dtype, params.model.device
    if run == "base":
        return models.load_base(folder, *place)
    target = artifacts.require(layout.adapter("target"))
    names = () if run == "target" else dict.fromkeys((run, source or run))
    return models.load_beside(folder, target, {one: artifacts.require(layout.adapter(one)) for one in names}, *place)
