"""Validation features of a frozen network: computed once, read ever after by all epochs and seeds of a run."""

import os
import shutil
import tempfile

import numpy as np
import torch

from core.errors import InputError
from engine.distributed import broadcast, local_world_size, world_size
from engine.precision import autocast, to_device

GB = 10**9
SPARE_DISK = 2 * GB  # left free for checkpoints and logs


def cache_features(net, loader, size, device, dtype, args, logger):
    """Wrap a validation loader so that a frozen network's features are computed in its first pass only.

    Args:
        net (POP): what makes the features; only its head may change from now on.
        loader (DataLoader): from `engine.evaluation_loader`.
        size ((int, int)): (H, W) of the images and, at most, of the masks.
        device (torch.device), dtype (torch.dtype): where and in which precision the network runs.
        args (Namespace): val_cache ('auto', 'memory', 'disk' or 'off'), val_cache_gb (of all processes of a host
            together), snapshot_dir.
        logger (RunLogger): is told where the features are, or why they are not kept.

    Returns:
        iterable of batches for `engine.evaluate`: a FeatureCache, or the loader.

    Raises:
        InputError: 'memory' or 'disk' is asked for and not large enough.
    """
    if args.val_cache == 'off':
        return loader
    with torch.no_grad(), autocast(device, dtype):
        shape = net.features(to_device(torch.zeros(1, 3, *size), device)).shape[1:]
    count = -(-len(loader.dataset) // world_size())
    need = count * (2 * int(np.prod(shape)) + int(np.prod(size))) * local_world_size()
    room = {
        'memory': args.val_cache_gb * GB,
        'disk': max(shutil.disk_usage(args.snapshot_dir).free - SPARE_DISK, 0),
    }
    shortage = (
        f'validation features of {len(loader.dataset)} images need {need / GB:.1f} GB; the budget in memory '
        f'(--val-cache-gb) is {room["memory"] / GB:.1f} GB, the free space for them in {args.snapshot_dir} is '
        f'{room["disk"] / GB:.1f} GB'
    )
    places = ('memory', 'disk') if args.val_cache == 'auto' else (args.val_cache,)
    # decided once: a process that reserves its file changes what the next one finds free
    place = broadcast(next((place for place in places if need <= room[place]), None))
    if place is None and args.val_cache != 'auto':
        raise InputError(f'--val-cache {args.val_cache}: {shortage}. Raise the budget, use --val-limit, or auto.')
    if place is None:
        logger.info(f'{shortage}: not kept, every validation computes them anew (--val-limit N validates on fewer)')
        return loader
    logger.info(f'validation features: {len(loader.dataset)} images, {need / GB:.2f} GB, kept in {place}')
    folder = args.snapshot_dir if place == 'disk' else None
    return FeatureCache(net, loader, (count, *shape), (count, *size), device, dtype, folder)


class FeatureCache:
    """Batches of one image with 'features' in place of 'image'; the first pass fills the cache.

    Args:
        net, loader, device, dtype: as in `cache_features`.
        features_shape, masks_shape (tuple of int): [N, C, h, w], kept in float16, and [N, H, W], kept in uint8.
        folder (Path, optional): keep them in files there; without it, in memory.
    """

    def __init__(self, net, loader, features_shape, masks_shape, device, dtype, folder=None):
        self.net, self.loader, self.device, self.dtype = net, loader, device, dtype
        self.features = _allocate(features_shape, torch.float16, folder)
        self.masks = _allocate(masks_shape, torch.uint8, folder)
        self.notes = []  # per image: mask shape, canvas, id
        self.complete = False

    def __len__(self):
        return len(self.loader.sampler)

    def __iter__(self):
        """Yields:
        dict: 'features' float16 [1, C, h, w] on the device; lists of one: 'mask', 'canvas', 'id'.
        """
        if self.complete:
            for i in range(len(self.notes)):
                yield self._item(i)
            return
        self.notes = []
        for batch in self.loader:
            if batch['skipped']:
                yield {'mask': [], 'skipped': batch['skipped']}
            if not batch['mask']:
                continue
            with torch.no_grad(), autocast(self.device, self.dtype):
                features = self.net.features(to_device(batch['image'], self.device))
            for i, mask in enumerate(batch['mask']):
                k = len(self.notes)
                self.features[k] = features[i]
                if not self.features[k].isfinite().all():
                    raise InputError(
                        f'features of validation image {batch["id"][i]} do not fit half precision; use --val-cache off'
                    )
                self.masks[k, : mask.shape[0], : mask.shape[1]] = mask
                self.notes.append((mask.shape, batch['canvas'][i], batch['id'][i]))
                yield self._item(k)
        self.complete = True

    def _item(self, i):
        (height, width), canvas, image_id = self.notes[i]
        features = self.features[i : i + 1].to(self.device, non_blocking=True)
        return {
            'features': features, 'mask': [self.masks[i, :height, :width]], 'canvas': [canvas], 'id': [image_id]
        }  # fmt: skip


def _allocate(shape, dtype, folder):
    """An uninitialised tensor, in memory or mapped to a file that has no name: it goes with the process, however that
    ends."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # reserved at once: a disk that fills up later would end the process without a word
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f'cannot keep {size / GB:.1f} GB of validation features in {folder}: {error.strerror}. '
                'Use --val-cache off or --val-limit.'
            ) from error
        return torch.from_numpy(np.memmap(file, np.uint8, 'r+', shape=(size,))).view(dtype).view(shape)
