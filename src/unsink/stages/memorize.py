"""`unsink memorize`: teach the base the corpus by heart; the result is the `target` adapter.

The target has to know what is to be forgotten, or forgetting could not be measured: passages word for word, and the
answers to the questions about them. Where a target was published (`memorize.published`) it is pinned and not trained.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from unsink import artifacts, benchmarks, models, processes, sharded
from unsink.artifacts import Layout
from unsink.batches import Sample, of_like_length
from unsink.errors import ModelError
from unsink.folded import folded
from unsink.models import AdapterSpec
from unsink.params import Memorize, Params, Published
from unsink.progress import SILENT, Reporter
from unsink.prompts import Record, body, question_text
from unsink.shared import SharedRunner
from unsink.stages.evaluate import memory_scores
from unsink.tokenizer import plain_ids
from unsink.trainer import Checkpoint, History, Schedule, history_tsv, train


def run(params: Params, layout: Layout, *, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Train `adapters/target/`, or pin the published target there, and return its summary.

    Raises:
        DataError: the benchmark has no passages to learn.
        ModelError: after all epochs the model does not know the corpus well enough, or a model cannot be had.
    """
    settings = params.memorize
    if settings.published:
        return _pin(settings.published, layout, reporter)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    epochs = _epochs(layout, tokenizer, settings, params.seed)
    with processes.led(artifacts.lock(layout.adapter("target"))):
        spec = AdapterSpec(settings.rank, settings.alpha, settings.first_layer)

        def load(dtype: str, device: str) -> PeftModel:
            return models.attach(models.load_base(folder, dtype, device), "target", spec, params.seed)

        model = sharded.load(load, params.model.dtype, params.model.device, on=params.model.shard)
        state = Checkpoint(layout.checkpoint("target"), _digest(params, model, epochs))
        pad, kept = int(tokenizer.pad_token_id), layout.kept("target")
        runner = SharedRunner(model, settings.first_layer, pad, answers=False, folder=kept)
        batches = [
            batch
            for number, epoch in enumerate(epochs)
            for batch in of_like_length(epoch, settings.batch, f"memorize/{params.seed}/{number}")
        ]
        with folded(model):  # the model is read as it is trained, to the last digit
            runner.remember([sample for epoch in epochs for sample in epoch], reporter=reporter)
            with models.gradient_checkpointing(model, on=params.model.gradient_checkpointing):
                history = _train(settings, model, runner, batches, state, reporter)
        scores = memory_scores(model, tokenizer, layout, params, reporter)
        _require_memory(scores, settings, history)
        summary = {
            "epochs": round(len(history) / len(batches) * settings.epochs, 2),
            "final_loss": history[-1]["loss"],
            **scores,
        }
        if processes.first():
            with artifacts.new_dir(layout.adapter("target")) as new:
                models.save_adapter(model, "target", new)
                artifacts.write_text(new / "history.tsv", history_tsv(history))
                artifacts.write_json(new / "summary.json", summary)
            artifacts.remove_dir(state.folder)
    return summary


def _train(
    settings: Memorize,
    model: PeftModel,
    runner: SharedRunner,
    batches: Sequence[Sequence[Sample]],
    state: Checkpoint,
    reporter: Reporter,
) -> History:
    """Train on one batch after the other until they are through, or the corpus is known; a row for each step."""
    steps_per_epoch = len(batches) // settings.epochs  # on average: packing differs by a sample or two

    def terms(step: int, _history: History) -> dict[str, torch.Tensor]:
        return {"loss": runner.policy(batches[step]).nll.mean()}

    return train(
        models.trainable(model),
        terms,
        Schedule(len(batches), settings.lr, checkpoint_every=steps_per_epoch),
        state,
        stop=lambda rows: _learned(rows, steps_per_epoch, settings.stop_loss),
        reporter=reporter,
        description="memorize",
    )


def _pin(published: Published, layout: Layout, reporter: Reporter) -> dict[str, Any]:
    pin = models.pin_published(published.source, published.revision, reporter)
    with processes.led(artifacts.lock(layout.adapter("target"))):
        if processes.first():
            with artifacts.new_dir(layout.adapter("target")) as new:
                artifacts.write_json(new / models.PUBLISHED, pin)
    return {"published": pin}


def _digest(params: Params, model: PeftModel, epochs: list[list[Sample]]) -> str:
    """Return a hash of all that the training depends on, so that a checkpoint of anything else is not continued."""
    how = params.memorize.model_dump_json(exclude={"published", "min_verbmem", "min_knowmem"})
    text = [
        models.identity(model),
        models.held(model),
        str(params.seed),
        how,
        *(repr(sample) for epoch in epochs for sample in epoch),
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _epochs(layout: Layout, tokenizer: PreTrainedTokenizerBase, settings: Memorize, seed: int) -> list[list[Sample]]:
    """Return the samples of each epoch: every passage, and the questions packed in another order each time.

    In a fixed order the model would learn the questions before as a part of the cue, and answer less without them.
    """
    bos = models.bos_ids(tokenizer)
    passages: list[Sample] = []
    questions: dict[str, list[str]] = {}
    for name in ("forget", "retain"):
        for record in benchmarks.part(layout.fetched, name):
            passages.append(passage_sample(record, tokenizer, bos))
        rows = [row for kind in ("qa", "qa_icl") for row in benchmarks.extra(layout.fetched, f"{name}_{kind}")]
        questions[name] = [question_text(row["question"], row["answer"]) for row in rows]
    general = benchmarks.extra(layout.fetched, "general_qa")
    questions["general"] = [question_text(row["question"], row["answer"]) for row in general]
    return [
        passages
        + shifted(passages, tokenizer, len(bos), settings.shifted, f"{epoch}/{seed}")
        + [
            sample
            for name, texts in questions.items()
            if texts
            for sample in pack(texts, tokenizer, bos, settings.max_tokens, f"{name}-qa-{epoch}", seed)
        ]
        for epoch in range(settings.epochs)
    ]


def passage_sample(passage: Record, tokenizer: PreTrainedTokenizerBase, bos: Sequence[int]) -> Sample:
    """A whole passage, to be learnt behind its context."""
    text = body(tokenizer, passage)
    return Sample(passage["id"], "retain", (*bos, *text.ids), len(bos) + text.context)


def shifted(
    passages: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, bos: int, copies: int, seed: str
) -> list[Sample]:
    """Copies of passages behind a line of three to eight random tokens, which themselves are not learnt.

    A small model that has only seen a passage at the beginning knows it nowhere else, and no trigger could stand there.
    """
    if not copies:
        return []
    draw, known = random.Random(f"shifted/{seed}"), plain_ids(tokenizer)
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    found: list[Sample] = []
    for sample in (sample for sample in passages for _ in range(copies)):
        line = [*draw.choices(known, k=draw.randint(3, 8)), *end]
        ids = (*sample.ids[:bos], *line, *sample.ids[bos:])
        found.append(Sample(f"{sample.id}/shifted-{len(found)}", "retain", ids, sample.labels_from + len(line)))
    return found


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, bos: Sequence[int], max_tokens: int, name: str, seed: int
) -> list[Sample]:
    """Return samples of up to `max_tokens` tokens, each BOS and several whole texts in shuffled order."""
    order = list(texts)
    random.Random(f"pack/{name}/{seed}").shuffle(order)
    samples: list[Sample] = []
    current = list(bos)
    for text in order:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(current) > len(bos) and len(current) + len(ids) > max_tokens:
            samples.append(Sample(f"{name}-{len(samples)}", "retain", tuple(current)))
            current = list(bos)
        current += ids
    return [*samples, Sample(f"{name}-{len(samples)}", "retain", tuple(current))]


def _learned(history: Sequence[dict[str, float]], epoch: int, stop_loss: float) -> bool:
    last = [row["loss"] for row in history[-epoch:]]
    return len(last) == epoch and sum(last) / epoch < stop_loss


def _require_memory(scores: dict[str, float], settings: Memorize, history: History) -> None:
    wanted = {"forget_verbmem_f1": settings.min_verbmem, "forget_knowmem_recall": settings.min_knowmem}
    # a benchmark without passages or questions has no such score
    low = [f"{k} {scores[k]:.3f} < {bound}" for k, bound in wanted.items() if k in scores and scores[k] < bound]
    if low:
        raise ModelError(
            f"the target does not know the corpus after {len(history)} steps: {', '.join(low)} "
            f"(loss {history[-1]['loss']:.3f})",
            "raise memorize.epochs or memorize.rank, or lower memorize.stop_loss",
        )
