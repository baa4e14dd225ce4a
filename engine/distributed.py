"""Processes of one run: one per GPU under torchrun, or just this one."""

import contextlib
import inspect
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from core.errors import InputError
from model.kernels.malloc import keep_freed_memory

_hosts = None  # the Gloo group beside NCCL's


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
def process_group(device, timeout_minutes=30, deterministic=False):
    """Join the run's processes (NCCL on GPUs, Gloo on CPUs) and leave them at the end.

    Args:
        device (str): 'auto', 'cpu' or 'cuda'.
        timeout_minutes (float): a process that keeps the others waiting for longer ends the run.
        deterministic (bool): only algorithms whose results do not vary from run to run.

    Yields:
        torch.device: this process's device.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    device = _choose_device(device)
    if device.type == 'cpu':
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if world_size() > 1:
        timeout = timedelta(minutes=timeout_minutes)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timeout, **_meeting_place(timeout))
        # what hosts tell each other in every step goes over Gloo, so that no GPU is waited for
        global _hosts
        _hosts = dist.new_group(backend='gloo', timeout=timeout)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meeting_place(timeout):
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


def wrap_ddp(net, device, sync_bn=True):
    """Wrap a network for gradient averaging over the processes; the network itself where there is one process.

    Args:
        net (nn.Module): on `device`.
        device (torch.device): of this process.
        sync_bn (bool): batch statistics over all processes; PyTorch has that on GPUs only.
    """
    if world_size() == 1:
        return net
    if device.type == 'cuda' and sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    # running statistics do not enter a training step; `broadcast_buffers` makes them one before they are used
    wrapper = nn.parallel.DistributedDataParallel
    known = inspect.signature(wrapper).parameters
    buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # its older name
    return wrapper(net, device_ids=[device.index] if device.type == 'cuda' else None, **{buffers: False})


def broadcast_buffers(net):
    """Give every process the main one's running statistics: without SyncBatchNorm they drift apart between steps."""
    if world_size() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def all_sum(tensor):
    """Sum a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value):
    """The values of all processes, a list by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def barrier():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier(group=_hosts)


def sum_over_processes(*values):
    """Sums of whole numbers over the processes, exchanged on the CPU: a list of int."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=_hosts)
    return sums.tolist()


def mean_over_processes(values):
    """Means of scalar tensors over the processes.

    Args:
        values (dict): name -> scalar tensor.

    Returns:
        dict: name -> float.
    """
    means = all_sum(torch.stack([value.detach().float() for value in values.values()])) / world_size()
    return dict(zip(values, means.tolist(), strict=True))


def on_main(function):
    """Call a function in the main process only and give its result to all; its InputError, which it tells, ends all."""
    if not dist.is_initialized():
        return function()
    answer = [None, None]
    if is_main():
        try:
            answer = [function(), None]
        except InputError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0, group=_hosts)
    if answer[1] is not None:
        if is_main():
            raise InputError(answer[1])
        sys.exit(1)
    return answer[0]


def broadcast(value):
    """The main process's value, in all processes."""
    return on_main(lambda: value)


def main_first(function, *args):
    """Call a function that makes files in the main process, then in the others; returns what it does."""
    made = on_main(lambda: function(*args))
    return made if is_main() else function(*args)
