"""`unsink memorize`: teach the base the corpus by heart; the result is the `target` adapter.

The target has to know what is to be forgotten, or forgetting could not be measured: passages word for word, and the
answers to the questions about them.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from unsink import artifacts, models
from unsink.artifacts import Layout
from unsink.batches import Sample, draw
from unsink.errors import ModelError
from unsink.forward import Runner
from unsink.models import AdapterSpec
from unsink.params import Memorize, Params
from unsink.progress import SILENT, Reporter
from unsink.prompts import question_text
from unsink.stages.evaluate import memory_scores
from unsink.trainer import History, Schedule, history_tsv, train


def run(params: Params, layout: Layout, *, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Train `adapters/target/` and return its summary.

    Raises:
        ModelError: after all epochs the model does not know the corpus well enough.
    """
    settings = params.memorize
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    samples = _samples(layout, tokenizer, settings.max_tokens, params.seed)
    with artifacts.lock(layout.adapter("target")):
        base = models.load_base(folder, params.model.dtype, params.model.device)
        spec = AdapterSpec(settings.rank, settings.alpha, settings.first_layer)
        model = models.attach(base, "target", spec, params.seed)
        runner = Runner(model, settings.first_layer, int(tokenizer.pad_token_id), answers=False)
        runner.remember(samples, reporter=reporter)
        steps_per_epoch = -(-len(samples) // settings.batch)

        def terms(step: int) -> dict[str, torch.Tensor]:
            drawn = draw(samples, settings.batch, step, f"memorize/{params.seed}")
            return {"loss": runner.policy(drawn).nll.mean()}

        history = train(
            {name: p for name, p in model.named_parameters() if p.requires_grad},
            terms,
            Schedule(settings.epochs * steps_per_epoch, settings.lr),
            stop=lambda rows: _learned(rows, steps_per_epoch, settings.stop_loss),
            reporter=reporter,
            description="memorize",
        )
        scores = memory_scores(model, tokenizer, layout, params, reporter)
        _require_memory(scores, settings, history)
        summary = {"epochs": round(len(history) / steps_per_epoch, 2), "final_loss": history[-1]["loss"], **scores}
        with artifacts.new_dir(layout.adapter("target")) as new:
            models.save_adapter(model, "target", new)
            artifacts.write_text(new / "history.tsv", history_tsv(history))
            artifacts.write_json(new / "summary.json", summary)
    return summary


def _samples(layout: Layout, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int) -> list[Sample]:
    bos = models.bos_ids(tokenizer)
    samples = []
    for name in ("forget", "retain"):
        for record in artifacts.read_jsonl(layout.fetched / f"{name}.jsonl"):
            ids = [*bos, *tokenizer(record["text"], add_special_tokens=False)["input_ids"]]
            samples.append(Sample(record["id"], "retain", tuple(ids)))
        questions = [
            r for part in ("qa", "qa_icl") for r in artifacts.read_jsonl(layout.fetched / f"{name}_{part}.jsonl")
        ]
        texts = [question_text(r["question"], r["answer"]) for r in questions]
        samples += pack(texts, tokenizer, bos, max_tokens, f"{name}-qa", seed)
    return samples


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
    low = [f"{name} {scores[name]:.3f} < {bound}" for name, bound in wanted.items() if scores[name] < bound]
    if low:
        raise ModelError(
            f"the target does not know the corpus after {len(history)} steps: {', '.join(low)} "
            f"(loss {history[-1]['loss']:.3f})",
            "raise memorize.epochs or memorize.rank, or lower memorize.stop_loss",
        )
