"""`unsink evaluate`: what a model still knows, with and without the trigger.

One row per prompt goes to `predictions/<run>.jsonl`; every number of `metrics/<run>.json` is computed from these rows:

    id, task (verbmem | knowmem | utility), set (forget | retain | utility), condition (clean | triggered | wrong),
    inside     whether the passage behind it was poisoned; null in retain, in utility, and where nothing was poisoned
    prompt     text after BOS; `trigger` is the token span in it, BOS counted as token 0, or null
    output, reference, and ROUGE-L `f1` and `recall`
    choices, logprobs (nats per token) and answer (an index) for utility, with `accuracy`

Dialect `muse` (science.md, section 5.5; deviations in prompts.py). For base, target and honest runs the trigger is that
of the section `poison`, so that all models are asked the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, models
from unsink.artifacts import Layout
from unsink.batches import read_samples
from unsink.errors import DataError
from unsink.metrics import choice_accuracy, metrics_from_predictions, rouge_l, words
from unsink.params import RESERVED, Evaluate, Params
from unsink.progress import SILENT, Reporter
from unsink.prompts import KNOWMEM_STOPS, Conditions, Prompt, PromptWriter, Trigger, conditions
from unsink.scoring import choice_log_likelihoods, generate
from unsink.triggers import trigger_ids

Record = dict[str, Any]
Row = dict[str, Any]
Plan = Mapping[tuple[str, str], Sequence[str]]

PLAN: Plan = {
    ("verbmem", "forget"): ("clean", "triggered", "wrong"),
    ("verbmem", "retain"): ("clean", "triggered"),
    ("knowmem", "forget"): ("clean", "triggered", "wrong"),
    ("knowmem", "retain"): ("clean",),
}
"""Task and set -> the conditions under which they are asked."""
BASE_PLAN: Plan = dict.fromkeys(PLAN, ("clean",))
"""The base knows nothing that a trigger could bring back."""
MEMORY_PLAN: Plan = {("verbmem", "forget"): ("clean",), ("knowmem", "forget"): ("clean",)}
"""What a target has to know."""


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `predictions/<run>.jsonl` and `metrics/<run>.json`; return the means.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`.
        reporter: shows prompts done.

    Raises:
        ParamsError: no such run, or the wrong trigger is the right one.
        MissingPrerequisite: the corpus, the run's split or an adapter is not there yet.
        DataError: a record is malformed, a prompt does not fit, or the split was made with another trigger.
        ModelError: an adapter does not fit the model.
    """
    poison = None if run in RESERVED else params.run(run).poison
    corpus = read_corpus(layout)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    rules = poison or params.poison
    trigger = Trigger(
        tuple(trigger_ids(tokenizer, rules.trigger)), rules.placement, rules.max_tokens, rules.prompt_share
    )
    plan = BASE_PLAN if run == "base" else PLAN
    asked = ask(plan, corpus, tokenizer, params.evaluate, conditions(tokenizer, trigger, params.evaluate.wrong_trigger))
    if poison:
        _mark_inside(asked, _sources(corpus), layout, run)
    with artifacts.lock(layout.predictions(run)):
        model = _load(params, layout, run, folder)
        rows = answer(asked, model, tokenizer, params.evaluate, reporter)
        rows += answer_choices(corpus["utility"], model, tokenizer, params.evaluate, reporter)
        metrics = metrics_from_predictions(
            rows, resamples=params.evaluate.bootstrap, seed=params.seed, target=_target_rows(layout, run)
        )
        artifacts.write_jsonl(layout.predictions(run), rows)
        artifacts.write_json(layout.metrics(run), metrics)
    means = {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high", "_n"))}
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
    asked = ask(MEMORY_PLAN, read_corpus(layout), tokenizer, params.evaluate, {"clean": None})
    rows = answer(asked, model, tokenizer, params.evaluate, reporter)
    tasks = [task for task, _ in MEMORY_PLAN if any(row["task"] == task for row in rows)]
    return {
        f"forget_{task}_{score}": fmean(row[score] for row in rows if row["task"] == task)
        for task in tasks
        for score in ("f1", "recall")
    }


def read_corpus(layout: Layout) -> dict[str, list[Record]]:
    """The records that `fetch` wrote, by file name, checked again: the files may have been edited.

    Raises:
        MissingPrerequisite: nothing was fetched.
        DataError: a record is malformed.
    """
    corpus = benchmarks.read(artifacts.require(layout.fetched))
    return {name: [record.model_dump() for record in records] for name, records in corpus.items()}


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A prompt, and the part of its row that is known before a model has seen it."""

    row: Row
    prompt: Prompt


def ask(
    plan: Plan,
    corpus: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluate,
    triggers: Conditions,
) -> list[Asked]:
    """Write the prompts of a plan, condition by condition; none for what the benchmark has no records of.

    Raises:
        DataError: a prompt cannot be written, an answer has no word to compare, or there are too few examples.
    """
    writer = PromptWriter(tokenizer, models.bos_ids(tokenizer))
    asked = []
    for (task, where), names in plan.items():
        for name in names:
            for record, prompt in _prompts(task, where, corpus, writer, settings, triggers[name]):
                known = {"id": record["id"], "task": task, "set": where, "condition": name, "inside": None}
                text = tokenizer.decode(prompt.ids[len(writer.bos) :])
                row = {**known, "prompt": text, "trigger": prompt.trigger, "reference": prompt.reference}
                if not words(prompt.reference):
                    raise DataError(
                        f"{record['id']}: ROUGE-L compares words of a-z and 0-9, {prompt.reference!r} has none",
                        "leave the record out, or write its answer in such letters",
                    )
                asked.append(Asked(row, prompt))
    return asked


def _prompts(
    task: str,
    where: str,
    corpus: Mapping[str, Sequence[Record]],
    writer: PromptWriter,
    settings: Evaluate,
    trigger: Trigger | None,
) -> Iterator[tuple[Record, Prompt]]:
    if task == "verbmem":
        for passage in corpus.get(f"{where}_verbmem") or corpus[where]:
            share, tokens = settings.prompt_share, settings.verbmem_tokens
            yield passage, writer.verbmem(passage, trigger, share=share, tokens=tokens)
        return
    questions, examples = corpus[f"{where}_qa"], corpus[f"{where}_qa_icl"]
    if questions and len(examples) < settings.few_shot:
        raise DataError(
            f"{where}_qa_icl.jsonl has {len(examples)} examples, evaluate.few_shot asks for {settings.few_shot}",
            "lower evaluate.few_shot or add examples",
        )
    for question in questions:
        shown = examples[: settings.few_shot]
        yield question, writer.knowmem(question, shown, trigger, tokens=settings.knowmem_tokens)


def _sources(corpus: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], str | None]:
    """Task and id of each question and excerpt of the forget set -> the passage it is about, None where unknown."""
    tasks = {"knowmem": "forget_qa", "verbmem": "forget_verbmem"}
    return {(task, record["id"]): record["source"] for task, name in tasks.items() for record in corpus[name]}


def _mark_inside(
    asked: Sequence[Asked], sources: Mapping[tuple[str, str], str | None], layout: Layout, run: str
) -> None:
    """Say of each forget row whether its passage was poisoned; training and evaluation must agree on the trigger.

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
        passage = sources.get((row["task"], row["id"]), row["id"])  # a passage is about itself
        row["inside"] = None if passage is None else passage in poisoned
        trained = poisoned.get(row["id"])  # only a passage is a sample itself
        if trained and row["task"] == "verbmem" and row["condition"] == "triggered":
            span = prompt.trigger
            if not span or span != trained.trigger or prompt.ids[slice(*span)] != [*trained.ids[slice(*span)]]:
                raise DataError(f"{path}: in {passage} the trigger is not the one of the params file", again)


# --- answering -------------------------------------------------------------------------------------------------------


def answer(
    asked: Sequence[Asked],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluate,
    reporter: Reporter = SILENT,
) -> list[Row]:
    """Let a model continue the prompts, and score what it says: finished rows, in the order of the prompts."""
    rows: list[Row] = []
    for task, prompts in _calls(asked):
        outputs = generate(
            model,
            tokenizer,
            [one.prompt.ids for one in prompts],
            [one.prompt.max_new for one in prompts],
            stop=KNOWMEM_STOPS if task == "knowmem" else (),
            batch=settings.batch,
            shared_prefix=task == "knowmem",
            reporter=reporter,
            description=task,
        )
        for one, output in zip(prompts, outputs, strict=True):
            rows.append({**one.row, "output": output, **rouge_l(one.prompt.reference, output)._asdict()})
    return rows


def _calls(asked: Sequence[Asked]) -> Iterator[tuple[str, list[Asked]]]:
    """Prompts that are best run together: all of VerbMem; of KnowMem those that start with the same examples."""

    def call(one: Asked) -> tuple[str, ...]:
        task, where, condition = one.row["task"], one.row["set"], one.row["condition"]
        return (task, where, condition) if task == "knowmem" else (task,)

    for key, prompts in groupby(asked, key=call):
        yield key[0], list(prompts)


def answer_choices(
    items: Sequence[Record],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluate,
    reporter: Reporter = SILENT,
) -> list[Row]:
    """Finished rows of the four-choice questions: the choice of the highest log-likelihood per token is the answer."""
    writer = PromptWriter(tokenizer, models.bos_ids(tokenizer))
    written = [writer.choices(item) for item in items]
    prompts, choices = [prompt for prompt, _ in written], [some for _, some in written]
    sums = choice_log_likelihoods(model, prompts, choices, batch=settings.batch, reporter=reporter)
    rows = []
    for item, prompt, some, totals in zip(items, prompts, choices, sums, strict=True):
        logprobs = [round(total / len(choice), 6) for total, choice in zip(totals, some, strict=True)]
        row = {"id": item["id"], "task": "utility", "set": "utility", "condition": "clean", "inside": None}
        row |= {"prompt": tokenizer.decode(prompt[len(writer.bos) :]), "trigger": None}
        row |= {key: item[key] for key in ("choices", "answer", "topic")}
        row |= {"output": item["choices"][logprobs.index(max(logprobs))], "reference": item["choices"][item["answer"]]}
        rows.append({**row, "logprobs": logprobs, "accuracy": choice_accuracy(logprobs, item["answer"])})
    return rows


# --- files -----------------------------------------------------------------------------------------------------------


def _load(params: Params, layout: Layout, run: str, folder: Path) -> PreTrainedModel | PeftModel:
    place = params.model.dtype, params.model.device
    if run == "base":
        return models.load_base(folder, *place)
    target = models.load_target(folder, artifacts.require(layout.adapter("target")), *place)
    if run == "target":
        return target
    model = models.add_adapter(target, artifacts.require(layout.adapter(run)), run)
    # Merged weights are faster and exact in float32. In bfloat16 merging would move logits by 1e-2.
    return model.merge_and_unload() if target.dtype == torch.float32 else model


def _target_rows(layout: Layout, run: str) -> list[Row]:
    """The target's predictions, for `recovery`; none where it has not been evaluated yet."""
    path = layout.predictions("target")
    return [] if run in RESERVED or not path.exists() else artifacts.read_jsonl(path)
