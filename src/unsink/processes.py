"""Several processes that do one job together: which of them this is, and what they tell each other.

`torchrun` and `accelerate launch` start the same command once per GPU, and number the processes by RANK and WORLD_SIZE.
Each does its share of the samples or prompts; the first one alone prints and writes. All of them see the same project
folder. In a single process every function here gives back what it was given.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from unsink.errors import DataError, Lost, ParamsError, UnsinkError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SHARED = ("memorize", "unlearn", "evaluate", "audit")
"""Commands whose work several processes share."""
SHARDED = ("memorize", "unlearn", "evaluate")
"""Of these the ones that can split the weights as well: each process of an audit holds the suspect and its original."""
_LOT = 2**26
"""Numbers that are copied into one message: 256 MiB of float32."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return _number("RANK", 0)


def count() -> int:
    """Return how many processes do this job."""
    return _number("WORLD_SIZE", 1)


def first() -> bool:
    """Return whether this is the process that prints and writes."""
    return rank() == 0


def sharding(on: bool) -> bool:
    """Return whether each process holds a part of the weights: that is `on` (`model.shard`), and there are several."""
    return on and count() > 1


def _number(name: str, default: int) -> int:
    # Both or neither: some schedulers set one of the two for purposes of their own.
    return int(os.environ[name]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else default


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Connect the processes, one GPU for each where there are GPUs, while the block runs.

    Args:
        device: `model.device`; with `cpu` no GPU is looked for.

    Raises:
        ParamsError: there are more processes than GPUs.
        UnsinkError: they do not find each other.
        Lost: another process has ended meanwhile.
    """
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed

    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        local, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
        if local >= there:
            raise ParamsError(
                f"process {local + 1} on this machine has no GPU: there are {there}", "start one process per GPU"
            )
        torch.cuda.set_device(local)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank(), world_size=count())
    except (ValueError, RuntimeError) as error:
        raise UnsinkError(
            f"the {count()} processes do not find each other: {error}", "start them by torchrun or accelerate launch"
        ) from error
    done = False
    try:
        yield
        done = True
    except RuntimeError as error:  # of messages that torch sends by itself, as where layers are sharded
        if isinstance(error, distributed.DistError) or "gloo/transport" in str(error):
            raise _ended(error) from error
        raise
    finally:
        # After an error NCCL would wait here for processes that are still at work. When this one ends they are told.
        if done or not gpu:
            distributed.destroy_process_group()


@contextmanager
def led(entered: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context, such as a lock, in the first process alone; the others begin the block when it has."""
    with entered if first() else nullcontext():
        gather(None)
        yield


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the processes run the block one after the other; all of them leave it when the last one has run it.

    Raises:
        Lost: another process has ended.
    """
    for _ in range(rank()):
        gather(None)
    yield
    for _ in range(rank(), count()):
        gather(None)


def dealt(lengths: Sequence[int]) -> list[list[int]]:
    """Return for each process the places of its share: sorted by length and dealt in turn, so that all take as long.

    Raises:
        ParamsError: a process would have nothing to do.
    """
    if len(lengths) < count():
        raise ParamsError(
            f"{count()} processes, but a step has {len(lengths)} samples", "start fewer, or raise the batch"
        )
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return [sorted(order[number :: count()]) for number in range(count())]


def share(items: Sequence[T]) -> list[T]:
    """Return every n-th item, from this process's own number on; `together` undoes it."""
    return list(items[rank() :: count()])


def equal_share(items: Sequence[T]) -> list[T]:
    """Return a `share` of items that is as long in every process: where one is short, the first item is in it, too."""
    mine = share(items)
    return mine + list(items[: -(-len(items) // count()) - len(mine)])


def together(mine: Sequence[T]) -> list[T]:
    """Return the items of all processes, given what each made of its `share`, in the order before that."""
    return interleaved(gather(list(mine)))


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return the items of which each part is the `share` of a process, in the order before that."""
    whole: list[T] = [parts[0][0]] * sum(map(len, parts)) if parts[0] else []
    for number, part in enumerate(parts):
        whole[number :: len(parts)] = part
    return whole


def gather(mine: T) -> list[T]:
    """Return what each process says, in the order of their numbers.

    Raises:
        Lost: another process has ended.
    """
    if count() == 1:
        return [mine]
    import torch
    from torch import distributed

    packed, found = io.BytesIO(), [b""] * count()
    torch.save(mine, packed)
    with _talking():
        distributed.all_gather_object(found, packed.getvalue())
    return [torch.load(io.BytesIO(one), map_location=_here, weights_only=False) for one in found]


def _here(storage: Any, place: str) -> Any:
    """What comes from another GPU belongs on this process's own."""
    return storage.cuda() if place.startswith("cuda") else storage


def agreed(mine: T) -> T:
    """Return what the first process says."""
    return gather(mine)[0]


def require_same(mine: object, what: str) -> None:
    """Make sure that all processes see the same.

    Raises:
        DataError: they do not.
    """
    if len({repr(one) for one in gather(mine)}) > 1:
        raise DataError(f"{what}: the processes do not see the same", "give all of them the same project folder")


def exchange(mine: "Tensor", shapes: "Sequence[tuple[int, ...]]") -> "list[Tensor]":
    """Return a tensor of each process; this one's own keeps its gradient, the others come without.

    Args:
        mine: (n, ...) of this process.
        shapes: of each process's tensor; all have the same dtype.
    """
    import torch
    from torch import distributed

    found = []
    for number, shape in enumerate(shapes):
        there = mine.detach().contiguous() if number == rank() else mine.new_empty(shape)
        with _talking():
            distributed.broadcast(there.view(torch.uint8), src=number)  # bytes: not all dtypes can be sent
        found.append(mine if number == rank() else there)
    return found


def add_up(tensors: "Sequence[Tensor]") -> None:
    """Add the tensors of all processes in place, in few messages: small tensors together, large ones alone."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    for some in _lots(tensors):
        flat = torch.cat([tensor.flatten() for tensor in some])
        with _talking():
            distributed.all_reduce(flat)
        for tensor, total in zip(some, torch.split(flat, [tensor.numel() for tensor in some])):
            tensor.copy_(total.view_as(tensor))


def _lots(tensors: "Sequence[Tensor]") -> "Iterator[list[Tensor]]":
    """The tensors in their order, as many at a time as may be copied at once, but one at least."""
    lot: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if lot and size + tensor.numel() > _LOT:
            yield lot
            lot, size = [], 0
        lot.append(tensor)
        size += tensor.numel()
    if lot:
        yield lot


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # whatever gloo or NCCL say when somebody does not answer
        raise _ended(error) from error


def _ended(error: RuntimeError) -> Lost:
    return Lost(f"another process of this job has ended: {error}", "its own message says why")
