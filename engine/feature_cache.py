"""Validation features of a frozen network: computed once, read by every later validation of all epochs and seeds."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from core import IGNORE_INDEX
from core.errors import InputError
from core.ranks import local_world_size, world_size
from engine.distributed import broadcast
from engine.precision import autocast, to_device
from model import POP

GB = 10**9
SPARE_DISK = 2 * GB  # left free for checkpoints and logs
IMAGES_AT_ONCE = {'cpu': 1, 'cuda': 32}  # of a cached batch


def cache_features(
    frozen: POP,
    loader: DataLoader,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    place: str,
    budget_gb: float,
    folder: Path,
    log: Callable[[str], None],
) -> 'FrozenFeatures':
    """Choose where validation features are kept, by what they need and what there is.

    Args:
        frozen: `frozen.features` maps images to features, [B, 3, H, W] to [B, C, h, w]; it must not change any more.
            `frozen.feature_shape(size)` is their shape.
        loader: from `loaders.evaluation_loader`.
        size: (H, W) of the images and, at most, of the masks.
        device, dtype: where and in which precision the network runs.
        place: 'gpu', 'memory', 'disk', 'off', or 'auto': the first of these with room for them.
        budget_gb: memory for the features of all processes of a host together, in 10^9 bytes.
        folder: where they are kept on disk.
        log: called with a message about where the features are kept, or why they are not.

    Returns:
        Batches for `evaluation.evaluate`.

    Raises:
        InputError: the place that is asked for is not large enough, or there is no GPU.
    """
    features = FrozenFeatures(frozen, loader, device, dtype)
    if place == 'off':
        return features
    shape = frozen.feature_shape(size)
    count = -(-len(loader.dataset) // world_size())
    need = count * (2 * math.prod(shape) + math.prod(size))  # of a process, which has its own GPU or shares a host
    room = {
        'gpu': _spare_gpu_memory(device),
        'memory': budget_gb * GB / local_world_size(),
        'disk': max(shutil.disk_usage(folder).free - SPARE_DISK, 0) / local_world_size(),
    }
    shortage = (
        f'validation features of {len(loader.dataset)} images need {need / GB:.1f} GB in each process; there are '
        f'{room["gpu"] / GB:.1f} GB for them on the GPU, {room["memory"] / GB:.1f} GB in memory (--val-cache-gb) and '
        f'{room["disk"] / GB:.1f} GB in {folder}'
    )
    places = ('gpu', 'memory', 'disk') if place == 'auto' else (place,)
    # decided once: a process that reserves its file changes what the next one finds free
    chosen = broadcast(next((place for place in places if need <= room[place]), None))
    if chosen is None and place != 'auto':
        raise InputError(f'--val-cache {place}: {shortage}. Raise the budget, use --val-limit, or auto.')
    if chosen is None:
        log(f'{shortage}: not kept, every validation computes them again (--val-limit N validates on fewer)')
        return features
    log(f'validation features: {len(loader.dataset)} images, {need / GB:.2f} GB, kept in {chosen}')
    return CachedFeatures(frozen, loader, device, dtype, (count, *shape), (count, *size), chosen, folder)


def _spare_gpu_memory(device):
    """Bytes of a GPU's memory that features may take: half of what is free; none on a CPU."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == 'cuda' else 0


class FrozenFeatures:
    """Batches of validation features, computed again in each pass.

    Args:
        frozen, loader, device, dtype: as in `cache_features`.
    """

    def __init__(self, frozen: POP, loader: DataLoader, device: torch.device, dtype: torch.dtype):
        self.frozen, self.loader, self.device, self.dtype = frozen, loader, device, dtype

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        """Yield the loader's batches with 'features' [B, C, h, w] on the device in place of 'image'."""
        for batch in self.loader:
            if batch['id']:
                with torch.no_grad(), autocast(self.device, self.dtype):
                    batch['features'] = self.frozen.features(to_device(batch.pop('image'), self.device))
            yield batch


class CachedFeatures(FrozenFeatures):
    """Batches of images with their features; the first pass fills the cache.

    Args:
        features_shape, masks_shape: [N, C, h, w], kept in float16, and [N, H, W], kept in uint8.
        place: 'gpu', 'memory' or 'disk'.
        folder: on disk they are kept in unlinked temporary files there.
    """

    def __init__(
        self,
        frozen: POP,
        loader: DataLoader,
        device: torch.device,
        dtype: torch.dtype,
        features_shape: tuple[int, ...],
        masks_shape: tuple[int, ...],
        place: str,
        folder: Path,
    ):
        super().__init__(frozen, loader, device, dtype)
        count, channels, *size = features_shape
        # channels last in memory, as the head reads them
        self.features = _allocate((count, *size, channels), torch.float16, place, folder, device).permute(0, 3, 1, 2)
        self.masks = _allocate(masks_shape, torch.uint8, place, folder, device)
        self.images_at_once = IMAGES_AT_ONCE[device.type]
        self.items = []  # per image: mask shape, canvas, id
        self.complete = False

    def __len__(self) -> int:
        return -(-len(self.loader.sampler) // self.images_at_once)

    def __iter__(self) -> Iterator[dict]:
        """Yield the loader's batches with 'features', float16 [B, C, h, w] on the device, in place of 'image'."""
        if self.complete:
            yield from self._batches(0, len(self.items))
            return
        self.items = []
        for batch in super().__iter__():
            if batch['skipped']:
                yield {'id': [], 'skipped': batch['skipped']}
            first, count = len(self.items), len(batch['id'])
            if count:
                height, width = batch['mask'].shape[1:]
                self.features[first : first + count] = batch['features']
                self.masks[first : first + count] = IGNORE_INDEX  # beyond the images
                self.masks[first : first + count, :height, :width] = batch['mask']
                self.items += zip(batch['shape'], batch['canvas'], batch['id'], strict=True)
            self._check_finite(first)
            yield from self._batches(first, len(self.items))
        self.complete = True

    def _check_finite(self, first):
        """InputError where features from image `first` on overflow float16."""
        finite = self.features[first : len(self.items)].isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            image_id = self.items[first + finite.index(False)][2]
            raise InputError(f'features of validation image {image_id} do not fit half precision; use --val-cache off')

    def _batches(self, first, end):
        """Batches of the images first..end-1."""
        for start in range(first, end, self.images_at_once):
            part = slice(start, min(start + self.images_at_once, end))
            shapes, canvases, image_ids = map(list, zip(*self.items[part], strict=True))
            yield {
                'features': self.features[part].to(self.device, non_blocking=True), 'mask': self.masks[part],
                'shape': shapes, 'canvas': canvases, 'id': image_ids, 'skipped': [],
            }  # fmt: skip


def _allocate(shape, dtype, place, folder, device):
    """An uninitialised tensor: on the GPU, in memory (pinned for a GPU), or mapped to an unlinked temporary file."""
    if place == 'gpu':
        return torch.empty(shape, dtype=dtype, device=device)
    if place == 'memory':
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == 'cuda')
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # reserved at once: a disk that fills up later would end the process without a message
            if hasattr(os, 'posix_fallocate'):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise InputError(
                f'cannot keep {size / GB:.1f} GB of validation features in {folder}: {error.strerror}. '
                'Use --val-cache off or --val-limit.'
            ) from error
        return torch.from_numpy(np.memmap(file, np.uint8, 'r+', shape=(size,))).view(dtype).view(shape)
