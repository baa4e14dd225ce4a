"""The processes of a run: one per GPU under torchrun, or a single one."""

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from core.errors import InputError, MainProcessError
from core.ranks import check_ranks, is_main, local_rank, rank, world_size
from engine.loaders import raise_advice
from model.kernels import keep_freed_memory, share_batch_statistics

T = TypeVar('T')
_gloo = None  # a second group, for what is exchanged on the CPU


@contextlib.contextmanager
def process_group(device: str, timeout_minutes: float = 30, deterministic: bool = False) -> Iterator[torch.device]:
    """Join the run's processes (NCCL on GPUs, Gloo on CPUs) and leave them at the end.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        timeout_minutes: a process that keeps the others waiting for longer ends the run.
        deterministic: only algorithms whose results do not vary from run to run.

    Yields:
        This process's device.

    Raises:
        InputError: CUDA is asked for and not available, or its memory ran out.
    """
    check_ranks()
    device = _choose_device(device)
    if device.type == 'cpu':
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        torch.backends.cudnn.benchmark = False
    if world_size() > 1:
        timeout = timedelta(minutes=timeout_minutes)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timeout, **_rendezvous_store(timeout))
        # what is exchanged in every step goes over Gloo, so that nobody waits for a GPU
        global _gloo
        _gloo = dist.new_group(backend='gloo', timeout=timeout)
    try:
        yield device
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(_memory_advice(error, device)) from error
    except RuntimeError as error:
        if 'DataLoader' in str(error):
            raise_advice(error)
        raise
    # after an error the process just ends: NCCL may wait here for processes that are still at work
    if dist.is_initialized():
        dist.destroy_process_group()


def _memory_advice(error, device):
    """What an out-of-memory error asked for, and what to change."""
    free, total = torch.cuda.mem_get_info(device)
    asked = re.search(r'[Tt]ried to allocate ([\d.]+ \w+)', str(error))
    return (
        f'out of memory on {device}: {asked[1] if asked else "more memory"} asked for, {free / 1e9:.1f} of '
        f'{total / 1e9:.1f} GB free. Use --fp16; in training --accumulate 2 or more, or a smaller --batch-size or '
        '--input-size; in evaluation a smaller --test-batch-size. Memory in pieces that are too small: set '
        'PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. nvidia-smi shows other programs on this GPU.'
    )


def _rendezvous_store(timeout):
    """Where the processes find each other, as arguments of init_process_group; none: where PyTorch looks by itself.

    torchrun keeps one store over all restarts, in which processes would find the addresses of those that died.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}
    port = int(os.environ['MASTER_PORT'])
    store = dist.TCPStore(os.environ['MASTER_ADDR'], port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    return {'store': store, 'rank': rank(), 'world_size': world_size()}


def _choose_device(name):
    if name == 'cuda' and not torch.cuda.is_available():
        raise InputError(
            '--device cuda: PyTorch finds no CUDA device here. Check the driver with nvidia-smi, '
            'or run with --device cpu.'
        )
    if name == 'cpu' or not torch.cuda.is_available():
        return torch.device('cpu')
    if local_rank() >= torch.cuda.device_count():
        raise InputError(
            f'process {local_rank()} of this host has no GPU of its own: there are {torch.cuda.device_count()}. '
            'Start at most that many processes per host.'
        )
    torch.cuda.set_device(local_rank())
    torch.backends.cudnn.benchmark = True  # crops are all of one size, so one search per layer
    torch.backends.cudnn.allow_tf32 = True  # convolutions only; matrix products stay float32, the head needs that
    return torch.device('cuda', local_rank())


def wrap_ddp(net: nn.Module, device: torch.device, sync_bn: bool = True) -> nn.Module:
    """Wrap a network in DistributedDataParallel; with one process, or nothing to train, return the network itself.

    Args:
        net: on `device`.
        device: of this process.
        sync_bn: batch statistics over all processes, on GPUs only.
    """
    if world_size() == 1 or not any(parameter.requires_grad for parameter in net.parameters()):
        return net
    if device.type == 'cuda' and sync_bn:
        share_batch_statistics(net)
    # a training step does not use running statistics; `broadcast_buffers` makes them equal before they are used
    wrapper = nn.parallel.DistributedDataParallel
    known = inspect.signature(wrapper).parameters
    buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # its older name
    return wrapper(net, device_ids=[device.index] if device.type == 'cuda' else None, **{buffers: False})


def broadcast_buffers(net: nn.Module):
    """Give every process the running statistics of the main one: without SyncBatchNorm each process has its own."""
    if world_size() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value) -> list:
    """The values of all processes by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_gloo)
    return values


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier(group=_gloo)


def sum_over_processes(*values: int) -> list[int]:
    """Sums of integers over the processes, exchanged on the CPU."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=_gloo)
    return sums.tolist()


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means of scalar tensors over the processes."""
    means = all_sum(torch.stack([value.detach().float() for value in values.values()])) / world_size()
    return dict(zip(values, means.tolist(), strict=True))


def on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process only and give its result to all; all raise its InputError."""
    if not dist.is_initialized():
        return function()
    answer = [None, None]
    if is_main():
        try:
            answer = [function(), None]
        except InputError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0, group=_gloo)
    if answer[1] is not None:
        raise (InputError if is_main() else MainProcessError)(answer[1])
    return answer[0]


def broadcast(value: T) -> T:
    """The main process's value."""
    return on_main(lambda: value)


def main_first(function: Callable[..., T], *args) -> T:
    """Call a function that makes files in the main process first, then in the others; returns its result."""
    made = on_main(lambda: function(*args))
    return made if is_main() else function(*args)
