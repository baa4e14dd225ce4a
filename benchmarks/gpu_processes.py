"""Shared batch statistics in the processes that torchrun starts, against one network with the joined batch.

    python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/gpu_processes.py gloo

`gpu.py` starts it. With Gloo, processes may share a GPU; NCCL needs one for each. Prints what was found as JSON, with
the largest allowed values.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_cases import count_waits
from engine.precision import autocast, name_of
from model.kernels import share_batch_statistics

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2}


def make_network() -> nn.Module:
    """A network whose last batch normalisation is fixed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(),
    )  # fmt: skip


def share(net: nn.Module, device: torch.device) -> nn.Module:
    """Share its batch statistics in place, and wrap it in DistributedDataParallel."""
    share_batch_statistics(net)
    return nn.parallel.DistributedDataParallel(net, device_ids=[device.index] if device.type == 'cuda' else None)


def differences(device: torch.device, dtype: torch.dtype, compile_with: str | None = None) -> dict[str, float]:
    """Train with three images in the first process and one in each other, and with all of them in one process.

    Args:
        device: of this process.
        dtype: of everything; with float16, of convolutions only (mixed precision).
        compile_with: backend of torch.compile.

    Returns:
        Largest differences of outputs, gradients and running statistics, relative to the largest value of each.
    """
    exact = torch.float32 if dtype == torch.float16 else dtype
    plain = make_network().to(device, exact, memory_format=torch.channels_last)
    shared = copy.deepcopy(plain)
    model = share(shared, device)
    if compile_with:
        shared.compile(backend=compile_with, fullgraph=True)
    rank, count = dist.get_rank(), dist.get_world_size()
    own = slice(0, 3) if rank == 0 else slice(rank + 2, rank + 3)
    found = {'outputs': 0.0, 'gradients': 0.0, 'running statistics': 0.0}

    def compare(what, ours, theirs):
        gap = (ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max()
        found[what] = max(found[what], gap.item())

    for _ in range(2):
        images, factors = (torch.randn(count + 2, *shape).to(device, exact) for shape in ((3, 9, 9), (4, 5, 5)))
        plain.zero_grad()
        model.zero_grad()
        with autocast(device, dtype if dtype == torch.float16 else torch.float32):
            expected, outputs = plain(images), model(images[own])
        compare('outputs', outputs, expected[own])
        (expected * factors).sum().backward()
        (outputs * factors[own]).sum().backward()
        for ours, theirs in zip(shared.parameters(), plain.parameters(), strict=True):
            compare('gradients', count * ours.grad, theirs.grad)  # the mean over processes
    for ours, theirs in zip(shared.buffers(), plain.buffers(), strict=True):
        compare('running statistics', ours, theirs)
    return found


def waits_of_a_step(device: torch.device) -> int:
    """How often the host waits for the GPU in a forward and backward pass in mixed precision."""
    model = share(make_network().to(device), device)
    images = torch.randn(2, 3, 65, 65, device=device)

    def step():
        with autocast(device, torch.float16):
            outputs = model(images)
        outputs.float().sum().backward()

    return count_waits(step)


def main(backend: str):
    device = torch.device('cuda', int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend)
    found = {}
    for dtype, limit in LIMITS.items():
        found |= {f'{what}, {name_of(dtype)}': (gap, limit) for what, gap in differences(device, dtype).items()}
    limit = LIMITS[torch.float32]
    found |= {f'{what}, compiled': (gap, limit) for what, gap in differences(device, torch.float32, 'inductor').items()}
    if backend == 'nccl':  # Gloo exchanges on the CPU
        found['host waits for the GPU in a step'] = waits_of_a_step(device), 0
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        largest = {what: (max(other[what][0] for other in gathered), limit) for what, (_, limit) in found.items()}
        print(json.dumps(largest))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
