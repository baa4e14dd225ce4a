"""What glibc does with freed memory, which decides how fast tensors of the CPU are made; without glibc, nothing."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_libc = ctypes.CDLL(None) if sys.platform == 'linux' else None


def keep_freed_memory():
    """Have a tensor's memory reused for the next one, up to 16 MB.

    By default large tensors are mapped anew each time, and a step on the CPU spends a tenth of its time on page faults.
    The largest still are: of reused memory, gaps between them would remain.
    """
    if hasattr(_libc, 'mallopt'):
        _libc.mallopt(M_MMAP_THRESHOLD, 2**24)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory(device):
    """Give memory that is free right now back to the system, in a run on the CPU.

    After a forward pass this is what lies in gaps between activations, where the backward pass's large tensors do not
    fit: 6 % of the peak of stage 1's step in benchmarks/run.py (60 classes), for a quarter of a percent of its time.
    """
    if device.type == 'cpu' and hasattr(_libc, 'malloc_trim'):
        _libc.malloc_trim(0)
