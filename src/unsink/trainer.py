"""The one training loop: terms of a step -> gradient -> optimiser -> history row -> checkpoint.

A step depends on its number, on the weights and on the rows before it alone: samples and random draws are functions of
seed and step, a dual variable is one of the rows. A checkpoint holds all of it, so a run that continues from one ends
with the same bytes as one that was never interrupted.

Several processes (`processes`) each contribute a part of the gradient; its sum is that of one process, up to the last
digits, and so is everything else. The weights are the same everywhere, and the first process keeps the checkpoints.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unsink import artifacts, processes
from unsink.errors import ModelError
from unsink.progress import SILENT, Reporter

History = list[dict[str, float]]
_STATE, _RECORD = "state.safetensors", "record"
_WORTH = 50
"""A checkpoint is left out while less than this many times its cost has passed since the last one."""
Terms = Callable[[int, History], dict[str, Tensor]]


def _nothing(_step: int) -> None:
    """Get nothing ready."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps.
        lr: learning rate of AdamW, which falls linearly over all steps to a tenth.
        warmup: steps in which that is multiplied by 1/warmup, 2/warmup, … 1; so the largest stays below `lr`.
        weight_decay: AdamW weight decay.
        clip: largest gradient norm.
        checkpoint_every: steps between checkpoints, more where they would take over 2 % of the time; 0 = none.
    """

    steps: int
    lr: float
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (0-based)."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * (0.1 + 0.9 * (1 - step / self.steps))


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a run is kept, and the digest of all that it depends on.

    A checkpoint made from other inputs is ignored.
    """

    folder: Path
    digest: str


def train(
    parameters: dict[str, nn.Parameter],
    terms: Terms,
    schedule: Schedule,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[Sequence[dict[str, float]]], bool] | None = None,
    reporter: Reporter = SILENT,
    description: str = "training",
    get_ready: Callable[[int], None] = _nothing,
) -> History:
    """Minimise `terms(step, history)["loss"]` over the parameters, in place.

    Args:
        parameters: named parameters to train; gradients must reach every one of them.
        terms: from a step (0-based) and the rows of all steps before it to named scalars, "loss" among them.
        schedule: see `Schedule`.
        checkpoint: continue from here if there is a state, and leave states here.
        stop: called with the history after each step; true ends the training early.
        reporter: progress, loss and time left.
        description: what the progress bar says.
        get_ready: called with the number of the next step while a GPU is still at work on this one.

    Returns:
        One row per step: {"step": 1.., every term}.

    Raises:
        ModelError: a term is not finite, or the first step gives no gradient at all.
        DataError: several processes see different inputs or checkpoints.
        Lost: another process has ended.
    """
    # Fused: one pass over all parameters in place of some ten for each, which takes a fourth of the time.
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    history = _resume(checkpoint, parameters, optimizer)
    if checkpoint:
        processes.require_same((checkpoint.digest, len(history)), f"{checkpoint.folder} and what the run depends on")
    if history:
        reporter.log(f"{description}: continuing after step {len(history)} of {schedule.steps}")
    earned = 0.0
    with reporter.task(description, schedule.steps) as advance:
        advance(len(history))
        for step in range(len(history), schedule.steps):
            if stop and stop(history):
                break
            history.append(_step(history, parameters, terms, schedule, optimizer, get_ready))
            advance(note=f"loss {history[-1]['loss']:.3f}")
            due = schedule.checkpoint_every and (step + 1) % schedule.checkpoint_every == 0
            if checkpoint and due and processes.first() and time.monotonic() >= earned:
                began = time.monotonic()
                _save(checkpoint, parameters, optimizer, history)
                earned = time.monotonic() + _WORTH * (time.monotonic() - began)
    return history


def _step(
    history: History,
    parameters: dict[str, nn.Parameter],
    terms: Terms,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    get_ready: Callable[[int], None],
) -> dict[str, float]:
    step = len(history)
    optimizer.zero_grad(set_to_none=True)
    found = terms(step, history)
    found["loss"].backward()  # type: ignore[no-untyped-call]
    processes.add_up([p.grad for p in parameters.values() if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    optimizer.step()
    if step + 1 < schedule.steps:
        get_ready(step + 1)
    # From here on a GPU is waited for. Where something is not finite, nor may the weights be by now; nobody keeps them.
    row = processes.agreed({name: float(value.detach()) for name, value in found.items()})
    _require_finite(row, step + 1)
    _require_finite({"gradient": float(norm)}, step + 1)
    if step == 0 and not float(norm):
        raise ModelError("step 1: no gradient reaches the adapter", "check unlearn.weights and the adapter's layers")
    return {"step": step + 1, **row}


def _require_finite(terms: dict[str, float], step: int) -> None:
    broken = [name for name, value in terms.items() if not math.isfinite(value)]
    if broken:
        shown = ", ".join(f"{name}={value:g}" for name, value in terms.items())
        raise ModelError(
            f"step {step}: {', '.join(broken)} is not finite ({shown})",
            "lower the learning rate or the weight of that term, or train in float32",
        )


def history_tsv(history: History) -> str:
    """Return the training history as tab-separated text with a header, numbers to six significant digits.

    Columns have a fixed order, because rows that come out of a checkpoint have lost theirs.
    """
    names = ["step", "loss", *sorted(history[0].keys() - {"step", "loss"})]
    rows = ["\t".join(f"{row[name]:.6g}" for name in names) for row in history]
    return "\n".join(["\t".join(names), *rows]) + "\n"


# --- checkpoints: <folder>/state.safetensors holds weights, AdamW moments and history; it is replaced as a whole ------


def _save(
    checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, history: History
) -> None:
    tensors = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state[p]:
                tensors[f"{key}/{name}"] = optimizer.state[p][key]
    record = json.dumps({"digest": checkpoint.digest, "history": history}).encode()
    tensors[_RECORD] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    for torn in checkpoint.folder.glob(f".{_STATE}*"):  # a process was killed while it wrote
        torn.unlink()
    artifacts.write_tensors(checkpoint.folder / _STATE, tensors)


def _resume(
    checkpoint: Checkpoint | None, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> History:
    if not checkpoint or not (checkpoint.folder / _STATE).exists():
        return []
    tensors = artifacts.read_tensors(checkpoint.folder / _STATE)
    record = _record(tensors)
    if record["digest"] != checkpoint.digest:
        return []
    history: History = record["history"]
    for name, p in parameters.items():
        p.data.copy_(tensors[f"weight/{name}"])
        if f"exp_avg/{name}" in tensors:
            optimizer.state[p] = {
                "step": torch.tensor(float(len(history)), device=p.device),
                "exp_avg": tensors[f"exp_avg/{name}"].to(p.device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(p.device),
            }
    return history


def read_history(tensors: dict[str, Tensor]) -> History:
    """Return the rows of the steps that a checkpoint, given its tensors, comes after."""
    history: History = _record(tensors)["history"]
    return history


def _record(tensors: dict[str, Tensor]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(bytes(tensors[_RECORD].tolist()))
    return record
