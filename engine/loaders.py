"""What both stages and the test read their images through: loaders and the order of training samples."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from core import signals
from core.errors import InputError
from engine.distributed import rank, world_size


class TrainingBatches:
    """Batch sampler of one process: (epoch, index) pairs, shuffled by (seed, epoch).

    The global order does not depend on the number of processes. A last incomplete batch is dropped, or filled up from
    the start of the order. A step may take its batch in several parts, one after the other.

    Args:
        length (int): of the data set.
        batch_size (int): global; a multiple of processes times parts.
        seed (int): of the order.
        fill_last (bool): fill the last batch rather than drop it.
        parts (int): per step.

    Attributes:
        steps (int): of an epoch.
        epoch, first_step (int): what the next pass yields: this epoch from this step on.
    """

    def __init__(self, length, batch_size, seed, fill_last=False, parts=1):
        if length < batch_size:
            raise InputError(f'{length} training samples do not fill one batch of {batch_size}; lower --batch-size')
        self.length, self.batch_size, self.seed, self.parts = length, batch_size, seed, parts
        self.steps = -(-length // batch_size) if fill_last else length // batch_size
        self.epoch, self.first_step = 0, 0

    def __len__(self):
        return (self.steps - self.first_step) * self.parts

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        share = self.batch_size // (world_size() * self.parts)
        for i in range(self.first_step, self.steps):
            for part in range(self.parts):
                start = i * self.batch_size + (part * world_size() + rank()) * share
                yield [(self.epoch, order[k % self.length]) for k in range(start, start + share)]


def training_loader(dataset, batch_size, seed, num_workers, device, fill_last=False, parts=1):
    """Loader of training views; `TrainingBatches` says what its next pass yields."""
    return DataLoader(
        dataset,
        batch_sampler=TrainingBatches(len(dataset), batch_size, seed, fill_last, parts),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=signals.ignore,
        pin_memory=device.type == 'cuda',
    )


def evaluation_loader(dataset, batch_size, num_workers, device, keep_workers=True):
    """Loader of this process's share of the evaluation images: no padding, no repeats."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank(), len(dataset), world_size()),
        num_workers=num_workers,
        persistent_workers=keep_workers and num_workers > 0,
        worker_init_fn=signals.ignore,
        pin_memory=device.type == 'cuda',
        collate_fn=_collate_evaluation,
    )


def _collate_evaluation(items):
    """Stack the images; masks may differ in size and stay a list."""
    kept = [item for item in items if not item['skipped']]
    batch = {key: [item[key] for item in kept] for key in ('mask', 'canvas', 'id')}
    batch['mask'] = [torch.as_tensor(mask) for mask in batch['mask']]
    batch['skipped'] = [item['skipped'] for item in items if item['skipped']]
    return batch | {'image': torch.stack([item['image'] for item in kept])} if kept else batch
