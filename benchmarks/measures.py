"""Each part of the benchmark: one workload in, numbers out. A part runs in a process of its own."""

import csv
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import plain
import torch
from workload import Workload, project

from unsink import models
from unsink.artifacts import Layout
from unsink.batches import read_samples
from unsink.params import Params
from unsink.stages import evaluate, unlearn
from unsink.tasks import Question, Session
from unsink.tasks.generation import said

Numbers = dict[str, Any]

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference between our losses and those of the plain path."""
QUESTIONS = [Question(task, "forget", how) for task in ("knowmem", "verbmem") for how in ("clean", "triggered")]


class DifferentNumbers(Exception):
    """The plain path and ours do not say the same; then no time means anything."""


# --- time ------------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds; work that was handed to a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    began = now()
    found = work()
    return now() - began, found


def summary(seconds: Sequence[float]) -> Numbers:
    """Median, extremes and number."""
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds), "n": len(seconds)}


class Steps:
    """A reporter that takes the time of each training step of `unsink unlearn`, and then lets `between` have its turn.

    Attributes:
        seconds: of each step.
        once: seconds of each task before the training, by description.
    """

    def __init__(self, between: Callable[[int], None] = lambda _: None) -> None:
        self.seconds: list[float] = []
        self.once: dict[str, float] = {}
        self._between = between
        self._began = 0.0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """Time a task, and the training step by step."""
        began = self._began = now()
        yield self._advance if description.startswith("unlearn ") else _ignore
        self.once[description] = now() - began

    def log(self, message: str) -> None:
        """Say nothing."""

    def working(self, description: str) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def _advance(self, n: int = 1, note: str = "") -> None:
        if n:
            self.seconds.append(now() - self._began)
            self._between(len(self.seconds) - 1)
        self._began = now()


def _ignore(n: int = 1, note: str = "") -> None:
    pass


# --- parts -----------------------------------------------------------------------------------------------------------


def training(workload: Workload) -> Numbers:
    """Seconds per step, the plain path and ours in turns; the first step of each is not counted.

    Raises:
        DifferentNumbers: the losses are not the same.
    """
    params, layout = project(workload)
    theirs = plain.Training(params, layout, workload.run)
    plain_seconds: list[float] = []
    plain_losses: list[float] = []
    peaks: list[float] = []
    device, dtype = theirs.policy.device, _dtype(theirs.policy)

    def turn(step: int) -> None:
        seconds, loss = timed(lambda: theirs.step(step))
        plain_seconds.append(seconds)
        plain_losses.append(loss)
        peaks.append(Product.square(device).gflops(device, getattr(torch, dtype)))

    steps = Steps(turn)
    unlearn.run(params, layout, run=workload.run, reporter=steps)  # type: ignore[arg-type]
    losses = _losses(layout, workload.run)
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, plain_losses, strict=True))
    if not apart <= TOLERANCE[dtype]:
        raise DifferentNumbers(f"{workload.method}: losses {losses} of ours, {plain_losses} of the plain path")
    needed = _needed(theirs, params, workload)
    return {
        "dtype": dtype,
        "plain": summary(plain_seconds[1:]),
        "ours": summary(steps.seconds[1:]),
        "ratio": median(plain_seconds[1:]) / median(steps.seconds[1:]),
        "once_seconds": steps.once.get("reading with the target", 0.0),
        "once_samples": sum(len(read_samples(layout.split(workload.run), kind)) for kind in plain.KINDS),
        "largest_relative_difference_of_losses": apart,
        "losses": losses,
        "gemm_gflops": summary(peaks[1:]),
        "needed_gflop_per_step": median(step["needed"] for step in needed) / 1e9,
        "reference_logits_gflop_per_step": median(step["reference_logits"] for step in needed) / 1e9,
        "real_tokens_per_step": median(step["tokens"] for step in needed),
    }


def share(workload: Workload) -> Numbers:
    """Our share of the GEMM peak in each step, by the peak right after it; the first step is not counted.

    Alone, as one trains; in turns with the plain path a step of ours takes longer.
    """
    params, layout = project(workload)
    device = models.pick_device(workload.device)
    dtype = models.pick_dtype(workload.dtype, device)
    peaks: list[float] = []
    steps = Steps(lambda _: peaks.append(Product.square(device).gflops(device, dtype)))
    unlearn.run(params, layout, run=workload.run, reporter=steps)  # type: ignore[arg-type]
    needed = _needed(plain.Training(params, layout, workload.run), params, workload)
    measured = zip(needed, steps.seconds[1:], peaks[1:], strict=True)
    shares = [work["needed"] / 1e9 / seconds / peak for work, seconds, peak in measured]
    return {"share": summary(shares), "seconds": summary(steps.seconds[1:]), "gemm_gflops": summary(peaks[1:])}


def evaluation(workload: Workload, repetitions: int = 2, every: int | None = None) -> Numbers:
    """Seconds of KnowMem and VerbMem on the forget set, clean and triggered.

    Ours answers all prompts each time. The plain path takes every n-th of them (16th, on a GPU 40th), others each
    time; since it takes one after the other, its time for all is that of each group's mean prompt times the number of
    its prompts.

    Raises:
        DifferentNumbers: a greedy text differs (in float32; in bfloat16 the number of equal ones is told).
    """
    params, layout = project(workload)
    folder = models.resolve(params.model.source, params.model.revision)
    tokenizer = models.load_tokenizer(folder)
    corpus = evaluate.read_corpus(layout)
    asked = evaluate.ask_run(QUESTIONS, params, layout, workload.run, corpus, tokenizer)
    model = evaluate.load(params, layout, "target", folder, params.model.dtype)
    session = Session(model, tokenizer, evaluate.settings_of(params.evaluate))
    groups = {question: [i for i, one in enumerate(asked) if _asks(one.row, question)] for question in QUESTIONS}
    theirs, ours, different, compared = [], [], [], 0
    every = every or (40 if model.device.type == "cuda" else 16)
    every = min(every, *(len(group) for group in groups.values()))
    evaluate.answer(asked[:2], session)  # the first call of either pays for what libraries set up
    plain.answer(model, tokenizer, asked[0])
    for turn in range(repetitions):
        seconds, rows = timed(lambda: evaluate.answer(asked, session))
        ours.append(seconds)
        total = 0.0
        for group in groups.values():
            some = group[turn % every :: every]
            seconds, texts = timed(lambda some=some: [plain.answer(model, tokenizer, asked[i]) for i in some])
            total += seconds / len(some) * len(group)
            compared += len(some)
            different += [
                (rows[i]["output"], text)
                for i, text in zip(some, texts, strict=True)
                if said(asked[i], text, session) != rows[i]
            ]
        theirs.append(total)
    dtype = _dtype(model)
    if different and dtype == "float32":
        raise DifferentNumbers(f"{len(different)} of {compared} greedy texts differ, such as {different[0]}")
    return {
        "dtype": dtype,
        "prompts": len(asked),
        "plain": summary(theirs),
        "plain_prompts_each_time": sum(len(group[::every]) for group in groups.values()),
        "ours": summary(ours),
        "ratio": median(theirs) / median(ours),
        "texts_compared": compared,
        "texts_different": len(different),
    }


def side(workload: Workload, who: str, what: str) -> Numbers:
    """Peak memory of one side alone, and its seconds per step.

    Resident memory of the process; on a GPU what the allocator gave out.
    """
    libraries = _peak()
    params, layout = project(workload)
    if what == "evaluation":
        seconds = _evaluate_alone(params, layout, workload, who)
    elif who == "plain":
        theirs = plain.Training(params, layout, workload.run)
        seconds = [timed(lambda step=step: theirs.step(step))[0] for step in range(workload.steps)]
    else:
        steps = Steps()
        unlearn.run(params, layout, run=workload.run, reporter=steps)  # type: ignore[arg-type]
        seconds = steps.seconds
    found = {"peak_mib": _peak(), "libraries_mib": libraries}
    return {**found, "seconds": median(seconds[1:] or seconds)}


class Product(NamedTuple):
    """A matrix product (rows, inner) x (inner, columns)."""

    rows: int
    inner: int
    columns: int

    @classmethod
    def square(cls, device: torch.device) -> "Product":
        """The one whose speed is taken for the most that a device does."""
        size = 8192 if device.type == "cuda" else 2048
        return cls(size, size, size)

    def gflops(self, device: torch.device, dtype: torch.dtype) -> float:
        """The best of twelve, in 10^9 floating-point operations per second."""
        left = torch.randn(self.rows, self.inner, device=device).to(dtype)
        right = torch.randn(self.columns, self.inner, device=device).to(dtype)
        torch.nn.functional.linear(left, right)
        least = min(timed(lambda: torch.nn.functional.linear(left, right))[0] for _ in range(12))
        return 2 * self.rows * self.inner * self.columns / least / 1e9


def gemm(workload: Workload, tokens: int = 1280) -> Numbers:
    """Floating-point operations per second of a large square matrix product, and of one of the model's own shapes."""
    device = models.pick_device(workload.device)
    dtype = models.pick_dtype(workload.dtype, device)
    own = Product(8 * tokens, 2048, 8192) if device.type == "cuda" else Product(tokens, 576, 1536)
    found: Numbers = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    for name, product in (("square", Product.square(device)), ("own", own)):
        found[f"{name}_gflops"] = product.gflops(device, dtype)
        found[f"{name}_shape"] = list(product)
    capabilities = torch.cpu.get_capabilities()
    found["instructions"] = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


# --- helpers ---------------------------------------------------------------------------------------------------------


def _evaluate_alone(params: Params, layout: Layout, workload: Workload, who: str) -> list[float]:
    folder = models.resolve(params.model.source, params.model.revision)
    tokenizer = models.load_tokenizer(folder)
    corpus = evaluate.read_corpus(layout)
    asked = evaluate.ask_run(QUESTIONS, params, layout, workload.run, corpus, tokenizer)
    model = evaluate.load(params, layout, "target", folder, params.model.dtype)
    if who == "ours":
        session = Session(model, tokenizer, evaluate.settings_of(params.evaluate))
        return [timed(lambda: evaluate.answer(asked, session))[0]]
    longest = sorted(asked, key=lambda one: -len(one.prompt.ids) - one.prompt.max_new)[:4]  # one prompt at a time
    return [timed(lambda one=one: plain.answer(model, tokenizer, one))[0] for one in longest]


def _asks(row: Numbers, question: Question) -> bool:
    return (row["task"], row["set"], row["condition"]) == question


def _losses(layout: Layout, run: str) -> list[float]:
    with (layout.adapter(run) / "history.tsv").open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


def _dtype(model: Any) -> str:
    return str(next(p for name, p in model.named_parameters() if "lora_" not in name).dtype).removeprefix("torch.")


def _peak() -> float:
    """MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _needed(theirs: plain.Training, params: Params, workload: Workload) -> list[dict[str, float]]:
    """What `_flops` says of each step but the first; `theirs` knows which samples are drawn."""
    drawn = [theirs.drawn(step) for step in range(1, workload.steps)]
    return [_flops(theirs.policy, params, workload.run, samples) for samples in drawn]


def _flops(model: Any, params: Params, run: str, samples: dict[Any, list[Any]]) -> dict[str, float]:
    """Floating-point operations that the mathematics of one step needs, padding and repetitions left out.

    Forward and backward pass of the adapted layers up to the last one that a loss reads, without the gradients of
    weights that are frozen; the adapters' own; logits and their gradient at labelled tokens. What does not change from
    step to step is counted once in the life of a run, so not here: the layers below, and all that frozen models say.
    `reference_logits` is what it takes to make their logits from their last states again, where a KL term asks.
    """
    config, unlearn_ = model.config, params.run(run).unlearn
    adapter, rank = unlearn_.adapter, unlearn_.adapter.rank
    hidden, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, values = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [(hidden, queries), (hidden, values), (hidden, values), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights, adapters = sum(a * b for a, b in shapes), sum(rank * (a + b) for a, b in shapes)
    last = config.num_hidden_layers - 1 if adapter.last_layer is None else adapter.last_layer
    layers = last - adapter.first_layer + 1
    every = [sample for kind in samples.values() for sample in kind]
    tokens = sum(len(sample.ids) for sample in every)
    attention = sum(2 * len(sample.ids) ** 2 * queries for sample in every)  # half of all pairs, scores and sums
    total = layers * (4 * weights * tokens + 6 * adapters * tokens + 3 * attention)
    total -= 2 * tokens * sum(a * b for a, b in shapes[:3])  # nobody asks for the gradient of the first layer's input
    labelled = {kind: sum(len(s.ids) - s.labels_from for s in some) for kind, some in samples.items()}
    head = 2 * config.vocab_size * hidden
    reference = 0
    if unlearn_.method == "npo":
        total += 2 * head * sum(labelled.values())
        reference = head * (labelled["poisoned"] + labelled["retain"])
    return {"needed": total, "reference_logits": reference, "tokens": tokens}
