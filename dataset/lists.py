"""Image lists: which files there are, what is in them, how they are made from the masks.

    ROOT/train_list, ROOT/val_list                    one image id a line
    ROOT/fold{F}/train_fold{F}.txt                    images with at least one base class
    ROOT/fold{F}/train_base_class{C}.txt              images where base class C covers >= min_pixels
    ROOT/fold{F}/train_novel_class{C}.txt             the same for novel class C
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}.txt          support images, K lines per novel class, ascending class id
    ROOT/fold{F}_filter/...                           the same without images that contain novel classes

ROOT is the folder of the train list.
"""

import contextlib
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import InputError, some
from core.files import atomic_write
from core.parallel import parallel_map
from dataset.images import check_same_size, open_mask, read_header

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
        InputError: missing, empty, doubled, or file names rather than ids.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()  # some editors begin files with a mark
        ids = [line.strip() for line in lines if line.strip()]
    except FileNotFoundError:
        raise InputError(f'list {path} does not exist; {mend}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'list {path} cannot be read ({error}); expected a UTF-8 text file of image ids') from None
    if not ids and not allow_empty:
        raise InputError(f'list {path} is empty; {mend}')
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


def write_ids(path, ids):
    """Write a list, one id a line."""
    with atomic_write(path, sync=False) as file:
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
    def from_masks(cls, samples, ids, num_classes, cache=None, workers=None):
        """Count the pixels of every mask, in several processes.

        Args:
            samples (Samples): where the images and masks are.
            ids (list of str): image ids.
            num_classes (int): class ids go up to this.
            cache (Path, optional): .npz of earlier counts; files that have not changed since are not read again.
            workers (int, optional): processes; the number of usable cores by default.

        Raises:
            InputError: a mask is missing, undecodable, colour-coded, of another size than its image, or holds a class
                id out of range.
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
                f'0..{num_classes} and 255 (ignored); {beyond.sum()} such masks. Is it a mask of this --dataset?'
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


def _count_pixels(paths):
    """Histogram of a mask, after a look at the size in its image's header."""
    image_path, mask_path = paths
    with open_mask(mask_path) as mask:
        check_same_size(image_path, read_header(image_path)[0], mask_path, mask.size)
        return mask.histogram()


def _file_stamp(path):
    """(size, modification time in ns) of a file; zeros where it is missing, which reading it will report."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _read_cache(cache, ids, stamps, pixels):
    """Fill `pixels` with the counts of unchanged files; returns which rows are filled, bool [N]."""
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
            pass  # a damaged cache is no cache
    return known


def _write_cache(cache, ids, stamps, pixels):
    if cache:
        # lists that exist may lie where nothing can be written; then the counts are made again next time
        with contextlib.suppress(InputError), atomic_write(cache, 'wb') as file:
            np.savez_compressed(file, ids=np.array(ids), stamps=stamps, pixels=pixels.astype(np.uint32))


def ensure_class_lists(spec, samples, train_list, lists, overwrite=False):
    """Make each class list of a fold where it is missing; lists that exist are taken as they are, but checked.

    Args:
        spec (DatasetSpec): the dataset.
        samples (Samples): the training images and masks.
        train_list (Path): ids of the training images.
        lists (FoldLists): which fold, and where its lists are.
        overwrite (bool): make them anew.

    Returns:
        list of Path: lists that were there and that this data and `min_pixels` would not give.

    Raises:
        InputError: something is wrong with a mask, or a list does not fit the fold.
    """
    ids = read_ids(train_list, spec.mend)
    index = ClassIndex.from_masks(samples, ids, spec.num_classes, lists.root / CACHE_NAME)
    base, novel = spec.base_ids(lists.fold), spec.novel_ids(lists.fold)
    training = index.without(novel) if lists.filter_novel else index

    differing = []

    def ensure(path, made, allowed):
        present = read_ids(path, '', allow_empty=True) if path.is_file() and not overwrite else []
        if not present:  # an empty list, too, is made anew: min_pixels may have been too high
            write_ids(path, made)
            return
        if present != made:
            differing.append(path)
        if strangers := sorted(set(present) - set(allowed)):
            raise InputError(
                f'list {path} names {some(strangers)}, which in this data do not belong there: it is a list of another '
                f'fold or of other data. Remove {path.parent} to have its lists made anew.'
            )

    for class_id in novel:
        ensure(lists.novel_class(class_id), index.covering(class_id, spec.min_pixels), index.containing([class_id]))
    for class_id in base:
        made = training.covering(class_id, spec.min_pixels)
        ensure(lists.base_class(class_id), made, training.containing([class_id]))
    ensure(lists.train, training.containing(base), training.containing(base))
    return differing
