"""Tune how glibc reuses freed memory; no effect on other systems."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_libc = ctypes.CDLL(None) if sys.platform == 'linux' else None


def keep_freed_memory() -> None:
    """Have the memory of a freed tensor, up to 16 MB, reused for the next one.

    By default large tensors are mapped anew each time, and a step on the CPU spends a tenth of its time on page faults.
    Larger tensors still are: reusing their memory would leave gaps between them.
    """
    if hasattr(_libc, 'mallopt'):
        _libc.mallopt(M_MMAP_THRESHOLD, 2**24)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory(device: torch.device) -> None:
    """Return memory that is free right now to the system, in a run on the CPU.

    After a forward pass this is the gaps between activations, which are too small for the backward pass's large
    tensors: 6 % of the peak of stage 1's step in benchmarks/run.py (60 classes), for a quarter of a percent of its
    time.
    """
    if device.type == 'cpu' and hasattr(_libc, 'malloc_trim'):
        _libc.malloc_trim(0)
