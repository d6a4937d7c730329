"""Models that do not fit on one device: each process holds a part of every decoder layer's frozen weights.

A layer's weights are gathered when it runs, forward or backward, and let go behind it (FSDP2: `fully_shard`). What is
trained is small and stays whole in every process, as do embeddings and output projection, which are read outside of a
layer. So all else, the sum of gradients and the checkpoints among it, is what it is without.

To gather is to meet: every process has to run the layers equally often. A training step is one pass in each (`shared`);
`in_step` is for passes whose number only the texts decide.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from unsink import models, processes
from unsink.errors import ModelError
from unsink.probe import before_each_pass

M = TypeVar("M", bound=nn.Module)


def load(make: Callable[[str, str], M], dtype: str, device: str, *, on: bool) -> M:
    """The model `make(dtype, device)`, its frozen layers sharded where that is `on` and there are several processes.

    Then each process makes the whole model on the CPU, one after the other, so that the memory of a machine has to hold
    one. No device ever does: it gets its part of a layer, then of the next.

    Args:
        make: from `model.dtype` and `model.device` to a model with exact weights; what is trainable in it stays whole.
        dtype: as `models.pick_dtype` takes it.
        device: as `models.pick_device` takes it.
        on: `model.shard`.

    Raises:
        ModelError: the device is not there, the weights are stored rounded, or as `make`.
        Lost: another process has ended.
    """
    if not processes.sharding(on):
        return make(dtype, device)
    place = models.pick_device(device)
    held = str(models.pick_dtype(dtype, place)).removeprefix("torch.")  # not that of the CPU
    mesh = init_device_mesh(place.type, (processes.count(),))
    with processes.in_turn():
        model = make(held, "cpu")
        if form := models.quantized(model):
            raise ModelError(
                f"model.shard splits exact weights, those of this model are stored as {form}",
                "set model.shard to false: rounded weights take a fourth or half of the memory",
            )
        _shard(model, mesh)
        return model.to(place)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in models.decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # It holds no weights of its own, and lets each layer be gathered while the one before still runs.
    fully_shard(models.decoder(model), mesh=mesh, ignored_params=set(model.parameters()))


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's layers are held in parts."""
    return isinstance(models.decoder(model), FSDPModule)


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Let each process run forward passes within the block, as many as it has; who is done helps the others to end.

    No two processes need to have as many passes, or any. Nothing else may be told between them within the block.
    Without gradients. It does nothing where the model is whole.

    Raises:
        Lost: another process has ended.
    """
    if not is_sharded(model):
        yield
        return
    with before_each_pass(model, lambda: _running(True)):
        yield
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        while _running(False):
            models.decoder(model)(input_ids=token, use_cache=False)


def _running(mine: bool) -> bool:
    """Whether any process is about to run a pass."""
    passes = torch.tensor(float(mine))
    processes.add_up([passes])
    return bool(passes)


def reaching(output: Tensor, inside: Tensor) -> Tensor:
    """`inside`, whose gradient also reaches `output`, as zeros.

    A layer's weights are gathered in the backward pass when a gradient comes to its output. A loss that reads something
    inside of the last layer alone would find them gone.

    Args:
        output: what the model returned, or rows of it.
        inside: a tensor from the inside of a layer, or made of one.
    """
    return _Reaching.apply(inside, output)  # type: ignore[no-any-return, no-untyped-call]


class _Reaching(torch.autograd.Function):
    """(inside, output) -> inside."""

    @staticmethod
    def forward(ctx: Any, inside: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.new_zeros(()).expand(output.shape)
        return inside.view_as(inside)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.output
