"""Lists of image ids: their paths, their content, and how they are made from the masks.

    ROOT/train_list, ROOT/val_list                    one image id a line, without suffix; or, as for other code,
                                                      its files: JPEGImages/ID.jpg SegmentationClassAug/ID.png
    ROOT/fold{F}/train_fold{F}.txt                    images with at least one base class
    ROOT/fold{F}/train_base_class{C}.txt              images in which base class C covers >= min_pixels
    ROOT/fold{F}/train_novel_class{C}.txt             the same for novel class C
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}.txt          support images, K lines per novel class, ascending class id
    ROOT/fold{F}_filter/...                           the same without images that contain novel classes

ROOT is the folder of the train list.
"""

import codecs
import contextlib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from core.errors import InputError, some
from core.files import atomic_write
from core.names import canonical
from core.parallel import parallel_map
from dataset.classes import DatasetSpec
from dataset.images import Samples, check_same_size, read_header

CACHE_NAME = 'class_pixels.npz'  # beside the train list: the pixel counts of all masks read so far
BLANKS = ' \t\r\v\f'  # around a line; other blanks of Unicode are part of a name
# the image of an id and its mask, which may be left out
FILES = re.compile(r'(?P<image>.+?\.(?:jpe?g|png))(?:\s+(?P<mask>.+\.png))?', re.IGNORECASE)


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


def read_ids(
    path: str | Path,
    hint: str = '',
    *,
    folders: tuple[str, str] | None = None,
    allow_empty: bool = False,
    allow_repeats: bool = False,
) -> list[str]:
    """Read a list of image ids.

    Args:
        path: one id a line; blank lines are skipped.
        hint: how to get the list, for the message if it is missing or empty.
        folders: of the images and the masks under --data-dir. A line may then also name the image of an id there, and
            its mask: 'JPEGImages/ID.jpg SegmentationClassAug/ID.png'.
        allow_empty: the list may be empty, like the class list of a rare class.
        allow_repeats: the list may repeat ids, like the support list of a class with few images.

    Returns:
        Ids in list order, in one Unicode form (`names.canonical`). Bytes that are no UTF-8 are kept as surrogates.

    Raises:
        InputError: the list is missing, empty, repeats ids, or holds something else than ids.
    """
    hint = f'; {hint}' if hint else ''
    try:
        lines = _read_lines(path)
    except FileNotFoundError:
        raise InputError(f'list {path} does not exist{hint}') from None
    except (OSError, ValueError) as error:
        raise InputError(f'list {path} cannot be read ({error}); expected a UTF-8 text file of image ids') from None
    if not lines and not allow_empty:
        raise InputError(f'list {path} is empty{hint}')
    ids = [_id_of(line, folders) for line in lines]
    if None in ids:
        raise InputError(_not_ids(path, [line for line, i in zip(lines, ids, strict=True) if i is None], folders))
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated and not allow_repeats:
        raise InputError(f'list {path} names {some(repeated)} more than once; remove the repeats')
    return ids


def _read_lines(path):
    """The lines of a list that are not blank. OSError, or ValueError where it is no text."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell writes lists so
        text = content.decode('utf-16')
    else:
        text = content.removeprefix(codecs.BOM_UTF8).decode('utf-8', 'surrogateescape')
    if '\0' in text:
        raise ValueError('it holds zero bytes')
    # not splitlines: a name may hold what else Unicode takes for the end of a line
    return [line for raw in re.split('[\r\n]', text) if (line := raw.strip(BLANKS))]


def _id_of(line, folders=None):
    """The id that a line of a list means, or None."""
    files = FILES.fullmatch(line.replace('\\', '/'))
    if files and folders and (files['mask'] or '/' in files['image']):
        image_id = PurePosixPath(files['image']).stem
        named = [files['image']] + [files['mask']] * bool(files['mask'])
        there = [PurePosixPath(folders[0], f'{image_id}.jpg'), PurePosixPath(folders[1], f'{image_id}.png')]
        if all(_same_file(*pair) for pair in zip(named, there, strict=False)):
            return canonical(image_id)
    return canonical(line) if _is_id(line) else None


def _same_file(named, expected):
    """Whether a relative or absolute path names an expected file, whatever folder it starts from."""
    return f'/{named}'.endswith(f'/{expected}') or f'/{expected}'.endswith(f'/{named}')


def _is_id(text):
    """Whether a line of a list can be this id. Names of files are none, nor companions that macOS adds ('._a')."""
    is_line = text == text.strip(BLANKS) and not set('\r\n/\0') & set(text)
    return is_line and not FILES.fullmatch(text) and not text.startswith('._')


def _not_ids(path, lines, folders):
    """What a list holds instead of ids, and the command that mends it."""
    if companions := [line for line in lines if line.startswith('._')]:
        return (
            f'list {path} names {some(companions)}: companions that macOS adds to files, no images. Remove them: '
            f"sed -i '/^\\._/d' {shlex.quote(str(path))}"
        )
    expected = 'one image id a line, which is the name without folder and suffix'
    if folders:
        expected += f', or its files as in "{folders[0]}/ID.jpg {folders[1]}/ID.png"'
    return (
        f'list {path} has lines like "{lines[0]}"; expected {expected}. To leave only the ids: '
        f"sed -i -E 's/\\.(jpe?g|png)([[:space:],;].*)?$//I; s|.*[/\\\\]||' {shlex.quote(str(path))}"
    )


def check_ids(path: str | Path, ids: Iterable[str]):
    """Raise InputError where no list can hold an id: line breaks, blanks at its ends, or the look of a file name."""
    if unfit := [image_id for image_id in ids if not _is_id(image_id)]:
        raise InputError(
            f'list {path} cannot hold {some(map(repr, unfit))}; expected names without line breaks, without blanks at '
            'their ends and with one suffix. Rename the files.'
        )


def write_ids(path: str | Path, ids: Iterable[str]):
    """Write a list, one id a line. Raises as `check_ids`."""
    ids = list(ids)
    check_ids(path, ids)
    with atomic_write(path, sync=False) as file:
        file.writelines(f'{image_id}\n' for image_id in ids)


def keep_or_write_ids(path: Path, ids: Sequence[str], overwrite: bool = False) -> str:
    """Write a list unless it exists.

    Returns:
        A message that says what was done, and whether an existing list differs from `ids`.
    """
    if path.is_file() and not overwrite:
        same = [canonical(line) for line in _read_lines(path)] == list(ids)
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
        stamps = np.array(samples.stamps(ids))
        pixels = np.zeros((len(ids), 256), np.int64)
        unread = np.flatnonzero(~_read_cache(cache, ids, stamps, pixels))
        if len(unread):
            count = partial(_count_pixels, samples=samples)
            pixels[unread] = parallel_map(count, [ids[i] for i in unread], 'reading masks', workers)
            _write_cache(cache, ids, stamps, pixels)
        beyond = pixels[:, num_classes + 1 : 255].any(axis=1)
        if beyond.any():
            first = int(beyond.argmax())
            values = num_classes + 1 + np.flatnonzero(pixels[first, num_classes + 1 : 255])
            raise InputError(
                f'{samples.mask_path(ids[first])} holds the values {", ".join(map(str, values))}; expected class ids '
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
        InputError: a mask cannot be used, or an existing list does not fit the fold. No list has been written then.
    """
    folders = spec.folders('train')
    ids = read_ids(train_list, spec.hint, folders=folders)
    index = ClassIndex.from_masks(samples, ids, spec.num_classes, lists.root / CACHE_NAME)
    base, novel = spec.base_ids(lists.fold), spec.novel_ids(lists.fold)
    training = index.without(novel) if lists.filter_novel else index

    # path, ids for a new list, ids that an existing list may hold
    wanted = [(lists.novel_class(c), index.covering(c, spec.min_pixels), index.containing([c])) for c in novel]
    wanted += [(lists.base_class(c), training.covering(c, spec.min_pixels), training.containing([c])) for c in base]
    wanted.append((lists.train, training.containing(base), training.containing(base)))
    # all existing lists are checked before one is written
    present = [None if overwrite else _checked(path, allowed, folders) for path, _, allowed in wanted]
    differing = []
    for (path, made, _), existing in zip(wanted, present, strict=True):
        if existing is None:
            write_ids(path, made)
        elif existing != made:
            differing.append(path)
    return differing


def _checked(path, allowed, folders):
    """The ids of an existing class list, of which each must be allowed; None where it has to be made.

    An empty list is made again too: min_pixels may have been too high before.
    """
    present = read_ids(path, folders=folders, allow_empty=True) if path.is_file() else []
    if foreign := sorted(set(present) - set(allowed)):
        raise InputError(
            f'list {path} names {some(foreign)}, which do not belong there with this data: it is a list of another '
            f'fold or of other data. Remove {path.parent} to make its lists again.'
        )
    return present or None
