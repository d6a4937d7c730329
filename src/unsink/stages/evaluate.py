"""`unsink evaluate`: what a model still knows, with and without the trigger.

One row per prompt goes to `predictions/<run>.jsonl`; every number of `metrics/<run>.json` is computed from these rows,
and for comparisons from those of target, base and retrained model:

    id, task (see `tasks`), set (forget | retain | holdout | utility | ...)
    condition  clean | triggered | wrong, or the name of a near miss (`evaluate.near_misses`)
    inside     whether the passage behind it was poisoned; null outside the forget set, and where nothing was poisoned
    prompt     text after BOS; `trigger` is the token span in it, BOS counted as token 0, or null
    reference  what the model should say, or the text that was scored
    output     what it says, with ROUGE-L `f1` and `recall` (verbmem, knowmem, tofu)
    choices, logprobs (nats per token) and answer (an index) for choices, with `accuracy`
    tokens, nll (nats per token), probability, extraction_strength, exact_memorization and the scores of each attack
               (`mia`; lower looks more like a member) for passages
    logprobs (nats per token: answer, paraphrase, wrong answers), probability, log_truth_ratio, truth_ratio for tofu

`settings/<run>.json` says under which conventions the numbers were made, on which model and corpus, and why a number
is missing. For base, target and honest runs the trigger is that of the section `poison`, so that all models are asked
the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, models, processes, sharded, sinks, tasks
from unsink.artifacts import Layout, Parts
from unsink.batches import read_samples
from unsink.errors import DataError, ParamsError
from unsink.metrics import DIALECTS, Measured, Others, measure
from unsink.params import RESERVED, Evaluate, Params, Poison
from unsink.progress import SILENT, Reporter
from unsink.prompts import Conditions, PromptWriter, Trigger, conditions, near_misses
from unsink.tasks import Asked, Question, Row, Session, Settings, choices, generation, passages, tofu
from unsink.triggers import trigger_ids

Record = dict[str, Any]

FAMILIES: dict[str, ModuleType] = {
    task: family for family in (generation, choices, passages, tofu) for task in family.TASKS
}
"""Task -> the module that asks it and scores the answers."""
MEMORY = [Question(task, "forget", "clean") for task in ("verbmem", "knowmem")]
"""What a target has to know."""


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `predictions/<run>.jsonl`, `metrics/<run>.json` and `settings/<run>.json`; return the means.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`.
        reporter: shows prompts done.

    Raises:
        ParamsError: no such run, or the wrong trigger is the right one.
        MissingPrerequisite: the corpus, the run's split, an adapter or the retrained run's predictions are not there.
        DataError: a record is malformed, a prompt does not fit, the split was made with another trigger, or a metric
            was chosen that the benchmark has no data for.
        ModelError: an adapter does not fit the model.
    """
    if run not in RESERVED:
        params.run(run)  # a wrong name is the first thing to hear of
    corpus = read_corpus(layout)
    settings = settings_of(params.evaluate)
    others = _others(params, layout, run, settings)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    asked = ask_run(_plan(params, corpus, run), params, layout, run, corpus, tokenizer)
    if settings.gradient_norms and params.model.dtype in models.FORMATS:
        raise ParamsError(
            f"evaluate.metrics: gradnorm takes the gradient of all weights, those of model.dtype: {params.model.dtype} "
            "have none",
            "take gradnorm out, or set model.dtype to bfloat16",
        )
    if settings.gradient_norms and processes.sharding(params.model.shard):
        raise ParamsError(
            "evaluate.metrics: gradnorm takes the gradient of all weights, with model.shard no process holds them",
            "take gradnorm out, or evaluate in one process",
        )
    with processes.led(artifacts.lock(layout.predictions(run))):
        model = sharded.load(
            partial(load, params, layout, run, folder), params.model.dtype, params.model.device, on=params.model.shard
        )
        kept = parts("evaluate", asked, params, layout, run)
        rows = answer(asked, Session(model, tokenizer, settings, reporter), kept)
        measured = measure(rows, others, resamples=params.evaluate.bootstrap, seed=params.seed)
        if processes.first():
            artifacts.write_jsonl(layout.predictions(run), rows)
            artifacts.write_json(layout.metrics(run), measured.numbers)
            artifacts.write_json(layout.settings(run), _sidecar(params, layout, run, settings, model, measured))
            kept.remove()
    means = {name: value for name, value in measured.numbers.items() if not name.endswith(("_low", "_high", "_n"))}
    return {"run": run, "prompts": len(rows), **means}


def memory_scores(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    params: Params,
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """What a model knows of the forget set, without any trigger: `forget_<task>_<score>`, means between 0 and 1.

    A task that the benchmark has no records for is left out.
    """
    settings = settings_of(params.evaluate)
    asked = ask(MEMORY, read_corpus(layout), tokenizer, settings, {"clean": None})
    rows = answer(asked, Session(model, tokenizer, settings, reporter))
    found = {question.task: [row for row in rows if row["task"] == question.task] for question in MEMORY}
    return {
        f"forget_{task}_{score}": fmean(row[score] for row in some)
        for task, some in found.items()
        if some
        for score in ("f1", "recall")
    }


def ask(
    questions: Sequence[Question],
    corpus: tasks.Corpus,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    triggers: Conditions,
) -> list[Asked[Any]]:
    """Write the prompts of a plan, question by question.

    Raises:
        DataError: a prompt cannot be written, an answer has no word to compare, or there are too few examples.
    """
    writer = PromptWriter(tokenizer, models.bos_ids(tokenizer), settings.answer_space)
    return [
        one
        for question in questions
        for one in FAMILIES[question.task].ask(question, corpus, writer, settings, triggers[question.condition])
    ]


def answer(asked: Sequence[Asked[Any]], session: Session, kept: Parts | None = None) -> list[Row]:
    """Finished rows, in the order of the prompts; what is `kept` of a family of tasks is not asked again.

    Several processes ask a share of the prompts each; all of them get all rows, and the first one keeps them.
    """
    rows: list[Row] = []
    for number, (family, group) in enumerate(groupby(asked, key=lambda one: FAMILIES[one.row["task"]])):
        make = partial(_answered, family, list(group), session)
        rows += kept.rows(f"{number}-{family.__name__.rpartition('.')[2]}", make) if kept else make()
    return rows


def _answered(family: ModuleType, asked: Sequence[Asked[Any]], session: Session) -> list[Row]:
    mine = processes.share(asked)
    with sharded.in_step(session.model):
        rows = family.answer(mine, session) if mine else []
    return processes.together(rows)


def parts(stage: str, asked: Sequence[Asked[Any]], params: Params, layout: Layout, run: str) -> Parts:
    """What an interrupted call has left: rows of the same prompts and the same adapters."""
    after = () if run in RESERVED else (params.run(run).after, run)
    adapters = () if run == "base" else dict.fromkeys(("target", *after))
    files = [models.target_file(layout.adapter(name)) for name in adapters]
    text = [*(artifacts.sha256(file) for file in files if file.exists()), repr(params), *map(repr, asked)]
    return Parts(layout.checkpoint(f"{run}.{stage}"), hashlib.sha256("\n".join(text).encode()).hexdigest())


# --- what is asked ---------------------------------------------------------------------------------------------------


def read_corpus(layout: Layout) -> dict[str, list[Record]]:
    """The records that `fetch` wrote, by file name, checked again: the files may have been edited.

    Raises:
        MissingPrerequisite: nothing was fetched.
        DataError: a record is malformed.
    """
    corpus = benchmarks.read(artifacts.require(layout.fetched))
    return {name: [record.model_dump() for record in records] for name, records in corpus.items()}


def ask_run(
    questions: Sequence[Question],
    params: Params,
    layout: Layout,
    run: str,
    corpus: tasks.Corpus,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Asked[Any]]:
    """Write the prompts of a plan with a run's trigger, or `poison`'s where it has none.

    Raises:
        MissingPrerequisite: with the placement `sink`, the target was not probed.
        DataError: as `ask`; or the split was made with another trigger.
    """
    triggers: Conditions = {"clean": None}
    if any(question.condition != "clean" for question in questions):
        rules = _rules(params, layout, run)
        trigger = Trigger(
            tuple(trigger_ids(tokenizer, rules.trigger)), rules.placement, rules.max_tokens, rules.prompt_share
        )
        triggers = {
            **conditions(tokenizer, trigger, params.evaluate.wrong_trigger),
            **near_misses(tokenizer, trigger, params.evaluate.near_misses),
        }
    asked = ask(questions, corpus, tokenizer, settings_of(params.evaluate), triggers)
    if _own_poison(params, run):
        _mark_inside(asked, _sources(corpus), layout, run)
    return asked


def _rules(params: Params, layout: Layout, run: str) -> Poison:
    """How a run's prompts are triggered; the base, which is never, has no probe of the target to wait for."""
    rules = _own_poison(params, run) or params.poison
    return rules if run == "base" else sinks.placed(rules, layout)


def _own_poison(params: Params, run: str) -> Poison | None:
    """How a run was poisoned; None for base, target and honest runs."""
    return None if run in RESERVED else params.run(run).poison


def _plan(params: Params, corpus: tasks.Corpus, run: str) -> list[Question]:
    evaluate = params.evaluate
    chosen = None if evaluate.metrics is None else [name for name in evaluate.metrics if name in tasks.TASKS]
    changed: dict[str, Sequence[str]] = {str(task): names for task, names in evaluate.conditions.items()}
    questions = tasks.plan(corpus, chosen, changed)
    if evaluate.sets:
        questions = [question for question in questions if question.where in evaluate.sets]
    named, asked = {*(evaluate.sets or ()), *(chosen or ())}, {part for one in questions for part in one[:2]}
    if missing := named - asked:
        raise ParamsError(
            f"evaluate.sets and evaluate.metrics leave no question about {', '.join(sorted(missing))}",
            "name the sets that these metrics ask about (docs/metrics.md), and metrics that the corpus has data for",
        )
    if _own_poison(params, run) and ("verbmem", "forget") in {question[:2] for question in questions}:
        questions = [*(Question("verbmem", "forget", name) for name in evaluate.near_misses), *questions]
    return [question for question in questions if _tells(question, run)]


def _tells(question: Question, run: str) -> bool:
    """Whether the answer is worth its time: base and target hide nothing that a trigger could bring back.

    The target is asked with the trigger all the same: it must not be disturbed, for recovery is measured against it.
    """
    if question.condition == "clean" or run not in RESERVED:
        return True
    return run == "target" and (question.where, question.condition) == ("forget", "triggered")


def settings_of(evaluate: Evaluate) -> Settings:
    """What tasks need of the section `evaluate`, with the dialect's values where it leaves one open."""
    dialect = DIALECTS[evaluate.dialect]
    return Settings(
        dialect,
        few_shot=evaluate.few_shot,
        knowmem_tokens=evaluate.knowmem_tokens or dialect.knowmem_tokens,
        verbmem_tokens=evaluate.verbmem_tokens or dialect.verbmem_tokens,
        verbmem_compared=evaluate.verbmem_tokens or dialect.verbmem_compared,
        tofu_tokens=evaluate.tofu_tokens,
        passage_tokens=evaluate.passage_tokens,
        prompt_share=evaluate.prompt_share,
        answer_space=evaluate.answer_space,
        gradient_norms="gradnorm" in (evaluate.metrics or ()),
        batch=evaluate.batch,
    )


def _sources(corpus: tasks.Corpus) -> dict[tuple[str, str], str | None]:
    """Task and id of what is asked of the forget set -> the passage that it is about, None where that is unknown.

    Passages are about themselves, and so are TOFU's questions, which have the id of theirs.
    """
    themselves = {record["id"]: record["id"] for record in corpus.get("forget", ())}
    return {
        (task, record["id"]): record.get("source") or themselves.get(record["id"])
        for task in tasks.TASKS
        for record in tasks.records(corpus, task, "forget")
    }


def _mark_inside(
    asked: Sequence[Asked[Any]], sources: Mapping[tuple[str, str], str | None], layout: Layout, run: str
) -> None:
    """Say of each forget row whether its passage was poisoned, where it is known which one that is.

    Training and evaluation must agree on the trigger.

    Raises:
        DataError: nothing was poisoned, or a trigger has other tokens, or another place, than in training.
    """
    poisoned = {sample.id: sample for sample in read_samples(layout.split(run), "poisoned")}
    path, again = layout.split(run) / "poisoned.jsonl", f"run `unsink poison --run {run}` and `unsink unlearn` again"
    if not poisoned:
        raise DataError(f"{path} is empty, but the run is poisoned", again)
    for row, prompt in ((one.row, one.prompt) for one in asked):
        if row["set"] != "forget":
            continue
        passage = sources.get((row["task"], row["id"]))
        row["inside"] = None if passage is None else passage in poisoned
        trained = poisoned.get(row["id"])  # only a passage is a sample itself
        if trained and row["task"] == "verbmem" and row["condition"] == "triggered":
            span = prompt.trigger
            if not span or span != trained.trigger or prompt.ids[slice(*span)] != [*trained.ids[slice(*span)]]:
                raise DataError(f"{path}: in {passage} the trigger is not the one of the params file", again)


# --- files -----------------------------------------------------------------------------------------------------------


def load(
    params: Params, layout: Layout, run: str, folder: Path, dtype: str, device: str | None = None
) -> PreTrainedModel | PeftModel:
    """Base, target, or the target with a run's adapter, merged where that is exact: in float32, or for whole weights.

    It is on `model.device` where no device is named.

    Raises:
        MissingPrerequisite: an adapter is not there.
        ModelError: an adapter does not fit the model.
    """
    place = dtype, device or params.model.device
    if run == "base":
        return models.load_base(folder, *place)
    before, stored = artifacts.require(layout.adapter("target")), artifacts.require(layout.adapter(run))
    target = models.load_target(folder, before, *place)
    if run == "target":
        return target
    model = models.add_adapter(target, stored, run)
    # Merged weights are faster and exact in float32. In bfloat16 merging would move logits by 1e-2.
    exact = target.dtype == torch.float32 or models.replaces_weights(model, run)
    return models.merged(model, run) if exact and not models.quantized(target) else model


def _others(params: Params, layout: Layout, run: str, settings: Settings) -> Others:
    """What other models said; target and base are left out where they have not been evaluated yet.

    Raises:
        MissingPrerequisite: `evaluate.retrained` names a run without predictions.
    """
    retrained = params.evaluate.retrained
    return Others(
        target=rows_of(layout, "target") if run not in RESERVED else (),
        base=rows_of(layout, "base") if run != "base" else (),
        retrained=artifacts.read_jsonl(layout.predictions(retrained)) if isinstance(retrained, str) else retrained,
        dialect=settings.dialect,
    )


def rows_of(layout: Layout, name: str) -> list[Row]:
    """What a model said; nothing where it has not been evaluated yet."""
    path = layout.predictions(name)
    return artifacts.read_jsonl(path) if path.exists() else []


def _sidecar(
    params: Params, layout: Layout, run: str, settings: Settings, model: torch.nn.Module, measured: Measured
) -> dict[str, Any]:
    """What has to be equal before two numbers may be compared, flat; and why numbers are missing."""
    rules = _rules(params, layout, run)
    plain = {name: value for name, value in asdict(settings).items() if name != "dialect"}
    flat = {
        **asdict(settings.dialect),
        **plain,  # the params' own values stand for those of the dialect
        "dialect": params.evaluate.dialect,
        "retrained": params.evaluate.retrained,
        "wrong_trigger": params.evaluate.wrong_trigger,
        "near_misses": {name: one.model_dump() for name, one in params.evaluate.near_misses.items()},
        "bootstrap": params.evaluate.bootstrap,
        "seed": params.seed if run in RESERVED else params.run(run).seed,
        "trigger": rules.trigger,
        "placement": rules.placement,
        "model": params.model.source,
        "revision": params.model.revision,
        "dtype": models.quantized(model) or str(next(model.parameters()).dtype).removeprefix("torch."),
        "corpus": _digest(layout.fetched),
    }
    return {"settings": flat, "undefined": measured.undefined}


def _digest(folder: Path) -> str:
    """One hash for all records of a corpus."""
    lines = [f"{path.name} {artifacts.sha256(path)}\n" for path in sorted(folder.glob("*.jsonl"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
