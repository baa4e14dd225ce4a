"""What both stages and the test share: loaders, precision, evaluation."""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from core import signals
from core.errors import InputError
from engine.distributed import agreed, all_sum, is_main, rank, world_size
from engine.metrics import confusion_matrix
from model.kernels.upsampling import needed, predict


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


def precision(device, fp16):
    """The type that convolutions run in: with mixed precision float16 on CUDA, bfloat16 on CPUs that compute in it."""
    if not fp16:
        return torch.float32
    if device.type == 'cuda':
        return torch.float16
    if agreed(computes_in_bfloat16()):  # hosts may differ
        return torch.bfloat16
    if is_main():
        print('--fp16: this processor has no bfloat16 instructions; computing in float32, which is faster', flush=True)
    return torch.float32


def name_of(dtype):
    """'float32', 'float16' or 'bfloat16'."""
    return str(dtype).removeprefix('torch.')


@lru_cache
def computes_in_bfloat16():
    """Whether the processor has instructions for bfloat16; True where that cannot be told.

    With AVX2 alone PyTorch was found a dozen times slower in bfloat16 than in float32.
    """
    processor = Path('/proc/cpuinfo')
    return not processor.is_file() or names_bfloat16(processor.read_text())


def names_bfloat16(cpuinfo):
    """Whether the text of /proc/cpuinfo names bfloat16 instructions of x86 or Arm."""
    return re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', cpuinfo) is not None


def autocast(device, dtype):
    """Have convolutions run in what `precision` chose."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_features(net):
    """Compile backbone and decoder of a POP network in place (torch.compile); its keys stay as they are."""
    net.backbone.compile()
    net.decoder.compile()


def to_device(images, device):
    """Move images [B, 3, H, W] to the device, channels last."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(net, batches, device, dtype=torch.float32, on_prediction=None):
    """Segment images and compare with their masks.

    Args:
        net (POP): put into eval mode.
        batches (iterable of dict): from `evaluation_loader`, or with 'features' in place of 'image' (`cache`).
        device (torch.device), dtype (torch.dtype): where and in which precision the network runs (`precision`).
        on_prediction (callable, optional): called with (id, prediction, mask) of each image, tensors [h, w].

    Returns:
        ndarray: int64 confusion matrix of all processes' images, row = truth.
    """
    net.eval()
    confusion = torch.zeros(net.num_logits, net.num_logits, dtype=torch.int64, device=device)
    scores = net.score_prototypes()
    for batch in tqdm(batches, 'evaluating', leave=False, disable=None if is_main() else True):
        if signals.asked() and world_size() == 1:  # several processes could not all stop at the same image
            raise signals.Stopped(signals.asked())
        for reason in batch.get('skipped', ()):
            tqdm.write(f'skipped: {reason}')
        if 'features' in batch:
            features = batch['features']
        elif 'image' in batch:
            with autocast(device, dtype):
                features = net.features(to_device(batch['image'], device))
        for i, mask in enumerate(batch['mask']):
            mask = mask.to(device, non_blocking=True)
            prediction = segment(net, features[i : i + 1], scores, batch['canvas'][i], mask.shape, dtype)
            confusion += confusion_matrix(mask, prediction, net.num_logits)
            if on_prediction:
                on_prediction(batch['id'][i], prediction, mask)
    return all_sum(confusion).cpu().numpy()


def segment(net, features, scores, canvas, shape, dtype=torch.float32):
    """Labels of one image from its features; what only shows padding is not computed.

    Args:
        net (POP): classifies the features.
        features (Tensor): [1, C, h, w].
        scores (tuple): the network's `score_prototypes()`.
        canvas ((int, int)): size that the whole feature map is upsampled to.
        shape ((int, int)): (H, W) of the top left part that shows the image.
        dtype (torch.dtype): of convolutions.

    Returns:
        Tensor: int64 [H, W].
    """
    sizes = features.shape[-2:]
    rows, columns = (needed(*sides) for sides in zip(shape, canvas, sizes, strict=True))
    with autocast(features.device, dtype):
        logits = net.classify(features[:, :, :rows, :columns], scores)
    logits = F.pad(logits, (0, sizes[1] - columns, 0, sizes[0] - rows))
    return predict(logits, canvas, shape)[0]
