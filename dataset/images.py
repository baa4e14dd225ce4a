"""Read images, with their masks or without."""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from core import IGNORE_INDEX
from core.errors import InputError, some
from core.names import find_by_stem, is_companion
from dataset.formats import SUFFIXES, read_file, read_picture, undecodable, wrong_depth
from dataset.labels import INVALID
from dataset.masks import open_mask, wrong_values

MASK_SUFFIXES = ('.png',)
HEADER_BYTES = 2**16  # hold the header of nearly every JPEG
DECODING = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass(frozen=True)
class Samples:
    """Where the images and masks of a split are, and which labels the values of the masks get.

    Attributes:
        image_dir, mask_dir: folders of the photographs, ID with one of `formats.SUFFIXES`, and of the masks, ID.png.
        table: uint8 [256], mask value -> label (`labels.label_table`).
        class_colors: RGB bytes -> class id, by which palettes are checked (`masks.open_mask`).
    """

    image_dir: Path
    mask_dir: Path
    table: np.ndarray
    class_colors: Mapping[bytes, int] | None = None

    @property
    def image_suffixes(self) -> tuple[str, ...]:
        """Suffixes of the photographs; a PNG in the folder of the masks is no photograph."""
        return tuple(suffix for suffix in SUFFIXES if suffix != '.png' or self.image_dir != self.mask_dir)

    def image_path(self, image_id: str) -> Path:
        """The photograph of an id; if there is none, where one would be. Raises InputError if there are several."""
        return find_file(self.image_dir, image_id, self.image_suffixes) or self.image_dir / f'{image_id}.jpg'

    def mask_path(self, image_id: str) -> Path:
        """The mask of an id, as `image_path`."""
        return find_file(self.mask_dir, image_id, MASK_SUFFIXES) or self.mask_dir / f'{image_id}.png'

    def stamps(self, image_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """(size, modification time in ns) of each image and of its mask; they change when the files change."""
        return [_file_stamp(self.image_path(i)) + _file_stamp(self.mask_path(i)) for i in image_ids]

    def read_image(self, image_id: str) -> np.ndarray:
        """Read one image, RGB uint8 [H, W, 3]."""
        return read_image(self.image_path(image_id))

    def open_mask(self, image_id: str) -> Image.Image:
        """Open the mask of one image; as `masks.open_mask`."""
        return open_mask(self.mask_path(image_id), self.class_colors)

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Read one image and its mask.

        Returns:
            RGB uint8 [H, W, 3], labels uint8 [H, W].

        Raises:
            InputError: a file is missing or cannot be decoded, the mask is colour-coded or holds other values than
                class ids, or the sizes differ.
        """
        image, values = self.read_values(image_id)
        labels = self.table[values]
        if INVALID in labels:
            raise wrong_values(self.mask_path(image_id), values, self.table)
        return image, labels

    def read_values(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, but with the values of the mask, whatever these are, in place of labels."""
        image = self.read_image(image_id)
        with self.open_mask(image_id) as opened:
            values = np.array(opened)
        paths = self.image_path(image_id), self.mask_path(image_id)
        check_same_size(paths[0], image.shape[1::-1], paths[1], values.shape[::-1])
        return image, values


def find_file(folder: Path, image_id: str, suffixes: Sequence[str]) -> Path | None:
    """The file of an id in a folder, with one of the suffixes in any case. Raises InputError if there are several."""
    names = find_by_stem(folder, image_id, suffixes)
    if len(names) > 1:
        raise InputError(
            f'{folder} holds {some(names)}, which have the same id {image_id}; expected one of them. Remove or rename '
            'the others.'
        )
    return folder / names[0] if names else None


def _file_stamp(path):
    """(size, modification time in ns) of a file; zeros if it is missing, which is reported when it is read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


class Photographs:
    """One image, or the images of a folder, in any common format and without masks. Ids are names without suffix.

    Args:
        folder: folder of images, or a single image.

    Attributes:
        left_out: names of the other files and folders in the folder.

    Raises:
        InputError: the folder does not exist, holds no image, or holds two whose names differ by their suffix only.
    """

    def __init__(self, folder: str | Path):
        files = [Path(folder)]
        try:
            if stat.S_ISDIR(os.stat(folder).st_mode):
                files = [path for path in Path(folder).iterdir() if not is_companion(path.name)]
            paths = sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())
        except FileNotFoundError:
            raise InputError(f'{folder} does not exist; expected an image, or a folder of images') from None
        except OSError as error:
            raise InputError(f'{folder} cannot be read: {error.strerror}. Check its permissions.') from error
        if not paths:
            raise InputError(f'{folder} holds no image; expected files named *{", *".join(SUFFIXES)}')
        self._paths = {path.stem: path for path in paths}
        self.left_out = sorted({path.name for path in files} - {path.name for path in paths})
        if len(self._paths) < len(paths):
            ambiguous = [path.name for path in paths if self._paths[path.stem] != path]
            raise InputError(
                f'{folder} holds {some(ambiguous)} and other images with the same name but another suffix; expected '
                'different names. Rename or remove one of each pair.'
            )

    @property
    def ids(self) -> list[str]:
        """Image ids, in the order of the file names."""
        return list(self._paths)

    @property
    def file_names(self) -> dict[str, str]:
        """Image id -> name of its file."""
        return {image_id: path.name for image_id, path in self._paths.items()}

    def read_image(self, image_id: str) -> np.ndarray:
        """Read one image, RGB uint8 [H, W, 3]."""
        return read_image(self._paths[image_id])

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Read one image like `Samples.read`; all pixels of its mask are ignored."""
        image = self.read_image(image_id)
        return image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8)


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to RGB uint8 [H, W, 3], as it is displayed.

    Raises:
        InputError: the file is missing, cannot be decoded, or does not hold 8 bits per channel.
    """
    content = read_file(path, 'image')
    picture = read_picture(content)
    image, cause = None, None
    if content and not picture.damage:
        try:
            image = cv2.imdecode(np.frombuffer(picture.content, np.uint8), DECODING)
        except Exception as error:  # of several types
            cause = error
    if image is None:
        raise undecodable(path, 'image', content, cause) from cause
    if image.dtype != np.uint8:
        raise wrong_depth(path, 'image', image.dtype)
    return _as_displayed(image, picture.orientation)


def _as_displayed(image, orientation):
    """Rotate and flip an image by its EXIF orientation, 1..8."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def read_header(path: str | Path) -> tuple[tuple[int, int], int]:
    """Read size and orientation from an image file's header.

    Returns:
        (width, height) as displayed, that is with the EXIF orientation applied; the EXIF orientation, 1..8, which is 1
        if the image is displayed as it is stored.

    Raises:
        InputError: the file is missing or its header is damaged.
    """
    content = read_file(path, 'image', HEADER_BYTES)
    picture = read_picture(content)
    if picture.format != 'JPEG' or not picture.size:
        picture = read_picture(read_file(path, 'image'))
    if not picture.size:  # of rare formats, the decoder knows it
        return read_image(path).shape[1::-1], picture.orientation
    return picture.size[::-1] if picture.orientation >= 5 else picture.size, picture.orientation


def check_same_size(image_path: Path, image_size: tuple[int, int], mask_path: Path, mask_size: tuple[int, int]):
    """Raise InputError if an image and its mask differ in (width, height)."""
    if tuple(image_size) != tuple(mask_size):
        hint = 'Replace the one that was resized.'
        if tuple(image_size) == tuple(mask_size)[::-1] and read_header(image_path)[1] >= 5:
            hint = (
                'The image is displayed rotated by 90 degrees (EXIF orientation), and its mask must have the same '
                'orientation: rotate the mask, or save the image as it is displayed.'
            )
        raise InputError(
            f'{mask_path} is {mask_size[0]}x{mask_size[1]}, its image {image_path} is {image_size[0]}x{image_size[1]}; '
            f'an image and its mask must have the same size. {hint}'
        )
