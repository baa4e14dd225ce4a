"""What `test_processes.py` starts in two processes with Gloo: shared batch statistics, then a stopped evaluation."""

import copy
import os
import signal

import native_batch_norm
import torch
from torch import nn

from core import signals
from core.errors import exits_cleanly
from core.ranks import rank
from engine import evaluation
from engine.distributed import process_group, wrap_ddp
from model.kernels import share_batch_statistics
from model.kernels.sync_batch_norm import SyncBatchNorm2d


def share_statistics():
    """Training with batches of three images and of one equals training with all four in one process; so compiled."""
    operations = native_batch_norm.register('CPU')
    torch.manual_seed(0)
    fixed = nn.BatchNorm2d(4).eval()
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), fixed, nn.BatchNorm2d(4)
    )  # fmt: skip
    plain.double()
    shared = copy.deepcopy(plain)
    share_batch_statistics(shared)
    assert [type(shared[i]) for i in (1, 4, 5)] == [SyncBatchNorm2d] * 3 and not shared[4].training
    assert shared.state_dict().keys() == plain.state_dict().keys()
    model = wrap_ddp(shared, torch.device('cpu'))
    own = (slice(0, 3), slice(3, 4))[rank()]
    for step in range(3):
        if step == 1:
            shared.compile(backend='aot_eager', fullgraph=True)
        images, factors = torch.randn(4, 3, 9, 9).double(), torch.randn(4, 4, 5, 5).double()
        plain.zero_grad()
        model.zero_grad()
        expected, found = plain(images), model(images[own])
        torch.testing.assert_close(found, expected[own])
        (expected * factors).sum().backward()
        (found * factors[own]).sum().backward()
        for ours, theirs in zip(shared.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(2 * ours.grad, theirs.grad)  # the mean over two processes
    for ours, theirs in zip(shared.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(shared.eval()(images), plain.eval()(images))
    print('batch statistics are shared', flush=True)
    del operations


def stop_evaluation():
    """One process has finished long before the other gets a signal."""
    batches = range((3, 40)[rank()])
    assert sum(1 for _ in evaluation._interruptible(batches)) == len(batches)
    for i, _ in enumerate(evaluation._interruptible(batches)):
        if rank() == 1 and i == 20:
            os.kill(os.getpid(), signal.SIGTERM)
    print('went through', flush=True)


@exits_cleanly
def main():
    with process_group('cpu', 1):
        signals.listen()
        share_statistics()
        stop_evaluation()


if __name__ == '__main__':
    main()
