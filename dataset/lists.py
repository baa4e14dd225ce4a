"""Lists of image ids: their paths, their content, and how they are made from the masks.

    ROOT/train_list, ROOT/val_list                    one image id a line, without suffix
    ROOT/fold{F}/train_fold{F}.txt                    images with at least one base class
    ROOT/fold{F}/train_base_class{C}.txt              images in which base class C covers >= min_pixels
    ROOT/fold{F}/train_novel_class{C}.txt             the same for novel class C
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}.txt          support images, K lines per novel class, ascending class id
    ROOT/fold{F}_filter/...                           the same without images that contain novel classes

ROOT is the folder of the train list.
"""

import contextlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import InputError, some
from core.files import atomic_write
from core.parallel import parallel_map
from dataset.classes import DatasetSpec
from dataset.images import Samples, check_same_size, open_mask, read_header

CACHE_NAME = 'class_pixels.npz'  # beside the train list: the pixel counts of all masks read so far


@dataclass(frozen=True)
class FoldLists:
    """Paths of one fold's lists.

    Attributes:
        root: folder of the train list.
        fold: -1, 0, 1, ...
        filter_novel: the training lists omit images that contain novel classes.
    """

    root: Path
    fold: int
    filter_novel: bool = False

    @property
    def _training_folder(self) -> Path:
        return self.root / f'fold{self.fold}{"_filter" if self.filter_novel else ""}'

    @property
    def train(self) -> Path:
        """Training images of stage 1."""
        return self._training_folder / f'train_fold{self.fold}.txt'

    def base_class(self, class_id: int) -> Path:
        """Images that stage 2 can replay for a base class."""
        return self._training_folder / f'train_base_class{class_id}.txt'

    def novel_class(self, class_id: int) -> Path:
        """Images that can support a novel class."""
        return self.root / f'fold{self.fold}' / f'train_novel_class{class_id}.txt'

    def support(self, shot: int, seed: int) -> Path:
        """Support images of a draw."""
        return self.root / f'fold{self.fold}' / f'fold{self.fold}_{shot}shot_seed{seed}.txt'


def read_ids(path: str | Path, hint: str = '', *, allow_empty: bool = False, allow_repeats: bool = False) -> list[str]:
    """Read a list of image ids.

    Args:
        path: one id a line; blank lines are skipped.
        hint: how to get the list, for the message if it is missing or empty.
        allow_empty: the list may be empty, like the class list of a rare class.
        allow_repeats: the list may repeat ids, like the support list of a class with few images.

    Raises:
        InputError: the list is missing, empty, repeats ids, or holds file names instead of ids.
    """
    hint = f'; {hint}' if hint else ''
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()  # some editors write a byte order mark
        ids = [line.strip() for line in lines if line.strip()]
    except FileNotFoundError:
        raise InputError(f'list {path} does not exist{hint}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'list {path} cannot be read ({error}); expected a UTF-8 text file of image ids') from None
    if not ids and not allow_empty:
        raise InputError(f'list {path} is empty{hint}')
    if columns := [line for line in ids if len(line.split()) > 1 or '/' in line]:
        raise InputError(f'list {path} has lines like "{columns[0]}"; expected one image id a line, without folders')
    if named := [image_id for image_id in ids if image_id.lower().endswith(('.jpg', '.jpeg', '.png'))]:
        raise InputError(
            f'list {path} names files ({some(named)}); expected ids, which are the names without their suffix: '
            f"sed -i -E 's/\\.[A-Za-z]+\\s*$//' {path}"
        )
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated and not allow_repeats:
        raise InputError(f'list {path} names {some(repeated)} more than once; remove the repeats')
    return ids


def write_ids(path: str | Path, ids: Iterable[str]):
    """Write a list, one id a line."""
    with atomic_write(path, sync=False) as file:
        file.writelines(f'{image_id}\n' for image_id in ids)


def keep_or_write_ids(path: Path, ids: Sequence[str], overwrite: bool = False) -> str:
    """Write a list unless it exists.

    Returns:
        A message that says what was done, and whether an existing list differs from `ids`.
    """
    if path.is_file() and not overwrite:
        same = path.read_text().split() == list(ids)
        return f'kept {path}' + ('' if same else f', which differs from the list that this data gives ({len(ids)} ids)')
    write_ids(path, ids)
    return f'wrote {path}, {len(ids)} ids'


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
        num_classes: int,
        cache: Path | None = None,
        workers: int | None = None,
    ) -> 'ClassIndex':
        """Count the pixels of every mask, in several processes.

        Args:
            samples: reads the images and masks.
            ids: image ids.
            num_classes: the largest class id.
            cache: .npz file of earlier counts. Masks whose files have not changed since are not read again.
            workers: number of processes; default: one per usable core.

        Raises:
            InputError: a mask is missing, cannot be decoded, is colour-coded, differs in size from its image, or holds
                a class id out of range.
        """
        paths = [(samples.image_path(image_id), samples.mask_path(image_id)) for image_id in ids]
        stamps = np.array([_file_stamp(image) + _file_stamp(mask) for image, mask in paths])
        pixels = np.zeros((len(ids), 256), np.int64)
        unread = np.flatnonzero(~_read_cache(cache, ids, stamps, pixels))
        if len(unread):
            pixels[unread] = parallel_map(_count_pixels, [paths[i] for i in unread], 'reading masks', workers)
            _write_cache(cache, ids, stamps, pixels)
        beyond = pixels[:, num_classes + 1 : 255].any(axis=1)
        if beyond.any():
            first = int(beyond.argmax())
            values = num_classes + 1 + np.flatnonzero(pixels[first, num_classes + 1 : 255])
            raise InputError(
                f'{paths[first][1]} holds the values {", ".join(map(str, values))}; expected class ids '
                f'0..{num_classes} and 255 (ignored). Masks with such values: {beyond.sum()}. Are these masks of this '
                '--dataset?'
            )
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


def _count_pixels(paths):
    """Histogram of a mask, after a comparison of its size with that in its image's header."""
    image_path, mask_path = paths
    with open_mask(mask_path) as mask:
        check_same_size(image_path, read_header(image_path)[0], mask_path, mask.size)
        return mask.histogram()


def _file_stamp(path):
    """(size, modification time in ns) of a file; zeros if it is missing, which is reported when it is read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


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
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # the cache is damaged: count all pixels again
    return known


def _write_cache(cache, ids, stamps, pixels):
    if cache:
        # the folder of existing lists may be read-only; the next run then counts the pixels again
        with contextlib.suppress(InputError), atomic_write(cache, 'wb') as file:
            np.savez_compressed(file, ids=np.array(ids), stamps=stamps, pixels=pixels.astype(np.uint32))


def ensure_class_lists(
    spec: DatasetSpec, samples: Samples, train_list: Path, lists: FoldLists, overwrite: bool = False
) -> list[Path]:
    """Make the missing class lists of a fold. Existing lists are checked and kept.

    Args:
        spec: the dataset.
        samples: the training images and masks.
        train_list: ids of the training images.
        lists: paths of the fold's lists.
        overwrite: make existing lists again.

    Returns:
        Existing lists that differ from those that this data and `min_pixels` give.

    Raises:
        InputError: a mask cannot be used, or an existing list does not fit the fold.
    """
    ids = read_ids(train_list, spec.hint)
    index = ClassIndex.from_masks(samples, ids, spec.num_classes, lists.root / CACHE_NAME)
    base, novel = spec.base_ids(lists.fold), spec.novel_ids(lists.fold)
    training = index.without(novel) if lists.filter_novel else index

    # path, ids for a new list, ids that an existing list may hold
    wanted = [(lists.novel_class(c), index.covering(c, spec.min_pixels), index.containing([c])) for c in novel]
    wanted += [(lists.base_class(c), training.covering(c, spec.min_pixels), training.containing([c])) for c in base]
    wanted.append((lists.train, training.containing(base), training.containing(base)))
    return [path for path, made, allowed in wanted if not _ensure_list(path, made, allowed, overwrite)]


def _ensure_list(path, made, allowed, overwrite):
    """Write a class list unless it exists. Returns whether the list now is `made`; an existing one may differ."""
    present = read_ids(path, allow_empty=True) if path.is_file() and not overwrite else []
    if not present:  # an empty list is made again too: min_pixels may have been too high before
        write_ids(path, made)
        return True
    if foreign := sorted(set(present) - set(allowed)):
        raise InputError(
            f'list {path} names {some(foreign)}, which do not belong there with this data: it is a list of another '
            f'fold or of other data. Remove {path.parent} to make its lists again.'
        )
    return present == made
