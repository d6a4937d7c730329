"""Memory that is given back and asked for again at each step stays with the process."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = (2**30, 2**25)  # bytes; the second is the most that glibc before 2.35 takes


def keep_freed() -> None:
    """Keep freed memory for the next tensor; does nothing without glibc.

    Else every large tensor is mapped anew, filled with zeros page by page, and unmapped: 8 % of a training step's time.
    Memory at the peak is the same; between peaks it stays as high.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed() -> None:
    """Hand freed memory back to the system, that of other threads' too, which this one would not get; needs glibc.

    A model is read by several threads, and each has a store of its own.
    """
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
