"""Read images and masks."""

import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from core import IGNORE_INDEX
from core.errors import InputError, some
from core.names import find_spelling, is_companion
from dataset.labels import INVALID

JPEG_END = b'\xff\xd9'
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Samples:
    """Where the images and masks of a split are, and which labels the values of the masks get.

    Attributes:
        image_dir, mask_dir: folders of ID.jpg and ID.png.
        table: uint8 [256], class id -> label (`labels.label_table`).
    """

    image_dir: Path
    mask_dir: Path
    table: np.ndarray

    def image_path(self, image_id: str) -> Path:
        return find_spelling(self.image_dir / f'{image_id}.jpg')

    def mask_path(self, image_id: str) -> Path:
        return find_spelling(self.mask_dir / f'{image_id}.png')

    def stamps(self, image_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """(size, modification time in ns) of each image and of its mask; they change when the files change."""
        return [_file_stamp(self.image_path(i)) + _file_stamp(self.mask_path(i)) for i in image_ids]

    def read_image(self, image_id: str) -> np.ndarray:
        """Read one image, RGB uint8 [H, W, 3]."""
        return read_image(self.image_path(image_id))

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Read one image and its mask.

        Returns:
            RGB uint8 [H, W, 3], labels uint8 [H, W].

        Raises:
            InputError: a file is missing or cannot be decoded, the mask is colour-coded or holds a class id out of
                range, or the sizes differ.
        """
        image = self.read_image(image_id)
        mask_path = self.mask_path(image_id)
        mask = read_mask(mask_path)
        check_same_size(self.image_path(image_id), image.shape[1::-1], mask_path, mask.shape[::-1])
        labels = self.table[mask]
        if INVALID in labels:
            found = sorted(set(np.unique(mask)) - set(np.flatnonzero(self.table != INVALID)))
            raise InputError(
                f'{mask_path} holds the values {", ".join(map(str, found))}; expected class ids '
                f'0..{max(np.flatnonzero(self.table < INVALID))} and 255 (ignored). Is it a mask of this --dataset?'
            )
        return image, labels


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

    SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')

    def __init__(self, folder: str | Path):
        if not Path(folder).exists():
            raise InputError(f'{folder} does not exist; expected an image, or a folder of images')
        files = [Path(folder)]
        if Path(folder).is_dir():
            files = [path for path in Path(folder).iterdir() if not is_companion(path.name)]
        paths = sorted(path for path in files if path.suffix.lower() in self.SUFFIXES and path.is_file())
        if not paths:
            raise InputError(f'{folder} holds no image; expected files named *{", *".join(self.SUFFIXES)}')
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

    def read_image(self, image_id: str) -> np.ndarray:
        """Read one image, RGB uint8 [H, W, 3]."""
        return read_image(self._paths[image_id])

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Read one image like `Samples.read`; all pixels of its mask are ignored."""
        image = self.read_image(image_id)
        return image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8)


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to RGB uint8 [H, W, 3]. Raises InputError if it is missing or damaged."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, 'image') from error
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
    if image is None or (not content.endswith(JPEG_END) and not _decodes_strictly(content)):
        raise _unreadable(path, 'image')
    return image


def _decodes_strictly(content):
    """Whether Pillow decodes the content. OpenCV silently fills the missing part of a truncated file with grey."""
    try:
        Image.open(io.BytesIO(content)).load()
    except (OSError, SyntaxError):
        return False
    return True


def read_header(path: str | Path) -> tuple[tuple[int, int], int]:
    """Read size and orientation from an image file's header.

    Returns:
        (width, height) as displayed, that is with the EXIF orientation applied; the EXIF orientation, 1..8, which is 1
        if the image is displayed as it is stored.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            exif = Image.Exif()  # image.getexif() also finds orientations that OpenCV does not apply
            exif.load(image.info.get('exif', b''))
            orientation = exif.get(ORIENTATION_TAG)
            orientation = orientation if orientation in range(1, 9) else 1
            return image.size[::-1] if orientation >= 5 else image.size, orientation
    except (OSError, SyntaxError) as error:
        raise _unreadable(path, 'image') from error


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


def read_mask(path: str | Path) -> np.ndarray:
    """Decode a greyscale or palette PNG to its values, uint8 [H, W]. Raises as `open_mask`."""
    with open_mask(path) as mask:
        return np.array(mask)


def open_mask(path: str | Path) -> Image.Image:
    """Open and decode a mask as a Pillow image of mode L or P, whose pixel values are class ids.

    OpenCV would convert a palette to colours and the colours to luminance, so the class ids would be lost.

    Raises:
        InputError: the file is missing or cannot be decoded, or its values cannot be class ids.
    """
    try:
        mask = Image.open(path)
        raw_mode = mask.tile[0][3] if mask.tile else None
        mask.load()
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNGs as SyntaxError
        raise _unreadable(path, 'mask') from error
    if mask.mode.startswith('I'):
        raise InputError(f'{path} has 16 or 32 bits per pixel; expected 8. Save its class ids as 8-bit greyscale PNG.')
    if mask.mode not in ('L', 'P'):
        raise InputError(
            f'{path} is a colour-coded mask (mode {mask.mode}); expected one 8-bit channel or a palette whose values '
            'are class ids. Use SegmentationClassAug rather than colour renderings, or convert colours to class ids.'
        )
    if mask.mode == 'L' and raw_mode != 'L':  # 'L;2', 'L;4': decoders stretch the values to 0..255
        raise InputError(
            f'{path} is a greyscale PNG of fewer than 8 bits; decoders rescale its values, so class ids are lost. '
            'Save it as 8-bit greyscale or palette PNG.'
        )
    return mask


def other_suffixes(path: Path) -> list[str]:
    """Names of the files in the folder of `path` whose names differ from it by their suffix only."""
    return sorted(other.name for other in path.parent.glob(f'{glob.escape(path.stem)}.*'))


def _unreadable(path, kind):
    path = Path(path)
    if not path.is_file():
        others = other_suffixes(path)
        hint = f'there is {some(others)}: rename it' if others else 'check --data-dir, or make the lists again'
        return InputError(f'{kind} {path} does not exist; {hint}')
    return InputError(f'{kind} {path} cannot be decoded: the file is damaged. Copy it again.')
