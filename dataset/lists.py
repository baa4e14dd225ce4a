"""Image lists: which files there are, what is in them, how they are made from the masks.

    ROOT/train_list, ROOT/val_list                    one image id a line
    ROOT/fold{F}/train_fold{F}.txt                    images with at least one base class
    ROOT/fold{F}/train_base_class{C}.txt              images where base class C covers >= min_pixels
    ROOT/fold{F}/train_novel_class{C}.txt             the same for novel class C
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}.txt          support images, K lines per novel class, ascending class id
    ROOT/fold{F}_filter/...                           the same without images that contain novel classes

ROOT is the folder of the train list.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.segmentation import open_mask
from utils.errors import InputError, some
from utils.files import atomic_write
from utils.parallel import parallel_map

CACHE_NAME = 'class_pixels.npz'  # beside the train list: counts of every mask that was read


@dataclass(frozen=True)
class FoldLists:
    """Paths of one fold's lists.

    Attributes:
        root: folder of the train list.
        fold: -1, 0, 1, ...
        filter_novel: training lists without images that contain novel classes.
    """

    root: Path
    fold: int
    filter_novel: bool = False

    @property
    def _training_folder(self):
        return self.root / f'fold{self.fold}{"_filter" if self.filter_novel else ""}'

    @property
    def train(self):
        return self._training_folder / f'train_fold{self.fold}.txt'

    def base_class(self, class_id):
        return self._training_folder / f'train_base_class{class_id}.txt'

    def novel_class(self, class_id):
        return self.root / f'fold{self.fold}' / f'train_novel_class{class_id}.txt'

    def support(self, shot, seed):
        return self.root / f'fold{self.fold}' / f'fold{self.fold}_{shot}shot_seed{seed}.txt'


def read_ids(path, mend, allow_empty=False, allow_repeats=False):
    """Read a list of image ids.

    Args:
        path (Path): one id a line; blank lines are skipped.
        mend (str): how the list is made, for the message when it is missing.
        allow_empty (bool): class lists of rare classes may be empty.
        allow_repeats (bool): support lists of classes with few images may repeat.

    Raises:
        InputError: missing, empty or doubled.
    """
    try:
        ids = Path(path).read_text().split()
    except FileNotFoundError:
        raise InputError(f'list {path} does not exist; {mend}') from None
    if not ids and not allow_empty:
        raise InputError(f'list {path} is empty; {mend}')
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated and not allow_repeats:
        raise InputError(f'list {path} names {some(repeated)} more than once; remove the repeats')
    return ids


def write_ids(path, ids):
    """Write a list, one id a line."""
    with atomic_write(path) as file:
        file.writelines(f'{image_id}\n' for image_id in ids)


def keep_or_write_ids(path, ids, overwrite=False):
    """Write a list unless it exists.

    Returns:
        str: what was done; says so where the list that exists differs from what would have been written.
    """
    if path.is_file() and not overwrite:
        same = path.read_text().split() == list(ids)
        return f'kept {path}' + ('' if same else f', which differs from what this data gives ({len(ids)} ids)')
    write_ids(path, ids)
    return f'wrote {path}, {len(ids)} ids'


@dataclass(frozen=True)
class ClassIndex:
    """How many pixels of each mask value every training image has.

    Attributes:
        ids: image ids in list order.
        pixels: int64 [N, 256].
    """

    ids: list
    pixels: np.ndarray

    @classmethod
    def from_masks(cls, mask_dir, ids, num_classes, cache=None, workers=None):
        """Count the pixels of every mask, in several processes.

        Args:
            mask_dir (Path): folder of ID.png.
            ids (list of str): image ids.
            num_classes (int): class ids go up to this.
            cache (Path, optional): .npz of earlier counts; masks that have not changed since are not read again.
            workers (int, optional): processes; the number of usable cores by default.

        Raises:
            InputError: a mask is missing, undecodable, colour-coded, or holds a class id out of range.
        """
        paths = [Path(mask_dir) / f'{image_id}.png' for image_id in ids]
        stamps = np.array([_file_stamp(path) for path in paths])
        pixels = np.zeros((len(ids), 256), np.int64)
        known = _read_cache(cache, ids, stamps, pixels)
        unread = np.flatnonzero(~known)
        if len(unread):
            pixels[unread] = parallel_map(_count_pixels, [paths[i] for i in unread], 'reading masks', workers)
            if cache:
                with atomic_write(cache, 'wb') as file:
                    np.savez_compressed(file, ids=np.array(ids), stamps=stamps, pixels=pixels.astype(np.uint32))
        beyond = pixels[:, num_classes + 1 : 255].any(axis=1)
        if beyond.any():
            first = int(beyond.argmax())
            values = num_classes + 1 + np.flatnonzero(pixels[first, num_classes + 1 : 255])
            raise InputError(
                f'{paths[first]} holds the values {", ".join(map(str, values))}; expected class ids 0..{num_classes} '
                f'and 255 (ignored); {beyond.sum()} masks are out of range. Is it a mask of this --dataset?'
            )
        return cls(list(ids), pixels)

    def covering(self, class_id, min_pixels):
        """Ids of the images where a class covers at least `min_pixels`, in list order."""
        return self._select(self.pixels[:, class_id] >= min_pixels)

    def containing(self, class_ids):
        """Ids of the images with at least one pixel of one of the classes, in list order."""
        return self._select(self.pixels[:, list(class_ids)].any(axis=1))

    def without(self, class_ids):
        """The index of the images that show none of the classes."""
        keep = ~self.pixels[:, list(class_ids)].any(axis=1)
        return ClassIndex(self._select(keep), self.pixels[keep])

    def _select(self, keep):
        return [self.ids[i] for i in np.flatnonzero(keep)]


def _count_pixels(path):
    with open_mask(path) as mask:
        return mask.histogram()


def _file_stamp(path):
    """(size, modification time in ns) of a mask; zeros where it is missing, which reading it will report."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _read_cache(cache, ids, stamps, pixels):
    """Fill `pixels` with the counts of unchanged masks; returns which rows are filled, bool [N]."""
    known = np.zeros(len(ids), bool)
    if cache and cache.is_file():
        with np.load(cache) as saved:
            row = {image_id: i for i, image_id in enumerate(saved['ids'].tolist())}
            rows = np.array([row.get(image_id, -1) for image_id in ids])
            known = (rows >= 0) & (saved['stamps'][rows] == stamps).all(axis=1)
            pixels[known] = saved['pixels'][rows[known]]
    return known


def ensure_class_lists(spec, mask_dir, train_list, lists, overwrite=False):
    """Make the class lists of a fold where they are missing; lists that exist are taken as they are, but checked.

    Args:
        spec (DatasetSpec): the dataset.
        mask_dir (Path): the training masks.
        train_list (Path): ids of the training images.
        lists (FoldLists): which fold, and where its lists are.
        overwrite (bool): make them anew.

    Raises:
        InputError: something is wrong with a mask, or a list of training images does not fit the fold.
    """
    ids = read_ids(train_list, spec.mend)
    index = ClassIndex.from_masks(mask_dir, ids, spec.num_classes, lists.root / CACHE_NAME)
    base, novel = spec.base_ids(lists.fold), spec.novel_ids(lists.fold)
    if overwrite or not lists.train.is_file():
        for class_id in novel:
            write_ids(lists.novel_class(class_id), index.covering(class_id, spec.min_pixels))
        training = index.without(novel) if lists.filter_novel else index
        for class_id in base:
            write_ids(lists.base_class(class_id), training.covering(class_id, spec.min_pixels))
        write_ids(lists.train, training.containing(base))  # last: its presence says that the others are there
        return
    mend = f'Remove {lists.train.parent} to have its lists made anew.'
    _check_members(lists.train, index.containing(base), f'shows a base class of fold {lists.fold}', mend)
    for class_id in base:
        if lists.base_class(class_id).is_file():
            _check_members(lists.base_class(class_id), index.containing([class_id]), f'shows class {class_id}', mend)


def _check_members(path, expected, what, mend):
    """Every id of a list that was brought along must be one of `expected`."""
    strangers = sorted(set(read_ids(path, mend, allow_empty=True)).difference(expected))
    if strangers:
        raise InputError(
            f'list {path} names {some(strangers)}, of which none {what} in this data: '
            f'it belongs to another fold or to other data. {mend}'
        )
