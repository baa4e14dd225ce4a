"""Classes of one's own: photographs with masks in a folder for each class, named after it.

FOLDER/scooter/IMG_1.jpg    a photograph: JPEG, PNG, WebP, BMP or TIFF
FOLDER/scooter/IMG_1.png    its mask: any pixel that is not zero is the class
FOLDER/scooter/IMG_2.png    a photograph that is itself a PNG
FOLDER/scooter/IMG_2_mask.png

Or photographs whose masks show several classes: a folder with a card, `dataset.yaml` (`cards`).
"""

import dataclasses
import difflib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core import IGNORE_INDEX
from core.errors import InputError, some
from core.names import canonical, is_companion, printable
from dataset.cards import FILE_NAME
from dataset.classes import find_dataset
from dataset.fold import FoldData
from dataset.formats import SUFFIXES
from dataset.images import check_same_size, read_image
from dataset.labels import label_table
from dataset.legend import Legend
from dataset.masks import read_binary_mask
from dataset.spec import MAX_CLASSES
from dataset.transforms import resize_to_fit

MASK_ENDING = '_mask'
MOST_COVERED, MOST_OF_BORDER = 0.9, 0.75  # by a class; more is unusual, and usual for a mask that is inverted
FEW_VALUES = 20  # of a mask that may show several classes
LAYOUT = 'expected FOLDER/CLASS/IMG.jpg with its mask FOLDER/CLASS/IMG.png, one sub-folder per class, named after it'


@dataclass(frozen=True)
class SupportImage:
    """A photograph that shows a class, and where.

    Attributes:
        name: of the file.
        image: RGB uint8 [H, W, 3].
        mask: uint8 [H, W], 1 where it shows the class, 255 where another class that is taught or nothing known, 0
            elsewhere.
        values: those of its file but zero, where they are known.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    values: Sequence[int] = ()


def find_support(folder: Path) -> tuple[dict[str, list[tuple[Path, Path]]], list[str]]:
    """Find photographs and masks of classes.

    Args:
        folder: as above.

    Returns:
        Class name -> its photographs with their masks, by name; and the names of what else is there.

    Raises:
        InputError: there is no such folder, it holds no class, or a file of a class has no partner.
    """
    try:
        inside = sorted(path for path in folder.iterdir() if not is_companion(path.name))
    except OSError as error:
        raise InputError(f'--support {folder}: {error.strerror}; {LAYOUT}') from error
    classes, others = {}, []
    for path in inside:
        name = printable(canonical(path.name)).strip()
        if not path.is_dir():
            others.append(path.name)
        elif name in classes:
            raise InputError(f'{folder} holds two folders for the class {name!r}; put their files into one')
        else:
            classes[name], strange = _find_pairs(path)
            others += [f'{path.name}/{other}' for other in strange]
    if not classes:
        raise InputError(f'{folder} holds no folder of a class, but {some(others) or "nothing"}; {LAYOUT}')
    return classes, others


def _find_pairs(folder):
    """Photographs of a class with their masks, and the names of other files."""
    try:
        files = sorted(path for path in folder.iterdir() if not is_companion(path.name))
    except OSError as error:
        raise InputError(f'{folder} cannot be read: {error.strerror}. Check its permissions.') from error
    images = [path for path in files if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    others = sorted({path.name for path in files} - {path.name for path in images})
    pngs = {canonical(path.stem): path for path in images if path.suffix.lower() == '.png'}
    masks = {stem: path for stem, path in pngs.items() if stem.endswith(MASK_ENDING)}
    photographs = {}
    for path in images:
        stem = canonical(path.stem)
        if path.suffix.lower() == '.png' and (stem in masks or stem + MASK_ENDING not in masks):
            continue  # a mask
        if stem in photographs:
            raise InputError(
                f'{photographs[stem]} and {path} differ by their suffix only; remove or rename one of them'
            )
        photographs[stem] = path
    pairs, partners = [], {}
    for stem, path in photographs.items():
        mask = masks.get(stem + MASK_ENDING) or pngs.get(stem)
        if mask is None:
            lossy = ''
            if stem.endswith(MASK_ENDING):
                lossy = '. If it is a mask itself: masks must be PNG files, as other formats change their values'
            raise InputError(
                f'photograph {path} has no mask; expected {folder / stem}.png or {folder / stem}{MASK_ENDING}.png, '
                f'with any value but zero where it shows the class{lossy}'
            )
        partners[mask] = path
        pairs.append((path, mask))
    if alone := [path for path in pngs.values() if path not in partners and path not in photographs.values()]:
        raise InputError(
            f'{alone[0]} is alone: a mask has the name of its photograph, and the mask of a photograph that is a '
            f'PNG itself ends with {MASK_ENDING}.png'
        )
    if not pairs:
        raise InputError(f'{folder} holds no photograph, but {some(others) or "nothing"}; {LAYOUT}')
    return pairs, others


def read_support(photograph: Path, mask: Path, size: tuple[int, int]) -> SupportImage:
    """Read a photograph, as it is displayed, and its mask, and resize both to fit (H, W).

    Raises:
        InputError: a file cannot be read, their sizes differ, or the mask shows everything, or nothing, also after the
            resizing.
    """
    image, (shown, values) = read_image(photograph), read_binary_mask(mask)
    check_same_size(photograph, image.shape[1::-1], mask, shown.shape[::-1])
    if not shown.any():
        raise InputError(
            f'mask {mask} is empty: all its pixels are zero. Give the pixels of the class any other value, or remove '
            'the photograph.'
        )
    if shown.all():
        raise InputError(
            f'mask {mask} has no pixel that is zero, so the class would cover the whole photograph. Is the background '
            'stored as another value, or is the mask inverted? Zero is all that is not the class.'
        )
    image, fitted = resize_to_fit(image, shown.astype(np.uint8), size)
    if not fitted.any():
        raise InputError(
            f"mask {mask} shows the class with {int(shown.sum())} pixels, of which none is left at the network's size "
            f'of {size[0]}x{size[1]}. Cut out a part of the photograph and of its mask.'
        )
    return SupportImage(printable(photograph.name), image, fitted, values)


def read_support_folder(folder: Path, size: tuple[int, int]) -> tuple[dict[str, list[SupportImage]], list[str]]:
    """Read all photographs and masks of classes, resized to fit (H, W).

    Args:
        folder: with a sub-folder for each class, or with a card.
        size: (H, W).

    Returns:
        Class name -> its photographs; and names of what is left out.

    Raises:
        InputError: what is wrong with the folder, or with a file.
    """
    if (folder / FILE_NAME).is_file():
        return read_described_support(folder, size)
    found, others = find_support(folder)
    return {name: [read_support(*pair, size) for pair in pairs] for name, pairs in found.items()}, others


def read_described_support(folder: Path, size: tuple[int, int]) -> tuple[dict[str, list[SupportImage]], list[str]]:
    """Read the photographs of the training list of a card, whose masks may show several classes.

    Its novel classes are taught, or all classes where it names no novel ones. What masks call background or another
    class is 0, as in a mask of one class. As in data sets, fewer pixels than `min_pixels` of a class are no support.

    Args, returns and errors: as `read_support_folder`.
    """
    spec = find_dataset(str(folder))
    if len(spec.folds) > 1:
        raise InputError(f'{spec.card} has {len(spec.folds)} folds; name the classes to teach: novel: [...]')
    taught = spec.novel_ids(0) if spec.folds else spec.base_ids(-1)
    if unfit := [spec.classes[c] for c in taught if '/' in spec.classes[c] or not spec.classes[c].strip('.')]:
        raise InputError(f'{spec.card}: {some(unfit)} cannot name a picture; expected names without "/"')
    data = FoldData(spec, spec.root, -1, spec.list_path('train', spec.root), None)
    ids = data.ids('train')
    samples = data.samples('train', ids, novel_as_background=True)
    table = label_table(taught, (), True, spec.background, spec.ignore)
    table[[c for c in spec.classes if c not in taught]] = 0
    samples = dataclasses.replace(samples, table=table)
    support, left_out = {spec.classes[c]: [] for c in taught}, []
    for image_id in ids:
        image, labels = samples.read(image_id)
        pixels = np.bincount(labels.ravel(), minlength=256)
        image, labels = resize_to_fit(image, labels, size)
        name, used = printable(samples.image_path(image_id).name), False
        for label, class_id in enumerate(taught, 1):
            if pixels[label] < spec.min_pixels or label not in labels:
                if pixels[label]:
                    left_out.append(f'{spec.classes[class_id]} in {name} ({pixels[label]} pixels)')
                continue
            mask = np.where(labels == label, 1, np.where(labels == 0, 0, IGNORE_INDEX)).astype(np.uint8)
            support[spec.classes[class_id]].append(SupportImage(name, image, mask))
            used = True
        if not used and not pixels[1 : len(taught) + 1].any():
            left_out.append(f'{name}, which shows no taught class')
    if empty := [name for name, images in support.items() if not images]:
        raise InputError(
            f'{spec.card}: no photograph shows {spec.min_pixels} pixels of {some(empty)} (min_pixels); add some, lower '
            'min_pixels, or name the classes to teach: novel: [...]'
        )
    return support, left_out


def doubts(support: dict[str, list[SupportImage]], known: Collection[str]) -> list[str]:
    """What looks like a mistake in new classes, class name -> images; `known` are the names in the data set."""
    notes = []
    for name, images in support.items():
        if name not in known and (similar := difflib.get_close_matches(name, known, 1, 0.8)):
            notes.append(f'{name!r} is a class of its own; the data set has {similar[0]!r}')
        for image in images:
            mask, which = image.mask == 1, f'the mask of {name}/{image.name}'
            border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            if mask.mean() > MOST_COVERED:
                notes.append(f'{which} covers {mask.mean():.0%} of the photograph: is it inverted?')
            elif border.mean() > MOST_OF_BORDER:
                notes.append(f"{which} covers {border.mean():.0%} of the photograph's border: is it inverted?")
            if 1 < len(image.values) <= FEW_VALUES:  # more are the soft border of one class
                notes.append(f'{which} has the values {some(map(str, image.values))}; all of them count as {name}')
    return notes


class SupportSamples:
    """Reads support images as `images.Samples` reads those of a data set; ids are CLASS/NAME.

    Args:
        support: class name -> its images.
        labels: class name -> label.
    """

    def __init__(self, support: dict[str, Sequence[SupportImage]], labels: dict[str, int]):
        self.images = {
            f'{name}/{each.name}': (each, labels[name]) for name, images in support.items() for each in images
        }
        self.table = np.array(list(labels.values()), np.uint8)

    @property
    def ids(self) -> list[str]:
        """Of all images, class by class."""
        return list(self.images)

    def label(self, image_id: str) -> int:
        """Label of the class that an image shows."""
        return self.images[image_id][1]

    def photograph(self, image_id: str) -> tuple:
        """The same for images of one photograph, which may show several classes; it may also be there twice."""
        image = self.images[image_id][0].image
        return image.shape, zlib.crc32(image.tobytes())

    def stamps(self, image_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """Checksums of images and masks; they change when the images change."""
        chosen = [self.images[image_id][0] for image_id in image_ids]
        return [(zlib.crc32(each.image.tobytes()), zlib.crc32(each.mask.tobytes())) for each in chosen]

    def read_image(self, image_id: str) -> np.ndarray:
        """One image, RGB uint8 [H, W, 3]."""
        return self.images[image_id][0].image

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """One image and its labels, uint8 [H, W]: the label of its class, 255 where it is unknown, 0 elsewhere."""
        support, label = self.images[image_id]
        return support.image, np.where(support.mask == 1, np.uint8(label), support.mask)


def extend_legend(
    legend: Legend, names: Sequence[str], known_ids: Mapping[str, int], reserved: Collection[int]
) -> Legend:
    """The legend of a network that learns new classes.

    Args:
        legend: of the classes that it has and keeps.
        names: of the new classes.
        known_ids: class name -> class id in the network's data set; others get new ids.
        reserved: values in masks that no class can have.

    Raises:
        InputError: the network has a class of this name already, or has too many classes.
    """
    known = {name.casefold(): name for name in legend.names}
    for name in names:
        if (other := known.setdefault(name.casefold(), name)) is not name:
            is_own = other in legend.names and legend.names.index(other) in legend.novel_labels
            hint = f'--forget {other} replaces it' if is_own else 'rename it'
            raise InputError(f'{name!r}: the network has the class {other!r} already; {hint}')
    taken = {*legend.class_ids, *known_ids.values(), *reserved}
    # above the others, and in the gaps between them only where there is no room
    last = max([*legend.class_ids[1:], *known_ids.values()])
    unused = (value for value in (*range(last + 1, 256), *range(last)) if value not in taken)
    new = {name: known_ids[name] if name in known_ids else next(unused, None) for name in names}
    if None in new.values() or len(legend.names) + len(new) > MAX_CLASSES + 1:
        raise InputError(f'{len(names)} new classes: masks of 8 bits have no room for them beside {len(taken)} values')
    return legend.extended(new)


def support_positions(samples: SupportSamples, count: int) -> list[int]:
    """Positions of images in `ids` for `count` views of each class, or one of each image if these are more.

    The images of a class take turns, so that each class has as many views, however many images it has.
    """
    positions, by_class = [], {}
    for position, image_id in enumerate(samples.ids):
        by_class.setdefault(samples.label(image_id), []).append(position)
    for of_class in by_class.values():
        positions += [of_class[i % len(of_class)] for i in range(max(count, len(of_class)))]
    return positions
