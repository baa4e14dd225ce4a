"""What `test_processes.py` starts in two processes with Gloo: shared batch statistics, then a stopped evaluation."""

import os
import signal

import native_batch_norm
import torch

from benchmarks.gpu_processes import differences
from core import signals
from core.errors import InputError, exits_cleanly
from core.ranks import rank
from engine import evaluation
from engine.distributed import on_main, process_group


def share_statistics():
    """Training with a batch in two parts equals training with the whole in one process; so compiled."""
    operations = native_batch_norm.register('CPU')
    for backend in (None, 'aot_eager'):
        found = differences(torch.device('cpu'), torch.float64, backend)
        assert all(gap < 1e-12 for gap in found.values()), found
    print('batch statistics are shared', flush=True)
    del operations


def fail_together():
    """An InputError of the main process can be caught in all of them, which then go on alike."""

    def fail():
        raise InputError('no room')

    try:
        on_main(fail)
    except InputError as error:
        print(f'caught: {error}', flush=True)


def stop_evaluation():
    """One process has finished long before the other gets a signal."""
    batches = range((3, 40)[rank()])
    assert sum(1 for _ in evaluation.interruptible(batches)) == len(batches)
    for i, _ in enumerate(evaluation.interruptible(batches)):
        if rank() == 1 and i == 20:
            os.kill(os.getpid(), signal.SIGTERM)
    print('went through', flush=True)


@exits_cleanly
def main():
    with process_group('cpu', 1):
        signals.listen()
        share_statistics()
        fail_together()
        stop_evaluation()


if __name__ == '__main__':
    main()
