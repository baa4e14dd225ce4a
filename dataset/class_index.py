"""How many pixels of each mask value every image of a list has: counted once, and kept beside the list."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import atomic_write
from core.parallel import parallel_map
from dataset.images import Samples, check_same_size, read_header
from dataset.labels import INVALID
from dataset.masks import wrong_values

CACHE_NAME = 'class_pixels.npz'  # beside the train list: the pixel counts of all masks read so far


@dataclass(frozen=True)
class ClassIndex:
    """Pixel counts of all mask values, for each image of a list.

    Attributes:
        ids: image ids in list order.
        pixels: int64 [N, 256], pixels of each mask value.
    """

    ids: list[str]
    pixels: np.ndarray

    @classmethod
    def from_masks(
        cls,
        samples: Samples,
        ids: Sequence[str],
        cache: Path | None = None,
        workers: int | None = None,
    ) -> 'ClassIndex':
        """Count the pixels of every mask, in several processes.

        Args:
            samples: reads the images and masks.
            ids: image ids.
            cache: .npz file of earlier counts. Masks whose files have not changed since are not read again.
            workers: number of processes; default: one per usable core.

        Raises:
            InputError: a mask is missing, cannot be decoded, is colour-coded, differs in size from its image, or holds
                a value that the table of `samples` does not know.
        """
        stamps = np.array(samples.stamps(ids))
        pixels = np.zeros((len(ids), 256), np.int64)
        unread = np.flatnonzero(~_read_cache(cache, ids, stamps, pixels))
        if len(unread):
            count = partial(_count_pixels, samples=samples)
            pixels[unread] = parallel_map(count, [ids[i] for i in unread], 'reading masks', workers)
            _write_cache(cache, ids, stamps, pixels)
        beyond = (pixels > 0)[:, samples.table == INVALID].any(axis=1)
        if beyond.any():
            first = int(beyond.argmax())
            error = wrong_values(samples.mask_path(ids[first]), np.flatnonzero(pixels[first]), samples.table)
            raise InputError(f'{error} Masks with such values: {beyond.sum()}.')
        return cls(list(ids), pixels)

    def covering(self, class_id: int, min_pixels: int) -> list[str]:
        """Ids of the images in which a class covers at least `min_pixels`, in list order."""
        return self._select(self.pixels[:, class_id] >= min_pixels)

    def containing(self, class_ids: Iterable[int]) -> list[str]:
        """Ids of the images with at least one pixel of one of the classes, in list order."""
        return self._select(self.pixels[:, list(class_ids)].any(axis=1))

    def without(self, class_ids: Iterable[int]) -> 'ClassIndex':
        """The index of the images without any of the classes."""
        keep = ~self.pixels[:, list(class_ids)].any(axis=1)
        return ClassIndex(self._select(keep), self.pixels[keep])

    def _select(self, keep):
        return [self.ids[i] for i in np.flatnonzero(keep)]


def _count_pixels(image_id, samples):
    """Histogram of a mask, after a comparison of its size with that in its image's header."""
    image_path = samples.image_path(image_id)
    with samples.open_mask(image_id) as mask:
        check_same_size(image_path, read_header(image_path)[0], samples.mask_path(image_id), mask.size)
        return mask.histogram()


def _read_cache(cache, ids, stamps, pixels):
    """Fill the rows of `pixels` that belong to unchanged files. Returns which rows these are, bool [N]."""
    known = np.zeros(len(ids), bool)
    if cache and cache.is_file():
        try:
            with np.load(cache) as saved:
                row = {image_id: i for i, image_id in enumerate(saved['ids'].tolist())}
                rows = np.array([row.get(image_id, -1) for image_id in ids])
                same = (rows >= 0) & (saved['stamps'][rows] == stamps).all(axis=1)
                pixels[same] = saved['pixels'][rows[same]]
                known = same
        except Exception:  # NumPy and zipfile raise many types
            pass  # the cache is damaged: count all pixels again
    return known


def _write_cache(cache, ids, stamps, pixels):
    if cache:
        # the folder of existing lists may be read-only; the next run then counts the pixels again
        with contextlib.suppress(InputError), atomic_write(cache, 'wb') as file:
            np.savez_compressed(file, ids=np.array(ids), stamps=stamps, pixels=pixels.astype(np.uint32))
