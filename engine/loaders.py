"""What both stages and the test read their images through: loaders and the order of training samples."""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from core import IGNORE_INDEX, signals
from core.errors import InputError
from core.ranks import rank, world_size

EVALUATION_BATCH = {'cpu': 1, 'cuda': 16}  # images; at 473x473, a CPU is no faster with more
TIMEOUT = 600  # seconds that a loader process may take for a batch
ENDED = (
    'a loader process ended ({}). The system usually kills processes when memory runs out. Use fewer --num-workers '
    '(0: no processes).'
)
LONGEST_FOLDER = 60  # characters of a temporary folder in which sockets can be made: their paths have at most 107


class TrainingBatches:
    """Batch sampler of one process: (epoch, index) pairs, shuffled by (seed, epoch).

    The global order does not depend on the number of processes. A last incomplete batch is dropped, or filled up from
    the start of the order. A step may divide its batch into several micro-batches.

    Args:
        length: of the data set.
        batch_size: global; a multiple of processes times micro-batches.
        seed: of the order.
        fill_last: fill the last batch rather than drop it.
        micro_batches: per step.

    Attributes:
        steps: of an epoch.
        epoch, first_step: what the next pass yields: this epoch from this step on.

    Raises:
        InputError: the data set does not fill one batch, and is not to.
    """

    def __init__(self, length: int, batch_size: int, seed: int, fill_last: bool = False, micro_batches: int = 1):
        if length < batch_size and not fill_last:
            raise InputError(f'{length} training samples do not fill one batch of {batch_size}; lower --batch-size')
        self.length, self.batch_size, self.seed, self.micro_batches = length, batch_size, seed, micro_batches
        self.steps = -(-length // batch_size) if fill_last else length // batch_size
        self.epoch, self.first_step = 0, 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        share = self.batch_size // (world_size() * self.micro_batches)
        for i in range(self.first_step, self.steps):
            for k in range(self.micro_batches):
                start = i * self.batch_size + (k * world_size() + rank()) * share
                yield [(self.epoch, order[j % self.length]) for j in range(start, start + share)]


class Loader(DataLoader):
    """A DataLoader that ends the run with advice where its processes die, hang or cannot hand over a batch."""

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        try:
            yield from batches
        except Exception as error:
            workers = getattr(batches, '_workers', ())  # this process may read by itself
            end = _end_of_a_process(workers) if workers and _lost_its_process(error) else None
            if workers:  # now: after they were killed, queues would complain
                batches._shutdown_workers()
            if end:
                raise_advice(RuntimeError(end))
            if isinstance(error, (OSError, RuntimeError)):
                raise_advice(error)
            raise


def _end_of_a_process(workers):
    """How a loader process ended whose connection broke, in PyTorch's words, which `raise_advice` knows."""
    processes = {process.sentinel: process for process in workers}
    try:
        for ended in wait(processes, timeout=5):
            processes[ended].join(1)
            if (code := processes[ended].exitcode) and code < 0:
                return f'DataLoader worker is killed by signal: {signal.strsignal(-code)}'
    except RuntimeError as error:  # PyTorch's handler of SIGCHLD was faster
        return str(error)
    return 'DataLoader worker exited unexpectedly'


def _lost_its_process(error):
    """Whether an error is of a loader process that ended while it handed over a batch, before its end was noticed."""
    broken = isinstance(error, (ConnectionError, EOFError)) or (
        isinstance(error, FileNotFoundError) and error.filename is None  # its socket is gone
    )
    return broken and not str(error).startswith('Caught ')  # what a loader process raised itself


def raise_advice(error: Exception):
    """Raise InputError with advice if an error is of loader processes or of the system's limits on them.

    The death of a loader process is raised by a signal handler, hence anywhere in the training process.
    """
    text = f'{error.__cause__ or ""}\n{error}'  # PyTorch chains the signal that killed a process
    if re.search(r'shared memory|</torch_\d+|Bus error|No space left|quota', text):
        raise InputError(
            f'loader processes cannot hand over batches: /dev/shm is full or too small ({_shared_memory()}). Enlarge '
            'it (docker run --shm-size=8g; mount -o remount,size=8g /dev/shm), or use --num-workers 0.'
        ) from error
    if ended := re.search(r'DataLoader worker .*(killed by signal: \w+|exited unexpectedly)', text):
        raise InputError(ENDED.format(ended[1])) from error
    if 'DataLoader timed out' in text:
        raise InputError(
            f'no loader process delivered a batch for {TIMEOUT // 60} minutes. Check that the disk with the images '
            'answers. --num-workers 0 reads without processes.'
        ) from error
    if re.search(r'Too many open files|ancdata|AF_UNIX|socket', text):
        raise InputError(
            f'loader processes cannot hand over batches ({text.strip().splitlines()[-1]}). Allow more open files '
            '(ulimit -n 4096), set TMPDIR to a folder with a short path, or use --num-workers 0.'
        ) from error


def _shared_memory():
    """Size and free space of /dev/shm, for a message."""
    try:
        usage = shutil.disk_usage('/dev/shm')
    except OSError as error:
        return f'{error.strerror}'
    return f'{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free'


def training_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    num_workers: int,
    device: torch.device,
    fill_last: bool = False,
    micro_batches: int = 1,
) -> DataLoader:
    """Loader of training views; `TrainingBatches` says what its next pass yields."""
    batches = TrainingBatches(len(dataset), batch_size, seed, fill_last, micro_batches)
    return Loader(dataset, batch_sampler=batches, **_processes(num_workers, device))


def evaluation_loader(
    dataset: Dataset,
    batch_size: int | None,
    *,
    num_workers: int,
    device: torch.device,
    keep_workers: bool = True,
    rows: Sequence[int] | None = None,
) -> DataLoader:
    """Loader of evaluation items: no padding, no repeats.

    Args:
        dataset: `SegmentationDataset` with `fit_size`, or `views.DrawnViews`.
        batch_size: per process; None is `EVALUATION_BATCH` of the device.
        num_workers: loader processes.
        device: of this process.
        keep_workers: between passes.
        rows: indices of the items; by default this process's share of all.
    """
    share = range(rank(), len(dataset), world_size()) if rows is None else rows
    return Loader(
        dataset, batch_size or EVALUATION_BATCH[device.type], sampler=share, collate_fn=_collate_evaluation,
        **_processes(num_workers, device, keep_workers),
    )  # fmt: skip


def _processes(num_workers, device, keep=True):
    """Arguments of a DataLoader that say how its processes run."""
    return {
        'num_workers': num_workers,
        'persistent_workers': keep and num_workers > 0,
        'worker_init_fn': _start_worker,
        'timeout': TIMEOUT if num_workers else 0,
        'pin_memory': device.type == 'cuda',
    }


def _start_worker(worker):
    """Set up a loader process: signals are left to the training process, and one image takes one thread."""
    signals.ignore(worker)
    cv2.setNumThreads(0)
    if len(tempfile.gettempdir()) > LONGEST_FOLDER and os.access('/tmp', os.W_OK):
        tempfile.tempdir = '/tmp'
    # Batches are sent by a thread whose errors reach nobody, so that the training process would wait. Limits that keep
    # a process from sending at all are met here, where an error is reported.
    ForkingPickler.dumps(torch.zeros(1).share_memory_())


def _collate_evaluation(items):
    """Join evaluation items: {'image' [B, 3, H, W], 'mask' [B, h, w], 'shape', 'canvas', 'id', 'index': lists}.

    'skipped' lists why images could not be read. Masks may differ in size: they are padded with pixels that are not
    counted, and 'shape' has their sizes. Items without an image are left out; if none is left, 'id' is empty.
    """
    kept = [item for item in items if 'image' in item]
    batch = {'id': [item['id'] for item in kept], 'skipped': [item['skipped'] for item in items if item['skipped']]}
    if not kept:
        return batch
    shapes = [tuple(item['mask'].shape) for item in kept]
    height, width = map(max, zip(*shapes, strict=True))
    masks = [
        F.pad(torch.as_tensor(item['mask']), (0, width - w, 0, height - h), value=IGNORE_INDEX)
        for item, (h, w) in zip(kept, shapes, strict=True)
    ]
    # default_collate, unlike torch.stack, reports here if shared memory is full
    stacked = {'image': default_collate([item['image'] for item in kept]), 'mask': default_collate(masks)}
    lists = {'shape': shapes} | {key: [item[key] for item in kept] for key in ('canvas', 'index')}
    return batch | stacked | lists
