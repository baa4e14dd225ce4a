"""What both stages and the test read their images through: loaders and the order of training samples."""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core import signals
from core.errors import InputError
from core.ranks import rank, world_size


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
        InputError: the data set does not fill one batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int, fill_last: bool = False, micro_batches: int = 1):
        if length < batch_size:
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
    return DataLoader(
        dataset,
        batch_sampler=TrainingBatches(len(dataset), batch_size, seed, fill_last, micro_batches),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=device.type == 'cuda',
    )


def evaluation_loader(
    dataset: Dataset, batch_size: int, *, num_workers: int, device: torch.device, keep_workers: bool = True
) -> DataLoader:
    """Loader of this process's share of the evaluation images: no padding, no repeats."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank(), len(dataset), world_size()),
        num_workers=num_workers,
        persistent_workers=keep_workers and num_workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=device.type == 'cuda',
        collate_fn=_collate_evaluation,
    )


def _start_worker(worker):
    """Set up a loader process: signals are left to the training process, and one image takes one thread."""
    signals.ignore(worker)
    cv2.setNumThreads(0)


def _collate_evaluation(items):
    """Stack the images; masks may differ in size and stay a list."""
    kept = [item for item in items if not item['skipped']]
    batch = {key: [item[key] for item in kept] for key in ('mask', 'canvas', 'id')}
    batch['mask'] = [torch.as_tensor(mask) for mask in batch['mask']]
    batch['skipped'] = [item['skipped'] for item in items if item['skipped']]
    return batch | {'image': torch.stack([item['image'] for item in kept])} if kept else batch
