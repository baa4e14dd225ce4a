"""Speed and memory of a training, as it logs them."""

import contextlib
import resource
import sys
import time

import torch


class Speed:
    """Steps per second since a step, and the share of the time spent waiting for data."""

    def __init__(self, first_step: int):
        self.first_step, self.began, self.waited = first_step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Count the time of the block as waiting for data."""
        asked_at = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked_at

    def measure(self, step: int) -> tuple[float, float]:
        """Steps per second, and the share of waiting in 0..1, when `step` steps are done."""
        elapsed = time.perf_counter() - self.began
        return (step - self.first_step) / elapsed, self.waited / elapsed


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's memory, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
