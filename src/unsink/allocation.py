"""Memory that is given back and asked for again at each step stays with the process; the way to a GPU's memory."""

import ctypes
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = (2**30, 2**25)  # bytes; the second is the most that glibc before 2.35 takes


def keep_freed() -> None:
    """Keep freed memory for the next tensor; does nothing without glibc.

    Else every large tensor is mapped anew, filled with zeros page by page, and unmapped: 8 % of a training step's time.
    Memory at the peak is the same; between peaks it stays as high.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed() -> None:
    """Hand freed memory back to the system, that of other threads' too, which this one would not get; needs glibc.

    A model is read by several threads, and each has a store of its own.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def sent(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """Return a tensor of the processor's on a device; what a GPU is at meanwhile is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, or None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
