"""Lists of image ids: their paths, their content, and how they are made from the masks.

    ROOT/train_list, ROOT/val_list                    one image id a line; or, as for other code, the name of its
                                                      photograph, or both files: images/ID.jpg masks/ID.png
    ROOT/fold{F}/train_fold{F}.txt                    images with at least one base class
    ROOT/fold{F}/train_base_class{C}.txt              images in which base class C covers >= min_pixels
    ROOT/fold{F}/train_novel_class{C}.txt             the same for novel class C
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}.txt          support images, K lines per novel class, ascending class id
    ROOT/fold{F}/fold{F}_{K}shot_seed{S}_nested.txt   the same, of nested draws
    ROOT/fold{F}_filter/...                           the same without images that contain novel classes

ROOT is the folder of the train list.
"""

import codecs
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from core.errors import InputError, some
from core.files import atomic_write
from core.names import canonical
from dataset.class_index import CACHE_NAME, ClassIndex
from dataset.formats import SUFFIXES
from dataset.images import Samples
from dataset.spec import DatasetSpec

BLANKS = ' \t\r\v\f'  # around a line; other blanks of Unicode are part of a name
# the image of an id and its mask, which may be left out
FILES = re.compile(
    rf'(?P<image>.+?(?:{"|".join(map(re.escape, SUFFIXES))}))(?:[\s,;]+(?P<mask>.+\.png))?', re.IGNORECASE
)


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

    def support(self, shot: int, seed: int, nested: bool = False) -> Path:
        """Support images of a draw (`fewshot.draw_support`), or of a nested one (`fewshot.draw_nested_support`)."""
        name = f'fold{self.fold}_{shot}shot_seed{seed}{"_nested" if nested else ""}.txt'
        return self.root / f'fold{self.fold}' / name


def read_ids(
    path: str | Path,
    hint: str = '',
    *,
    folders: tuple[str, str] | None = None,
    samples: Samples | None = None,
    allow_empty: bool = False,
    allow_repeats: bool = False,
) -> list[str]:
    """Read a list of image ids.

    Args:
        path: one id a line; blank lines are skipped.
        hint: how to get the list, for the message if it is missing or empty.
        folders: of the images and the masks under --data-dir. A line may then also name the image of an id there, and
            its mask: 'JPEGImages/ID.jpg SegmentationClassAug/ID.png'.
        samples: finds the files of an id. A line may then also name files as they are elsewhere, if those of the same
            id exist here.
        allow_empty: the list may be empty, like the class list of a rare class.
        allow_repeats: the list may repeat ids, like the support list of a class with few images.

    Returns:
        Ids in list order, in one Unicode form (`names.canonical`). Bytes that are no UTF-8 are kept as surrogates.

    Raises:
        InputError: the list is missing, empty, repeats ids, or holds something else than ids.
    """
    hint = f'; {hint}' if hint else ''
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise InputError(f'list {path} does not exist{hint}') from None
    except (OSError, ValueError) as error:
        raise InputError(f'list {path} cannot be read ({error}); expected a UTF-8 text file of image ids') from None
    if not lines and not allow_empty:
        raise InputError(f'list {path} is empty{hint}')
    ids = [id_of(line, folders, samples) for line in lines]
    if None in ids:
        raise InputError(_not_ids(path, [line for line, i in zip(lines, ids, strict=True) if i is None], folders))
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated and not allow_repeats:
        raise InputError(f'list {path} names {some(repeated)} more than once; remove the repeats')
    return ids


def read_lines(path: str | Path) -> list[str]:
    """The lines of a list that are not blank; as `numbered_lines`."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not blank, in any encoding of text. OSError; ValueError for no text."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell writes lists so
        text = content.decode('utf-16')
    else:
        text = content.removeprefix(codecs.BOM_UTF8).decode('utf-8', 'surrogateescape')
    if '\0' in text:
        raise ValueError('it holds zero bytes')
    # not splitlines: a name may hold what else Unicode takes for the end of a line
    lines = enumerate(re.split('\r\n|\r|\n', text), 1)
    return [(number, line) for number, raw in lines if (line := raw.strip(BLANKS))]


def id_of(line, folders=None, samples=None):
    """The id that a line of a list means, or None; `folders` and `samples` as in `read_ids`."""
    files = FILES.fullmatch(line.replace('\\', '/'))
    if not files:
        return canonical(line) if _is_id(line) else None
    image_id = canonical(PurePosixPath(files['image']).stem)
    named = [PurePosixPath(path) for path in files.groups() if path]
    if any(canonical(path.stem) != image_id for path in named):
        return None
    is_path = files['mask'] or '/' in files['image']
    if folders and is_path and all(_same_file(*pair) for pair in zip(named, folders, strict=False)):
        return image_id
    if samples:
        here = [samples.image_path(image_id), samples.mask_path(image_id)]
        if all(path.is_file() for path in here) and not _are_others(named, here):
            return image_id
    return None


def _same_file(named, folder):
    """Whether a relative or absolute path names a file in an expected folder, whatever folder it starts from."""
    expected = f'/{PurePosixPath(folder, named.name)}'
    return f'/{named}'.endswith(expected) or expected.endswith(f'/{named}')


def _are_others(named, here):
    """Whether one of the paths in a list leads to another file than those `here`, from a folder that holds them."""
    return any(
        os.path.exists(folder / name) and not os.path.samefile(folder / name, path)
        for name, path in zip(named, here, strict=False)
        for folder in path.parents
    )


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
    suffixes = '|'.join(suffix[1:] for suffix in SUFFIXES)
    return (
        f'list {path} has lines like "{lines[0]}"; expected {expected}. To leave only the ids: '
        f"sed -i -E 's/\\.({suffixes})([[:space:],;].*)?$//I; s|.*[/\\\\]||' {shlex.quote(str(path))}"
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
        same = [canonical(line) for line in read_lines(path)] == list(ids)
        differs = f', which differs from the list that this data gives ({len(ids)} ids); --overwrite replaces it'
        return f'kept {path}' + ('' if same else differs)
    write_ids(path, ids)
    return f'wrote {path}, {len(ids)} ids'


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
    where = {'folders': spec.folders('train'), 'samples': samples}
    ids = read_ids(train_list, spec.hint, **where)
    index = ClassIndex.from_masks(samples, ids, lists.root / CACHE_NAME)
    base, novel = spec.base_ids(lists.fold), spec.novel_ids(lists.fold)
    training = index.without(novel) if lists.filter_novel else index

    # path, ids for a new list, ids that an existing list may hold
    wanted = [(lists.novel_class(c), index.covering(c, spec.min_pixels), index.containing([c])) for c in novel]
    wanted += [(lists.base_class(c), training.covering(c, spec.min_pixels), training.containing([c])) for c in base]
    wanted.append((lists.train, training.containing(base), training.containing(base)))
    # all existing lists are checked before one is written
    present = [None if overwrite else _checked(path, allowed, where) for path, _, allowed in wanted]
    differing = []
    for (path, made, _), existing in zip(wanted, present, strict=True):
        if existing is None:
            write_ids(path, made)
        elif existing != made:
            differing.append(path)
    return differing


def _checked(path, allowed, where):
    """The ids of an existing class list, of which each must be allowed; None where it has to be made.

    An empty list is made again too: min_pixels may have been too high before.
    """
    present = read_ids(path, **where, allow_empty=True) if path.is_file() else []
    if foreign := sorted(set(present) - set(allowed)):
        raise InputError(
            f'list {path} names {some(foreign)}, which do not belong there with this data: it is a list of another '
            f'fold or of other data. Remove {path.parent} to make its lists again.'
        )
    return present or None
