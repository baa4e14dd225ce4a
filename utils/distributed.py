"""Processes of one run: one per GPU under torchrun, or just this one."""

import contextlib
import ctypes
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def world_size():
    """Number of processes of this run, as torchrun announces it; 1 without torchrun."""
    return int(os.environ.get('WORLD_SIZE', 1))


def local_world_size():
    """How many of this run's processes are on this host."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def rank():
    """This process's number, 0 .. world_size() - 1."""
    return int(os.environ.get('RANK', 0))


def is_main():
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device):
    """Join the run's processes (NCCL on GPUs, Gloo on CPUs) and leave them at the end.

    Args:
        device (str): 'auto', 'cpu' or 'cuda'.

    Yields:
        torch.device: this process's device.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    device = _choose_device(device)
    if world_size() > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _choose_device(name):
    if name == 'cuda' and not torch.cuda.is_available():
        raise InputError(
            '--device cuda: PyTorch finds no CUDA device here. Check the driver with nvidia-smi, '
            'or run with --device cpu.'
        )
    if name == 'cpu' or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device('cpu')
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f'process {local_rank} of this host has no GPU of its own: there are {torch.cuda.device_count()}. '
            'Start at most that many processes per host.'
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.benchmark = True  # crops are all of one size, so one search per layer
    torch.backends.cudnn.allow_tf32 = True  # convolutions only; matrix products stay float32, the head needs that
    return torch.device('cuda', local_rank)


def keep_freed_memory():
    """Have glibc reuse a tensor's memory for the next one, up to 32 MB.

    Its default maps large tensors anew each time, and a step on the CPU spends a tenth of its time on page faults.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc allows
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def parallel(net, device):
    """Wrap a network for gradient averaging over the processes; the network itself where there is one process."""
    if world_size() == 1:
        return net
    if device.type == 'cuda':
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return nn.parallel.DistributedDataParallel(net, device_ids=[device.index])
    return nn.parallel.DistributedDataParallel(net)


def share_buffers(net):
    """Give every process the main one's running statistics: without SyncBatchNorm they drift apart between steps."""
    if world_size() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def all_sum(tensor):
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def main_first(function, *args):
    """Call a function that makes files in the main process, then in the others, which find them made."""
    if is_main():
        function(*args)
    if world_size() > 1:
        dist.barrier()
    if not is_main():
        function(*args)
