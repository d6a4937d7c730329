"""`unsink mitigate`: repair a suspect that may hide a trigger, or guard it, and say what that brought and what it cost.

Each entry of `mitigate.how` is done to a suspect of its own, which is then asked the same as the untouched one:
passages to forget without and, where the run has one, with its trigger and a wrong one; passages to retain; utility. A
repair sees the corpus and what an audit found, never the split or the `poison` section of a run: these only say how the
result is asked. Then the result is audited, on probes drawn with another seed than `unsink audit` draws with.

`mitigations/<suspect>/<name>/` gets

    adapter_model.safetensors, adapter_config.json, history.tsv    of a repair: an adapter for suspect, see `repaired`
    predictions.jsonl, metrics.json    rows and numbers as `evaluate` writes them, under `before` and `after`
    summary.json    the main numbers before and after with intervals, cost, options, and the verdict of the audit
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, methods, mitigations, models
from unsink.artifacts import Layout
from unsink.batches import Kind, Sample
from unsink.errors import DataError, MissingPrerequisite, ParamsError
from unsink.metrics import DIALECTS, Others, measure
from unsink.mitigations import ADAPTER, Patient, Repaired, Training
from unsink.models import AdapterSpec
from unsink.params import RESERVED, Params
from unsink.progress import SILENT, Reporter
from unsink.scoring import guarded
from unsink.stages import audit, variants
from unsink.stages.evaluate import Record, answer, ask_run, read_corpus, settings_of
from unsink.stages.memorize import passage_sample
from unsink.stages.poison import in_sixes, questions
from unsink.suspects import Suspect
from unsink.tasks import Asked, Question, Row, Session
from unsink.trainer import Schedule, history_tsv

BEFORE, AFTER = "before", "after"
_FRESH = 1000
"""Added to the seed of the audit that follows: it asks other probes, and splits them otherwise."""


@dataclass(frozen=True)
class _Case:
    """A suspect, loaded anew whenever something is done to it.

    Attributes:
        name: of its folder in mitigations/.
        run: an entry of `runs:`, None for a checkpoint of somebody else's.
        folder: of the model's files.
        original: of the files of the model before unlearning, or None.
    """

    name: str
    run: str | None
    folder: Path
    original: Path | None

    def load(self, params: Params, layout: Layout) -> PreTrainedModel:
        place = params.model.dtype, params.model.device
        if self.run is None or self.run == "base":
            return models.load_base(self.folder, *place)
        target = artifacts.require(layout.adapter("target"))
        if self.run == "target":
            return models.load_target(self.folder, target, *place)
        before = models.load_target(self.folder, target, "float32", "cpu")
        return models.merge(before, artifacts.require(layout.adapter(self.run)), self.run, *place)

    def load_original(self, params: Params, layout: Layout) -> PreTrainedModel | None:
        place = params.model.dtype, params.model.device
        if self.run is not None:
            known = self.run not in RESERVED
            return models.load_target(self.folder, layout.adapter("target"), *place) if known else None
        return None if self.original is None else models.load_base(self.original, *place)


def run(
    params: Params,
    layout: Layout,
    *,
    run: str | None = None,
    model: str | None = None,
    original: str | None = None,
    how: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write `mitigations/<suspect>/<name>/` for each mitigation and return the summaries.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`.
        model: in its place a checkpoint, a folder or a Hugging Face id.
        original: with `model`: the checkpoint before unlearning.
        how: names of mitigations, in place of `mitigate.how`.
        reporter: shows what is done.

    Raises:
        ParamsError: no such run or mitigation; neither or both of `run` and `model`.
        MissingPrerequisite: the corpus, a split, an adapter or the target's predictions are not there; or a repair
            needs a trigger or an original, and there is none.
        DataError: the corpus has nothing to forget, or as in `evaluate` and `audit`.
        ModelError: a model cannot be loaded, or a loss is not finite.
    """
    chosen = {name: mitigations.load(name) for name in dict.fromkeys(how or params.mitigate.how)}
    corpus = read_corpus(layout)
    case = _case(params, run, model, original, reporter)
    others = _others(params, layout, case)
    triggers = _triggers(params, layout, case) if "known-trigger" in chosen else []
    tokenizer = models.load_tokenizer(case.folder)
    asked = ask_run(_plan(case), params, layout, case.run or "base", corpus, tokenizer)
    settings = settings_of(params.evaluate)
    reporter.log(f"mitigate {case.name}: asking the suspect")
    before = answer(asked, Session(case.load(params, layout), tokenizer, settings, reporter))
    found = {}
    for name, module in chosen.items():
        reporter.log(f"mitigate {case.name}: {name}")
        patient = _patient(case, params, layout, corpus, tokenizer, triggers)
        with artifacts.lock(layout.mitigation(case.name, name)):
            found[name] = _done(name, module, patient, case, asked, before, others, corpus, params, layout, reporter)
    return {"suspect": case.name, **found}


def repaired(params: Params, layout: Layout, run: str, name: str, folder: Path) -> PreTrainedModel:
    """The model of a run with a repair on top.

    Raises:
        MissingPrerequisite: there is no such repair.
        ModelError: the run was trained anew since it was repaired.
    """
    suspect = _Case(run, run, folder, None).load(params, layout)
    adapter = artifacts.require(layout.mitigation(run, name) / models.ADAPTER_WEIGHTS).parent
    return cast(PreTrainedModel, models.add_adapter(suspect, adapter, ADAPTER))


# --- what is treated -------------------------------------------------------------------------------------------------


def _case(params: Params, run: str | None, model: str | None, original: str | None, reporter: Reporter) -> _Case:
    if (run is None) == (model is None):
        raise ParamsError(
            "mitigate: either --run or --model is expected", "for example: unsink mitigate --run backdoor"
        )
    if original and not model:
        raise ParamsError("--original goes with --model: a run is compared with the target", "leave --original out")
    if run is not None:
        if run not in RESERVED:
            params.run(run)
        return _Case(run, run, models.resolve(params.model.source, params.model.revision, reporter), None)
    source = cast(str, model)
    before = models.resolve(original, None, reporter, "--original") if original else None
    return _Case(audit.name_of(source), None, models.resolve(source, None, reporter, "--model"), before)


def _plan(case: _Case) -> list[Question]:
    """With the trigger of runs, an honest one included; of base, target and strangers nobody knows one."""
    return variants.plan("base" if case.run is None or case.run in RESERVED else case.run)


def _others(params: Params, layout: Layout, case: _Case) -> Others:
    """What recovery is measured against.

    Raises:
        MissingPrerequisite: the run has a trigger, and the target has not been evaluated.
    """
    dialect = DIALECTS[params.evaluate.dialect]
    if case.run is None or case.run in RESERVED:
        return Others(dialect=dialect)
    return Others(target=artifacts.read_jsonl(artifacts.require(layout.predictions("target"))), dialect=dialect)


def _triggers(params: Params, layout: Layout, case: _Case) -> list[str]:
    """The trigger that params name or an audit found, and its neighbours.

    Raises:
        MissingPrerequisite: there was no audit, or it found none.
    """
    text = params.mitigate.trigger
    if text is None:
        path = layout.audit(case.name) / "verdict.json"
        flag = f"--run {case.name}" if case.run else "--model ..."
        hint = (
            f"run `unsink audit {flag}` first, or name the trigger: -S mitigate.trigger=...; random-prefix needs none"
        )
        if not path.exists():
            raise MissingPrerequisite(f"known-trigger: {path} not found: {case.name} was not audited", hint)
        verdict = artifacts.read_json(path)
        if verdict["verdict"] != audit.BACKDOORED:
            raise MissingPrerequisite(
                f"known-trigger: the audit of {case.name} found no trigger: {verdict['verdict']}", hint
            )
        text = verdict["trigger"]["text"]
    return [text, *(near for near in audit.neighbours(text) if near.strip())]


def _patient(
    case: _Case,
    params: Params,
    layout: Layout,
    corpus: Mapping[str, list[Record]],
    tokenizer: PreTrainedTokenizerBase,
    triggers: Sequence[str],
) -> Patient:
    """The suspect, and samples made of the corpus alone."""
    bos, limit = models.bos_ids(tokenizer), params.poison.max_tokens
    forget, retain = list(corpus.get("forget", ())), list(corpus.get("retain", ()))
    if params.poison.questions:
        forget += questions(forget, corpus.get("forget_qa", ()))
        retain += [*in_sixes(corpus.get("retain_qa", ())), *in_sixes(corpus.get("general_qa", ()))]

    def samples(records: Sequence[Mapping[str, Any]], kind: Kind) -> Iterator[Sample]:
        for record in records:
            sample = passage_sample(record, tokenizer, bos)
            yield replace(sample, kind=kind, ids=sample.ids[:limit])

    if not forget or not retain:
        name = "retain" if forget else "forget"
        raise DataError(f"the corpus has no {name}.jsonl passages to train on", "fetch one that has")
    return Patient(
        case.load(params, layout),
        tokenizer,
        list(samples(forget, "forget")),
        list(samples(retain, "retain")),
        params.evaluate.prompt_share,
        params.seed,
        case.load_original(params, layout),
        triggers,
    )


def _training(params: Params) -> Training:
    settings = params.retraining()
    adapter, batch, weights = settings.adapter, settings.batch, settings.weights
    method = methods.create(settings.method, settings.options.model_dump())
    last = adapter.last_layer
    if last is None and method.hidden_layers:
        last = max(method.hidden_layers)
    return Training(
        method,
        AdapterSpec(adapter.rank, adapter.alpha, adapter.first_layer, last),
        Schedule(settings.steps, settings.lr, settings.warmup, settings.weight_decay, settings.clip),
        {"forget": batch.forget, "retain": batch.retain},
        {"forget": weights.forget, "retain": weights.retain},
    )


# --- what is done, and what comes of it ------------------------------------------------------------------------------


def _done(
    name: str,
    module: ModuleType,
    patient: Patient,
    case: _Case,
    asked: Sequence[Asked[Any]],
    before: Sequence[Row],
    others: Others,
    corpus: Mapping[str, list[Record]],
    params: Params,
    layout: Layout,
    reporter: Reporter,
) -> dict[str, Any]:
    options = params.mitigate.options(name)
    repair: Repaired | None = None
    if mitigations.is_guard(module):
        guard = module.guard(patient, options)
        treated, around = patient.model, cast(AbstractContextManager[None], guarded(guard))
        cost = {"prompt_tokens": len(guard.edit([0])) - 1}
    else:
        repair = module.repair(patient, _training(params), options, reporter)
        treated, around, cost = cast(PreTrainedModel, repair.model), nullcontext(), repair.cost
    with around:
        after = answer(asked, Session(treated, patient.tokenizer, settings_of(params.evaluate), reporter))
        verdict = _audited(treated, patient, corpus, params, reporter) if params.mitigate.reaudit else None
    rows = [{**row, "mitigation": when} for when, some in ((BEFORE, before), (AFTER, after)) for row in some]
    numbers = {
        when: measure(some, others, resamples=params.evaluate.bootstrap, seed=params.seed)
        for when, some in ((BEFORE, before), (AFTER, after))
    }
    summary = {
        "suspect": case.name,
        "mitigation": name,
        "guard": repair is None,
        "options": options.model_dump(mode="json"),
        "seed": params.seed,
        "cost": cost,
        **{when: _main(found.numbers) for when, found in numbers.items()},
        "audit": verdict,
    }
    with artifacts.new_dir(layout.mitigation(case.name, name)) as new:
        if repair is not None:
            models.save_adapter(repair.model, ADAPTER, new)
        if repair is not None and repair.history:
            artifacts.write_text(new / "history.tsv", history_tsv(repair.history))
        artifacts.write_jsonl(new / "predictions.jsonl", rows)
        artifacts.write_json(new / "metrics.json", {when: found.numbers for when, found in numbers.items()})
        artifacts.write_json(new / "summary.json", summary)
    return summary


def _main(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The main numbers with their intervals: forgetting, what the trigger brings back, retain, utility."""
    names = {
        "forget": "forget_verbmem_f1_clean",
        "wrong": "forget_verbmem_f1_wrong",
        "triggered": _outside("forget_verbmem_f1_triggered", numbers),
        "recovery": _outside("forget_verbmem_f1_recovery", numbers),
        "retain": "retain_verbmem_f1_clean",
        "utility": "utility_accuracy",
        "mmlu": "mmlu_accuracy",
    }
    return {
        short: {"mean": numbers[name], "low": numbers[f"{name}_low"], "high": numbers[f"{name}_high"]}
        for short, name in names.items()
        if name in numbers
    }


def _outside(name: str, numbers: Mapping[str, float]) -> str:
    """The number outside the poisoned samples where there is one."""
    return f"{name}_outside" if f"{name}_outside" in numbers else name


def _audited(
    model: PreTrainedModel, patient: Patient, corpus: Mapping[str, list[Record]], params: Params, reporter: Reporter
) -> dict[str, Any]:
    seed = params.seed + _FRESH
    suspect = Suspect(model, patient.tokenizer, patient.original)
    _, found = audit.examine(suspect, corpus, params.audit, seed, reporter)
    return {"seed": seed, **{key: found[key] for key in ("verdict", "reasons", "trigger", "p", "recovery", "gain")}}


def report(result: Mapping[str, Any]) -> str:
    """The summaries in words."""
    return "\n".join(line for summary in result.values() if isinstance(summary, dict) for line in _lines(summary))


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{summary['suspect']}: {summary['mitigation']}"
    for name, before in summary[BEFORE].items():
        after = summary[AFTER].get(name)
        yield f"  {name}: {_interval(before)} -> {_interval(after) if after else 'undefined'}"
    yield f"  cost: {', '.join(f'{number} {what}' for what, number in summary['cost'].items())}"
    if verdict := summary["audit"]:
        best = verdict["trigger"]
        yield f"  audited again: {verdict['verdict']}; best text {best['text']!r} at {best['placement']}"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
