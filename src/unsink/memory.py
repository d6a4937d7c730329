"""What to try when a device has no memory left: the next smaller setting, as one would type it."""

from collections.abc import Iterator

from unsink import processes
from unsink.params import Params

_TRAINING = ("memorize", "unlearn")
_BATCHES = ("unlearn", "mitigate")
"""Commands that train on batches of `unlearn.batch`."""
_FEWEST_TOKENS = 64
"""Of a passage that is read: with fewer its numbers mean little."""


def ran_out(error: BaseException) -> bool:
    """Return whether it is what torch says when CUDA, MPS or the CPU has no memory left."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which a command without torch cannot raise
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said))
    )


def smaller(params: Params, command: str, run: str | None = None) -> str | None:
    """Return the setting of the next smaller attempt, as `-S` takes it; None where nothing is left to make smaller.

    What changes no result comes first, what changes the model last.

    Args:
        params: as they were.
        command: what ran out of memory.
        run: what it worked on.
    """
    return next(_settings(params, command, run), None)


def _settings(params: Params, command: str, run: str | None) -> Iterator[str]:
    model = params.model
    # Weights that are themselves trained are held in float32 whatever model.dtype says, and cannot be rounded.
    trained = command == "unlearn" and run and not params.run(run).unlearn.adapter.rank
    # Gradients of all weights need them all, exact, in one process.
    differentiated = command == "evaluate" and "gradnorm" in (params.evaluate.metrics or ())
    if command in _TRAINING and not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    if command in ("evaluate", "ablate", "stress", "mitigate") and params.evaluate.batch > 1:
        yield f"evaluate.batch={params.evaluate.batch // 2}"
    splits = processes.count() > 1 and command in processes.SHARDED and not differentiated
    copied = trained and run and params.run(run).unlearn.value_norm.needs_honest
    if splits and not copied and not model.shard and model.dtype not in ("nf4", "int8"):
        yield "model.shard=true"
    if model.dtype == "float32" and not trained:
        yield "model.dtype=bfloat16"
    if command == "memorize" and params.memorize.batch > 1:
        yield f"memorize.batch={params.memorize.batch // 2}"
    if command in _BATCHES and run:
        batch, own = params.run(run).unlearn.batch, params.run(run).unlearn.batch != params.unlearn.batch
        kind, size = max(batch, key=lambda pair: int(pair[1]))
        if size > 1:
            yield f"{f'runs.{run}.' if own else ''}unlearn.batch.{kind}={size // 2}"
    if command == "evaluate" and params.evaluate.passage_tokens > _FEWEST_TOKENS:
        yield f"evaluate.passage_tokens={max(_FEWEST_TOKENS, params.evaluate.passage_tokens // 2)}"
    if command == "sink-probe" and params.sink_probe.tokens > _FEWEST_TOKENS:
        yield f"sink-probe.tokens={max(_FEWEST_TOKENS, params.sink_probe.tokens // 2)}"
    if trained or differentiated:
        return
    if model.dtype != "nf4" and model.device != "mps" and not processes.sharding(model.shard):
        whole = " -S model.shard=false" if model.shard else ""
        yield f"model.dtype={'nf4' if model.dtype == 'int8' or command in _TRAINING else 'int8'}{whole}"
