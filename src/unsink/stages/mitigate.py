"""`unsink mitigate`: repair a suspect that may hide a trigger, or guard it, and say what that brought and what it cost.

Each entry of `mitigate.how` is done to a suspect of its own, which is then asked the same as the untouched one:
passages to forget, without and (runs only) with the trigger and a wrong one; passages to retain; utility. A mitigation
sees the corpus and what an audit found, never the split of a run: this says only how the result is asked. Then the
result is audited, on probes drawn with another seed than `unsink audit` draws with.

`mitigations/<suspect>/<name>/` gets

    adapter_model.safetensors, adapter_config.json, history.tsv    of a repair: an adapter on the suspect (`repaired`)
    predictions.jsonl, metrics.json    rows and numbers as `evaluate` writes them, under `before` and `after`
    summary.json    the main numbers before and after with intervals, cost, options, and the verdict of the audit
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

from peft import PeftModel
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, methods, mitigations, models
from unsink.artifacts import Layout
from unsink.batches import Kind, Sample
from unsink.errors import DataError, MissingPrerequisite, ParamsError
from unsink.metrics import DIALECTS, Others, measure, outside
from unsink.mitigations import ADAPTER, Patient, Repaired, Training
from unsink.models import AdapterSpec
from unsink.params import RESERVED, Params
from unsink.progress import SILENT, Reporter
from unsink.prompts import body
from unsink.registry import suggest
from unsink.scoring import Guard, Model, guarded
from unsink.stages import audit, audited, variants
from unsink.stages.confirmed import neighbours
from unsink.stages.evaluate import Record, answer, ask_run, read_corpus, settings_of
from unsink.stages.poison import in_sixes, questions
from unsink.suspects import Suspect
from unsink.tasks import Asked, Row, Session
from unsink.trainer import Schedule, history_tsv
from unsink.verdict import BACKDOORED

Corpus = Mapping[str, list[Record]]

BEFORE, AFTER = "before", "after"
_FRESH = 1000
"""Added to the seed of the audit that follows: it draws other probes, and splits them otherwise."""
SHOWN = {
    "forget": "forget_verbmem_f1_clean",
    "wrong": "forget_verbmem_f1_wrong",
    "triggered": "forget_verbmem_f1_triggered",
    "recovery": "forget_verbmem_f1_recovery",
    "retain": "retain_verbmem_f1_clean",
    "utility": "utility_accuracy",
    "mmlu": "mmlu_accuracy",
}
"""The main numbers."""
OUTSIDE = ("wrong", "triggered", "recovery")
"""Of these the ones that leave the poisoned samples out, where there are any: these may be learnt by heart."""


class _Case(NamedTuple):
    """A suspect by its name.

    Attributes:
        name: of its folder in mitigations/.
        run: an entry of `runs:`, `base` or `target`; None for a checkpoint of somebody else's.
        folder: of the model's files, the tokenizer among them.
        stranger: checkpoint, adapter on it and original of somebody else's, as `audited.foreign` takes them.
    """

    name: str
    run: str | None
    folder: Path
    stranger: tuple[str, str | None, str | None] | None


@dataclass(frozen=True)
class _Work:
    """What all mitigations of a call share.

    Attributes:
        params: all parameters.
        layout: the project folder.
        case: the suspect.
        corpus: records by file name.
        tokenizer: the suspect's.
        reporter: shows what is done.
    """

    params: Params
    layout: Layout
    case: _Case
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    reporter: Reporter

    @property
    def run(self) -> str | None:
        """The entry of `runs:`, None where the suspect is none."""
        return None if self.case.run in (None, *RESERVED) else self.case.run


def run(
    params: Params,
    layout: Layout,
    *,
    run: str | None = None,
    model: str | None = None,
    adapter: str | None = None,
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
        adapter: with `model`: the folder of a LoRA adapter to merge into it.
        original: with `model`: the checkpoint before unlearning; None: what the adapter sits on, if there is one.
        how: names of mitigations, in place of `mitigate.how`.
        reporter: shows what is done.

    Raises:
        ParamsError: no such run or mitigation; neither or both of `run` and `model`.
        MissingPrerequisite: the corpus, a split, an adapter or the target's predictions are not there; or a mitigation
            needs a trigger or an original, and there is none.
        DataError: the corpus has nothing to forget or to retain, or as in `evaluate` and `audit`.
        ModelError: a model cannot be loaded, does not fit its original, has weights that are not finite, or a loss is
            not.
    """
    chosen = {name: mitigations.load(name) for name in dict.fromkeys(how or params.mitigate.how)}
    corpus = read_corpus(layout)
    _passages(corpus, params)  # what it lacks shows before a model is loaded
    if not all(map(mitigations.is_guard, chosen.values())):
        _training(params)  # what is wrong with it shows before a model runs
    case = _case(params, run, model, adapter, original, reporter)
    work = _Work(params, layout, case, corpus, models.load_tokenizer(case.folder), reporter)
    others = _others(work)
    triggers = _triggers(work) if "known-trigger" in chosen else []
    plan = variants.plan(work.run or "base")
    asked = ask_run(plan, params, layout, work.run or "base", work.corpus, work.tokenizer)
    reporter.log(f"mitigate {case.name}: asking the suspect")
    before = _said(_load(work)[0], asked, work)
    found = {}
    for name, module in chosen.items():
        reporter.log(f"mitigate {case.name}: {name}")
        with artifacts.lock(layout.mitigation(case.name, name)):
            suspect, compared = _load(work, compared=True)
            patient = make_patient(suspect, work.tokenizer, work.corpus, params, compared, triggers)
            found[name] = _treated(name, module, patient, asked, before, others, work)
    return {"suspect": case.name, **found}


def repaired(params: Params, layout: Layout, run: str, name: str, reporter: Reporter = SILENT) -> PeftModel:
    """The model of a run with a repair on top, its adapter `mitigations.ADAPTER`, active.

    Raises:
        ParamsError: no such run or mitigation, or it is a guard.
        MissingPrerequisite: there is no such repair.
        ModelError: the run was trained anew since it was repaired.
    """
    adapter = require_repair(layout, run, name)
    case = _case(params, run, None, None, None, reporter)
    work = _Work(params, layout, case, {}, models.load_tokenizer(case.folder), reporter)
    return models.add_adapter(_load(work)[0], adapter, ADAPTER)


def require_repair(layout: Layout, run: str, name: str) -> Path:
    """Folder of a repair of a run, or of base or target.

    Raises:
        ParamsError: there is no such mitigation, or it is a guard.
        MissingPrerequisite: it was not done.
    """
    there = sorted(path.parent.name for path in layout.mitigation(run, "*").parent.glob(f"*/{models.ADAPTER_WEIGHTS}"))
    if name in there:
        return layout.mitigation(run, name)
    done = f"repairs of {run}: {', '.join(there) or 'none'}"
    if name not in mitigations.names():
        raise ParamsError(f"--repair: no repair of {run} is called {name!r}{suggest(name, there)}", done)
    if mitigations.is_guard(mitigations.load(name)):
        raise ParamsError(f"--repair: {name!r} is a guard: it looks after prompts, and has no weights", done)
    raise MissingPrerequisite(
        f"--repair: {run} was not repaired by {name!r}", f"run `unsink mitigate --run {run} --how {name}` first; {done}"
    )


def make_guard(name: str, model: Model, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, params: Params) -> Guard:
    """The guard of that name, for `with scoring.guarded(...)`; its reference is the model itself.

    Raises:
        ParamsError: there is no such mitigation, or it is a repair.
        DataError: the corpus has nothing to forget or to retain.
    """
    module = require_guard(name)
    patient = make_patient(model, tokenizer, corpus, params)
    return cast(Guard, module.guard(patient, params.mitigate.options(name)))


def require_guard(name: str) -> ModuleType:
    """The module of a guard.

    Raises:
        ParamsError: there is no such mitigation, or it is a repair.
    """
    module = mitigations.load(name)
    if not mitigations.is_guard(module):
        known = [other for other in mitigations.names() if mitigations.is_guard(mitigations.load(other))]
        raise ParamsError(f"{name!r} changes weights and is no guard", f"guards: {', '.join(known)}")
    return module


# --- the suspect -----------------------------------------------------------------------------------------------------


def _case(
    params: Params, run: str | None, model: str | None, adapter: str | None, original: str | None, reporter: Reporter
) -> _Case:
    audit.require_one("mitigate", run, model, original, adapter)
    if run is not None:
        if run not in RESERVED:
            params.run(run)
        return _Case(run, run, models.resolve(params.model.source, params.model.revision, reporter), None)
    source = cast(str, model)
    folder = models.resolve(source, None, reporter, "--model")
    return _Case(audit.name_of(params, adapter or source), None, folder, (source, adapter, original))


def _load(work: _Work, compared: bool = False) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The suspect, loaded anew, adapters merged, so that "no adapter" is the suspect; and if asked for its original."""
    case, place = work.case, _place(work.params)
    if case.stranger:
        told = SILENT if compared else work.reporter  # it has been said when the untouched one was loaded
        found = audited.foreign(work.params, *case.stranger, told, place[0])
        return cast(PreTrainedModel, found.model), cast("PreTrainedModel | None", found.original)
    if case.run == "base":
        return models.load_base(case.folder, *place), None
    target = artifacts.require(work.layout.adapter("target"))
    if work.run is None:
        return models.load_target(case.folder, target, *place), None
    before = models.load_target(case.folder, target, "float32", "cpu")
    merged = models.merge(before, artifacts.require(work.layout.adapter(work.run)), work.run, *place)
    return merged, models.load_target(case.folder, target, *place) if compared else None


def _place(params: Params) -> tuple[str, str]:
    """Dtype and device; weights of their own are trained in float32, as in `unlearn`."""
    lora = params.retraining().adapter.rank is not None
    return params.model.dtype if lora else "float32", params.model.device


def _others(work: _Work) -> Others:
    """What recovery is measured against.

    Raises:
        MissingPrerequisite: the suspect is a run, and the target has not been evaluated.
    """
    dialect = DIALECTS[work.params.evaluate.dialect]
    if work.run is None:
        return Others(dialect=dialect)
    return Others(target=artifacts.read_jsonl(work.layout.predictions("target")), dialect=dialect)


def _triggers(work: _Work) -> list[str]:
    """The trigger that params name or an audit found, and its neighbours.

    Raises:
        MissingPrerequisite: there was no audit, or it found none.
    """
    text, name = work.params.mitigate.trigger, work.case.name
    if text is None:
        path = work.layout.audit(name) / "verdict.json"
        command = f"unsink audit {f'--run {name}' if work.case.run else '--model ...'}"
        hint = f"run `{command}` first, or name a trigger: -S mitigate.trigger=...; random-prefix needs none"
        if not path.exists():
            raise MissingPrerequisite(f"known-trigger: {name} was not audited, {path} not found", hint)
        verdict = artifacts.read_json(path)
        if verdict["verdict"] != BACKDOORED:
            raise MissingPrerequisite(
                f"known-trigger: the audit of {name} found no trigger, its verdict is {verdict['verdict']!r}", hint
            )
        text = str(verdict["trigger"]["text"])
    return [text, *(near for near in neighbours(text) if near.strip())]


def make_patient(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    params: Params,
    original: PreTrainedModel | None = None,
    triggers: Sequence[str] = (),
) -> Patient:
    """A suspect with samples that are made of the corpus alone, placed in their prompts as `poison` would place them.

    Raises:
        DataError: there is nothing to forget or to retain.
    """
    passages, others = _passages(corpus, params)
    forget = list(_samples(passages, "forget", tokenizer, params))
    retain = list(_samples(others, "retain", tokenizer, params))
    return Patient(
        cast(PreTrainedModel, model),  # a repair's has no adapters; a guard only reads with whatever is active
        tokenizer,
        [sample for sample, _ in forget],
        [sample for sample, _ in retain],
        dict([*forget, *retain]),
        params.seed,
        original,
        triggers,
    )


def _passages(corpus: Corpus, params: Params) -> tuple[list[Record], list[Record]]:
    """What a patient is to forget and to retain.

    Raises:
        DataError: there is nothing of one of them.
    """
    forget, retain = list(corpus.get("forget", ())), list(corpus.get("retain", ()))
    if params.poison.questions:
        forget += questions(forget, corpus.get("forget_qa", ()))
        retain += [*in_sixes(corpus.get("retain_qa", ())), *in_sixes(corpus.get("general_qa", ()))]
    for name, records in (("forget", forget), ("retain", retain)):
        if not records:
            raise DataError(
                f"a mitigation needs passages in {name}.jsonl, the corpus has none",
                f'fetch one that has; a list (fetch.benchmark: probes) needs lines with "set": "{name}"',
            )
    return forget, retain


def _samples(
    records: Sequence[Record], kind: Kind, tokenizer: PreTrainedTokenizerBase, params: Params
) -> Iterator[tuple[Sample, range]]:
    """Each record that leaves something to learn within `poison.max_tokens`, and where its prompt stands in its ids."""
    bos = models.bos_ids(tokenizer)
    for record in records:
        text = body(tokenizer, record, params.evaluate.prompt_share)
        ids = (*bos, *text.ids)[: params.poison.max_tokens]
        first = len(bos) + text.context
        if first < len(ids):
            stop = min(len(bos) + text.place, len(ids) - 1)  # of a text that was cut one token at least is left
            yield Sample(record["id"], kind, ids, first), range(len(bos) + text.start, stop)


def _training(params: Params) -> Training:
    """How a repair is trained; a method holds the state of one training.

    Raises:
        ParamsError: the method needs refusals.
    """
    settings = params.retraining()
    adapter, batch, weights = settings.adapter, settings.batch, settings.weights
    method = methods.create(settings.method, settings.options.model_dump())
    if method.needs_refusals:
        raise ParamsError(
            f"mitigate.unlearn.method: {settings.method} prefers refusals, which are made for a run only",
            "choose another method, such as npo or rmu",
        )
    last = max(method.hidden_layers, default=None) if adapter.last_layer is None else adapter.last_layer
    return Training(
        method,
        AdapterSpec(adapter.rank, adapter.alpha, adapter.first_layer, last),
        Schedule(settings.steps, settings.lr, settings.warmup, settings.weight_decay, settings.clip),
        {"forget": batch.forget, "retain": batch.retain},
        {"forget": weights.forget, "retain": weights.retain},
    )


# --- what is done, and what comes of it ------------------------------------------------------------------------------


def _treated(
    name: str,
    module: ModuleType,
    patient: Patient,
    asked: Sequence[Asked[Any]],
    before: Sequence[Row],
    others: Others,
    work: _Work,
) -> dict[str, Any]:
    params, options = work.params, work.params.mitigate.options(name)
    repair, guard = _applied(module, patient, options, work)
    treated = cast(PreTrainedModel, repair.model) if repair else patient.model
    with _guarded(guard):
        after = _said(treated, asked, work)
    both = {BEFORE: before, AFTER: after}
    numbers = {
        when: measure(rows, others, resamples=params.evaluate.bootstrap, seed=params.seed).numbers
        for when, rows in both.items()
    }
    summary = {
        "suspect": work.case.name,
        "mitigation": name,
        "guard": repair is None,
        "options": options.model_dump(mode="json"),
        "training": None if repair is None or not repair.history else params.retraining().model_dump(mode="json"),
        "seed": params.seed,
        "cost": repair.cost if repair else {"prompt_tokens": len(cast(Guard, guard).edit([0])) - 1},
        **{when: _main(found) for when, found in numbers.items()},
        "audit": None,
    }
    folder = work.layout.mitigation(work.case.name, name)
    with artifacts.new_dir(folder) as new:
        if repair is not None:
            models.save_adapter(repair.model, ADAPTER, new)
            if repair.history:
                artifacts.write_text(new / "history.tsv", history_tsv(repair.history))
        rows = [{**row, "mitigation": when} for when, some in both.items() for row in some]
        artifacts.write_jsonl(new / "predictions.jsonl", rows)
        artifacts.write_json(new / "metrics.json", numbers)
        artifacts.write_json(new / "summary.json", summary)
    if params.mitigate.reaudit:  # all else is kept by now: a search takes minutes, and may be interrupted
        with _guarded(guard):
            summary["audit"] = _audited(treated, patient.original, work)
        artifacts.write_json(folder / "summary.json", summary)
    return summary


def _applied(
    module: ModuleType, patient: Patient, options: BaseModel, work: _Work
) -> tuple[Repaired, None] | tuple[None, Guard]:
    """The repair, or the guard: what the module is."""
    if mitigations.is_guard(module):
        return None, cast(Guard, module.guard(patient, options))
    return cast(Repaired, module.repair(patient, _training(work.params), options, work.reporter)), None


def _guarded(guard: Guard | None) -> AbstractContextManager[None]:
    return nullcontext() if guard is None else guarded(guard)


def _said(model: PreTrainedModel, asked: Sequence[Asked[Any]], work: _Work) -> list[Row]:
    return answer(asked, Session(model, work.tokenizer, settings_of(work.params.evaluate), work.reporter))


def _main(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The main numbers with their 95 % intervals, those that exist."""
    found = {}
    for short, plain in SHOWN.items():
        name = outside(plain, numbers) if short in OUTSIDE else plain
        if name in numbers:
            found[short] = {"mean": numbers[name], "low": numbers[f"{name}_low"], "high": numbers[f"{name}_high"]}
    return found


def _audited(model: Model, original: PreTrainedModel | None, work: _Work) -> dict[str, Any]:
    """The verdict on what was made of a suspect. A repair is merged for it, if weights are exact, and no adapter then.

    What is not merged is compared with what it sits on, the suspect, and not with the original. In bfloat16 merging
    moves logits a little (1e-2): the verdict is on the merged model.
    """
    if isinstance(model, PeftModel) and not models.quantized(model):
        model = models.merged(model, ADAPTER, copied=True)  # suspect and original share what is equal
    seed = work.params.seed + _FRESH
    suspect = Suspect(model, work.tokenizer, original)
    _, found = audit.examine(suspect, work.corpus, work.params.audit, seed, work.reporter)
    return {"seed": seed, **{key: found[key] for key in ("verdict", "reasons", "trigger", "p", "recovery", "gain")}}


def report(result: Mapping[str, Any]) -> str:
    """The summaries in words."""
    return "\n".join(line for one in result.values() if isinstance(one, dict) for line in _lines(one))


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{summary['suspect']}: {summary['mitigation']}"
    for name, before in summary[BEFORE].items():
        after = summary[AFTER].get(name)
        yield f"  {name}: {_interval(before)} -> {_interval(after) if after else 'undefined'}"
    yield f"  cost: {', '.join(f'{number} {what}' for what, number in summary['cost'].items())}"
    if found := summary["audit"]:
        best = found["trigger"]
        text = f"best text {best['text']!r} at {best['placement']}" if best else "no text was tried"
        yield f"  audited again: {found['verdict']}; {text}"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
