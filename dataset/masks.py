"""Read and write masks: PNG files whose pixel values are class ids."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import InputError, some
from core.files import atomic_write
from dataset.formats import Picture, fits, open_with_pillow, palette_colors, read_file, read_picture, undecodable
from dataset.labels import INVALID, accepted

BLACK = bytes(3)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
COLORED = {RGB: 'RGB', GREY_ALPHA: 'grey with transparency', RGBA: 'RGBA'}


def read_mask(path: str | Path, class_colors: Mapping[bytes, int] | None = None) -> np.ndarray:
    """Decode a greyscale or palette PNG to its values, uint8 [H, W]. Arguments and errors as `open_mask`."""
    with open_mask(path, class_colors) as mask:
        return np.array(mask)


def open_mask(path: str | Path, class_colors: Mapping[bytes, int] | None = None) -> Image.Image:
    """Open and decode a mask as a Pillow image of mode L or P, whose pixel values are class ids.

    OpenCV would convert a palette to colours and the colours to luminance, so the class ids would be lost.

    Args:
        path: a PNG file.
        class_colors: RGB bytes -> class id: the data set's own colours; None: unknown. A palette that has them at
            other places has been reordered by some tool, and its values are no class ids.

    Raises:
        InputError: the file is missing or cannot be decoded, or its values cannot be class ids.
    """
    mask, picture = open_png(path)
    if picture.color_type in COLORED:
        raise InputError(
            f'{path} is a colour-coded mask ({COLORED[picture.color_type]}); expected one 8-bit channel or a '
            'palette whose values are class ids. Use SegmentationClassAug rather than colour renderings; for your own '
            'colours, utils.import_annotations --format colors makes such masks.'
        )
    if class_colors:
        _check_palette(path, mask, picture, class_colors)
    return mask


def open_png(path: str | Path) -> tuple[Image.Image, Picture]:
    """Open and decode a mask of one 8-bit channel, a palette, or colours.

    Raises:
        InputError: the file is missing, is no PNG, cannot be decoded, or its values cannot be class ids.
    """
    mask, picture = _open_any_png(path)
    if picture.depth == 16:
        raise InputError(
            f'{path} has 16 bits per channel; expected 8. Save it with 8, as greyscale, palette or RGB PNG.'
        )
    if picture.color_type == GREY and picture.depth < 8:
        raise InputError(
            f'{path} is a greyscale PNG of fewer than 8 bits ({picture.depth}); decoders rescale its values, so they '
            'are lost. Save it with 8 bits, as greyscale, palette or RGB PNG.'
        )
    return mask, picture


def read_binary_mask(path: str | Path) -> tuple[np.ndarray, list[int]]:
    """Where a mask of one class shows it: any value, or colour, but zero and black.

    Args:
        path: a PNG file of any kind; of palettes, the colours count, and what is transparent is none of the class.

    Returns:
        bool [H, W]; and the values that show it, of a mask of one channel.

    Raises:
        InputError: the file is missing, is no PNG, or cannot be decoded.
    """
    mask, _ = _open_any_png(path)
    shown = _shows(mask)
    return shown, np.unique(np.array(mask)[shown]).tolist() if len(mask.getbands()) == 1 else []


def _shows(mask):
    """Where any mask is neither zero nor black nor transparent."""
    if mask.mode == 'P':
        mask = mask.convert('RGBA' if 'transparency' in mask.info else 'RGB')
    values = np.array(mask)
    if values.ndim == 2:
        return values != 0
    shown = values[..., -1] != 0 if mask.mode in ('LA', 'RGBA') else True
    channels = values[..., :-1] if mask.mode in ('LA', 'RGBA') else values
    return (channels != 0).any(axis=2) & shown


def _open_any_png(path):
    content = read_file(path, 'mask')
    picture = read_picture(content)
    if picture.format != 'PNG':
        raise _not_png(path, content)
    if picture.damage or not fits(picture.size):
        raise undecodable(path, 'mask', content)
    try:
        mask = open_with_pillow(picture.content)
        mask.load()
    except Exception as error:  # of many types
        raise undecodable(path, 'mask', content, error) from error
    return mask, picture


def _not_png(path, content):
    try:
        name = open_with_pillow(content).format
    except Exception:  # of many types
        return undecodable(path, 'mask', content)
    lossy = ' JPEG has changed its values near the borders of objects.' if name == 'JPEG' else ''
    return InputError(
        f'{path} is a {name} file under the name of a PNG.{lossy} Export the mask again, as 8-bit greyscale or palette '
        'PNG.'
    )


def _check_palette(path, mask, picture, class_colors):
    """InputError where a value that a mask uses has the colour of another class."""
    colors = palette_colors(picture.palette)
    other = {value: class_colors.get(color, value) for value, color in enumerate(colors)}
    # black also fills unused places
    moved = [v for v, c in other.items() if c != v and colors[v] != BLACK and colors.count(colors[v]) == 1]
    if not moved:
        return
    histogram = mask.histogram()
    if used := [f'{v} has the colour of class {other[v]}' for v in moved if histogram[v]]:
        raise InputError(
            f'{path} is a mask whose palette some tool has reordered: the value {some(used)}. So its values are no '
            'class ids. Use the original file, or save the class ids as 8-bit greyscale PNG.'
        )


def read_colored_mask(path: str | Path, class_colors: Mapping[bytes, int]) -> np.ndarray:
    """Class ids of a mask whose colours tell the classes: RGB, or a palette in any order.

    Greyscale values are class ids, and so are those of a palette of entirely different colours.

    Args:
        path: a PNG file.
        class_colors: RGB bytes -> class id.

    Returns:
        uint8 [H, W].

    Raises:
        InputError: as `open_png`; or some of the colours are those of no class.
    """
    mask, picture = open_png(path)
    if picture.color_type not in (PALETTE, RGB, RGBA):
        return np.array(mask.getchannel(0))
    places, colors = places_of_colors(mask, picture)
    ids = [class_colors.get(color) for color in colors]
    unknown = [color for color, class_id in zip(colors, ids, strict=True) if class_id is None]
    if picture.color_type == PALETTE and (len(set(colors)) < len(colors) or (unknown and not any(ids))):
        return np.array(mask)
    if unknown:
        raise InputError(
            f'mask {path} holds colours that are not classes, such as {list(unknown[0] or b"")}; expected the palette '
            'of the data set. Unpack it again.'
        )
    return np.array(ids, np.uint8)[places]


def places_of_colors(mask: Image.Image, picture: Picture) -> tuple[np.ndarray, list[bytes | None]]:
    """The colours of a mask of `open_png`; transparency is ignored, and shades of grey are colours too.

    Returns:
        Places in the list of colours, int64 [H, W]; RGB bytes of each, None for a value beyond the palette.
    """
    values = np.array(mask if picture.color_type in (PALETTE, GREY) else mask.convert('RGB'), np.int64)
    used, places = np.unique(values if values.ndim == 2 else values @ (65536, 256, 1), return_inverse=True)
    if picture.color_type == PALETTE:
        palette = palette_colors(picture.palette)
        colors = [palette[value] if value < len(palette) else None for value in used]
    else:
        colors = [bytes([code] * 3) if values.ndim == 2 else int(code).to_bytes(3, 'big') for code in used]
    return places.reshape(values.shape[:2]), colors


def wrong_values(path: str | Path, found: np.ndarray, table: np.ndarray) -> InputError | None:
    """The error for a mask that holds values which a `labels.label_table` does not know; None if it does not."""
    known = np.flatnonzero(table != INVALID)
    if wrong := [value for value in np.unique(found).tolist() if value not in known]:
        return InputError(
            f'{path} holds the values {some(map(str, wrong), 8)}; expected {accepted(table)}. Is it a mask of this '
            '--dataset, does its card lack a class or an ignored value, or has a tool turned colours into grey?'
        )
    return None


def save_palette_png(path: Path, mask: np.ndarray, palette: np.ndarray):
    """Write a mask (uint8 [H, W], class ids) as a palette PNG; the palette is uint8 [256, 3]."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    with atomic_write(path, 'wb', sync=False) as file:
        picture.save(file, format='png')
