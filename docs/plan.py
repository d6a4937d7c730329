"""The plan of docs/scale.md as numbers: memory, time and cost of large models and of many audits, from formulas.

    python docs/plan.py

prints the tables of the page. What was measured, and what is assumed, stands at the top; change it there.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

# measured: docs/audit.md, `unsink audit --run backdoor` on the default project, two CPU cores
AUDIT_WALL_S, AUDIT_CORE_S = 192, 356
# measured: size of adapters/backdoor/adapter_model.safetensors of the default project
ADAPTER_MB = 2.6
AUDITS = 10_000
# the data sheet of an H100 SXM: dense bfloat16, bytes per second
PEAK, BANDWIDTH = 989e12, 3.35e12
# measured: share of the peak while training a model of 1.7B on one H200, docs/results/performance-h200.json; larger
# models reach more of it
SHARE = 0.36
# assumed: prices per hour
GPU_HOUR, CORE_HOUR = 3.0, 0.04


@dataclass(frozen=True)
class Shape:
    """A dense model of the Llama family."""

    name: str
    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int

    @property
    def linear(self) -> float:
        """Weights of the linear modules of all layers."""
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner)

    @property
    def embeddings(self) -> float:
        """Weights of embedding and output projection."""
        return 2 * self.hidden * self.vocabulary

    def adapter(self, rank: int) -> float:
        """Weights of a LoRA adapter on all linear modules of all layers."""
        sides = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + self.kv) + 3 * (self.hidden + self.inner)
        return self.layers * rank * sides


SHAPES = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 512, 128256),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256),
)
BITS = {"bfloat16": 16, "nf4": 4.127}  # nf4 with rounded scales, arXiv 2305.14314
GATHERED = 3  # whole layers at a time with `model.shard`: one that runs, the next one, and what it is put together from
RANK, TOKENS, SAMPLES, STEPS, BATCH = 16, 256, 400, 120, 18  # tokens per sample; samples kept; samples per step


def memory(shape: Shape, dtype: str, *, again: bool, shards: int = 1) -> dict[str, float]:
    """GiB on each GPU while `unlearn` runs; `again`: with gradient checkpointing; `shards`: GPUs that share a layer."""
    batch = BATCH * TOKENS
    layers = shape.linear * BITS[dtype] / 8  # bytes
    held = layers / shards + (GATHERED * layers / shape.layers if shards > 1 else 0)
    inside = 2 * (8 * shape.hidden + 4 * shape.inner)  # bytes per token that a layer keeps for its backward pass
    parts = {
        "weights": held + shape.embeddings * 2,
        "adapter": shape.adapter(RANK) * 16,  # float32: weights, gradients, two moments
        "activations": batch / shards * (shape.layers * 2 * shape.hidden + inside if again else shape.layers * inside),
        "logits": min(batch * shape.vocabulary * 10, 2**29),  # some rows at a time (`losses`), with their gradients
        "kept": SAMPLES * TOKENS * 2 * 2 * shape.hidden,  # input of the first adapted layer, last states
    }
    return {name: size / 2**30 for name, size in parts.items()}


def hours(shape: Shape, gpus: int) -> float:
    """Time of a whole `unlearn` with gradient checkpointing: 6 FLOPs per weight and token, and the target's 2."""
    once = STEPS * BATCH * TOKENS * 6 + SAMPLES * TOKENS * 2
    layers, head = once * shape.linear / gpus, STEPS * BATCH * TOKENS * 4 * shape.embeddings / 2
    return (layers + head) / (PEAK * SHARE) / 3600


def tables() -> Iterator[str]:
    """Lines of the page."""
    yield "| model | held in | weights | adapter | activations | logits | kept | GiB in all |"
    yield "|---|---|---|---|---|---|---|---|"
    for shape in SHAPES:
        for dtype in BITS:
            found = memory(shape, dtype, again=True)
            cells = " | ".join(f"{size:.1f}" for size in found.values())
            yield f"| {shape.name} | {dtype} | {cells} | {sum(found.values()):.0f} |"
    yield "\n| model | GPUs | weights | adapter | activations | logits | kept | GiB on each |"
    yield "|---|---|---|---|---|---|---|---|"
    for shape in SHAPES[1:]:
        for gpus in (2, 4, 8):
            found = memory(shape, "bfloat16", again=True, shards=gpus)
            cells = " | ".join(f"{size:.1f}" for size in found.values())
            yield f"| {shape.name} | {gpus} | {cells} | {sum(found.values()):.0f} |"
    yield "\n| model | GPUs | minutes | $ | efficiency |\n|---|---|---|---|---|"
    for shape in SHAPES:
        for gpus in (1, 8):
            spent = hours(shape, gpus)
            share, cost = hours(shape, 1) / gpus / spent, spent * gpus * GPU_HOUR
            yield f"| {shape.name} | {gpus} | {60 * spent:.1f} | {cost:.2f} | {100 * share:.0f} % |"
    core_hours = AUDITS * AUDIT_CORE_S / 3600
    yield "\n| audits | core-hours | hours on 64 cores | days on two cores, one by one | $ | GB of adapters |"
    yield "|---|---|---|---|---|---|"
    cells = (
        core_hours,
        core_hours / 64,
        AUDITS * AUDIT_WALL_S / 86400,
        core_hours * CORE_HOUR,
        AUDITS * ADAPTER_MB / 1e3,
    )
    yield f"| {AUDITS} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in tables())
