"""Validation features of a frozen network: computed once, read by every later validation of all epochs and seeds."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from core.errors import InputError
from core.ranks import local_world_size, world_size
from engine.distributed import broadcast
from engine.precision import autocast, to_device

GB = 10**9
SPARE_DISK = 2 * GB  # left free for checkpoints and logs


def cache_features(
    frozen: nn.Module,
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
        loader: from `loaders.evaluation_loader`.
        size: (H, W) of the images and, at most, of the masks.
        device, dtype: where and in which precision the network runs.
        place: 'auto' (in memory within the budget, else on disk, else not kept), 'memory', 'disk' or 'off'.
        budget_gb: memory for the features of all processes of a host together, in 10^9 bytes.
        folder: where they are kept on disk.
        log: is told where the features are, or why they are not kept.

    Returns:
        Batches for `evaluation.evaluate`.

    Raises:
        InputError: 'memory' or 'disk' is asked for and not large enough.
    """
    features = FrozenFeatures(frozen, loader, device, dtype)
    if place == 'off':
        return features
    with torch.no_grad(), autocast(device, dtype):
        shape = frozen.features(to_device(torch.zeros(1, 3, *size), device)).shape[1:]
    count = -(-len(loader.dataset) // world_size())
    need = count * (2 * int(np.prod(shape)) + int(np.prod(size))) * local_world_size()
    room = {'memory': budget_gb * GB, 'disk': max(shutil.disk_usage(folder).free - SPARE_DISK, 0)}
    shortage = (
        f'validation features of {len(loader.dataset)} images need {need / GB:.1f} GB; the budget in memory '
        f'(--val-cache-gb) is {room["memory"] / GB:.1f} GB, the free space for them in {folder} is '
        f'{room["disk"] / GB:.1f} GB'
    )
    places = ('memory', 'disk') if place == 'auto' else (place,)
    # decided once: a process that reserves its file changes what the next one finds free
    chosen = broadcast(next((place for place in places if need <= room[place]), None))
    if chosen is None and place != 'auto':
        raise InputError(f'--val-cache {place}: {shortage}. Raise the budget, use --val-limit, or auto.')
    if chosen is None:
        log(f'{shortage}: not kept, every validation computes them anew (--val-limit N validates on fewer)')
        return features
    log(f'validation features: {len(loader.dataset)} images, {need / GB:.2f} GB, kept in {chosen}')
    folder = folder if chosen == 'disk' else None
    return CachedFeatures(frozen, loader, device, dtype, (count, *shape), (count, *size), folder)


class FrozenFeatures:
    """Batches of validation features, computed anew in each pass.

    Args:
        frozen, loader, device, dtype: as in `cache_features`.
    """

    def __init__(self, frozen: nn.Module, loader: DataLoader, device: torch.device, dtype: torch.dtype):
        self.frozen, self.loader, self.device, self.dtype = frozen, loader, device, dtype

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        """Yield the loader's batches with 'features' [B, C, h, w] on the device in place of 'image'."""
        for batch in self.loader:
            if batch['mask']:
                with torch.no_grad(), autocast(self.device, self.dtype):
                    batch['features'] = self.frozen.features(to_device(batch.pop('image'), self.device))
            yield batch


class CachedFeatures(FrozenFeatures):
    """Batches of one image with its features; the first pass fills the cache.

    Args:
        features_shape, masks_shape: [N, C, h, w], kept in float16, and [N, H, W], kept in uint8.
        folder: keep them in unlinked temporary files there; without it, in memory.
    """

    def __init__(
        self,
        frozen: nn.Module,
        loader: DataLoader,
        device: torch.device,
        dtype: torch.dtype,
        features_shape: tuple[int, ...],
        masks_shape: tuple[int, ...],
        folder: Path | None = None,
    ):
        super().__init__(frozen, loader, device, dtype)
        self.features = _allocate(features_shape, torch.float16, folder)
        self.masks = _allocate(masks_shape, torch.uint8, folder)
        self.items = []  # per image: mask shape, canvas, id
        self.complete = False

    def __len__(self) -> int:
        return len(self.loader.sampler)

    def __iter__(self) -> Iterator[dict]:
        """Yield {'features': float16 [1, C, h, w] on the device, 'mask', 'canvas', 'id': lists of one}."""
        if self.complete:
            yield from map(self._batch, range(len(self.items)))
            return
        self.items = []
        for batch in super().__iter__():
            if batch['skipped']:
                yield {'mask': [], 'skipped': batch['skipped']}
            for i, mask in enumerate(batch['mask']):
                k = len(self.items)
                self.features[k] = batch['features'][i]
                if not self.features[k].isfinite().all():
                    raise InputError(
                        f'features of validation image {batch["id"][i]} do not fit half precision; use --val-cache off'
                    )
                self.masks[k, : mask.shape[0], : mask.shape[1]] = mask
                self.items.append((mask.shape, batch['canvas'][i], batch['id'][i]))
                yield self._batch(k)
        self.complete = True

    def _batch(self, i):
        (height, width), canvas, image_id = self.items[i]
        features = self.features[i : i + 1].to(self.device, non_blocking=True)
        mask = self.masks[i, :height, :width]
        return {'features': features, 'mask': [mask], 'canvas': [canvas], 'id': [image_id]}


def _allocate(shape, dtype, folder):
    """An uninitialised tensor in memory, or mapped to an unlinked temporary file, which ends with the process."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # reserved at once: a disk that fills up later would end the process without a message
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f'cannot keep {size / GB:.1f} GB of validation features in {folder}: {error.strerror}. '
                'Use --val-cache off or --val-limit.'
            ) from error
        return torch.from_numpy(np.memmap(file, np.uint8, 'r+', shape=(size,))).view(dtype).view(shape)
