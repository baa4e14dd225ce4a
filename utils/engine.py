"""What both stages and the test share: loaders, one training epoch, one evaluation."""

import time
from datetime import timedelta

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.distributed import all_sum, is_main, rank, world_size
from utils.errors import InputError
from utils.metrics import confusion_matrix, upsample


class TrainingBatches:
    """Batch sampler of one process: (epoch, index) pairs, shuffled by (seed, epoch).

    The global order does not depend on the number of processes; the last incomplete batch is dropped.

    Args:
        length (int): of the data set.
        batch_size (int): global.
        seed (int): of the order.
    """

    def __init__(self, length, batch_size, seed):
        if length < batch_size:
            raise InputError(f'{length} training samples do not fill one batch of {batch_size}; lower --batch-size')
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = 0

    def __len__(self):
        return self.length // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        share = self.batch_size // world_size()
        for i in range(len(self)):
            start = i * self.batch_size + rank() * share
            yield [(self.epoch, index) for index in order[start : start + share]]


def training_loader(dataset, batch_size, seed, num_workers, device):
    """Loader of training views; set `loader.batch_sampler.epoch` before each epoch."""
    return DataLoader(
        dataset,
        batch_sampler=TrainingBatches(len(dataset), batch_size, seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
    )


def evaluation_loader(dataset, batch_size, num_workers, device):
    """Loader of this process's share of the evaluation images: no padding, no repeats."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank(), len(dataset), world_size()),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
        collate_fn=_collate_evaluation,
    )


def _collate_evaluation(items):
    """Stack the images; masks may differ in size and stay a list."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch['image'] = torch.stack(batch['image'])
    batch['mask'] = [torch.as_tensor(mask) for mask in batch['mask']]
    return batch


def autocast(device, fp16):
    """Mixed precision where it is asked for: float16 on CUDA, bfloat16 on the CPU."""
    return torch.autocast(device.type, torch.float16 if device.type == 'cuda' else torch.bfloat16, enabled=fp16)


def to_device(images, device):
    """Move images [B, 3, H, W] to the device, channels last."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def train_epoch(step, loader, optimization, logger, epoch, num_epoch, print_frequency, **position):
    """Train for one epoch.

    Args:
        step (callable): batch -> dict of named loss terms; their sum is minimised.
        loader (DataLoader): from `training_loader`.
        optimization (Optimization): takes the steps.
        logger (RunLogger): gets a line and a record every `print_frequency` steps.
        epoch, num_epoch (int): zero-based epoch and how many there are.
        position: further fields of the records.

    Raises:
        InputError: the loss is not finite; names the batch's images.
    """
    loader.batch_sampler.epoch = epoch
    steps, began, waited, handed = len(loader), time.perf_counter(), 0.0, time.perf_counter()
    for i, batch in enumerate(loader):
        waited += time.perf_counter() - handed
        losses = step(batch)
        total = sum(losses.values())
        if not torch.isfinite(total):
            values = ', '.join(f'{name} {value.item():.4g}' for name, value in losses.items())
            raise InputError(
                f'loss is not finite at epoch {epoch + 1}, step {i + 1} ({values}); images: '
                f'{", ".join(_image_ids(batch))}. Lower --learning-rate, or look at these images and masks.'
            )
        rates = optimization.learning_rates
        grad_norm = optimization.step(total)
        if (i + 1) % print_frequency == 0 or i + 1 == steps:
            elapsed = time.perf_counter() - began
            left = elapsed / (i + 1) * (steps - i - 1 + steps * (num_epoch - epoch - 1))
            values = {name: value.item() for name, value in losses.items()} | {'grad_norm': grad_norm.item()}
            speed = (i + 1) * loader.batch_sampler.batch_size / elapsed
            logger.info(
                f'epoch {epoch + 1}/{num_epoch} step {i + 1}/{steps}  '
                + '  '.join(f'{name} {value:.4f}' for name, value in values.items())
                + f'  lr {max(rates.values()):.2e}  {speed:.1f} samples/s  waiting for data {waited / elapsed:.0%}'
                + f'  left {timedelta(seconds=round(left))}'
            )
            logger.record(
                'train', epoch * steps + i + 1,
                values | {f'lr_{name}': rate for name, rate in rates.items()} | {'samples_per_second': speed},
                epoch=epoch + 1, **position,
            )  # fmt: skip
        handed = time.perf_counter()


def _image_ids(batch):
    """The image ids of a batch of either stage."""
    if 'id' in batch:
        return batch['id']
    return [image_id for part in batch.values() for image_id in _image_ids(part)]


@torch.no_grad()
def evaluate(net, loader, device, fp16=False, on_prediction=None):
    """Segment images and compare with their masks.

    Args:
        net (POP): put into eval mode.
        loader (DataLoader): from `evaluation_loader`.
        device (torch.device), fp16 (bool): where and in which precision the network runs.
        on_prediction (callable, optional): called with (id, prediction uint8 [h, w], mask uint8 [h, w]) of each image.

    Returns:
        ndarray: int64 confusion matrix of all processes' images, row = truth.
    """
    net.eval()
    confusion = torch.zeros(net.num_logits, net.num_logits, dtype=torch.int64, device=device)
    for batch in tqdm(loader, 'evaluating', leave=False, disable=None if is_main() else True):
        with autocast(device, fp16):
            logits = net(to_device(batch['image'], device))
        for i, mask in enumerate(batch['mask']):
            mask = mask.to(device, non_blocking=True)
            prediction = upsample(logits[i : i + 1], batch['canvas'][i]).argmax(dim=1)[0]
            prediction = prediction[: mask.shape[0], : mask.shape[1]]
            confusion += confusion_matrix(mask, prediction, net.num_logits)
            if on_prediction:
                on_prediction(batch['id'][i], prediction.byte().cpu().numpy(), mask.cpu().numpy())
    return all_sum(confusion).cpu().numpy()
