"""What is in an image file, and why a file cannot be decoded.

Comments, profiles, previews and EXIF are not needed to show a picture, and decoders may fail on them. So they are taken
out of JPEG and PNG files before these are decoded. Only the EXIF orientation is read, here, so that it is the same for
all decoders and versions.
"""

import contextlib
import glob
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from core.errors import InputError, some
from core.files import what_begins_so

JPEG_START, JPEG_END = b'\xff\xd8', b'\xff\xd9'
PNG_START = b'\x89PNG\r\n\x1a\n'
ORIENTATION_TAG = 0x0112
# of JPEG; APP0 and APP14, which are kept, say how colours are stored
ACCESSORIES = {*range(0xE1, 0xEE), 0xEF, 0xFE}
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
START_OF_SCAN = 0xDA
WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')  # of photographs, in any case

MAX_PIXELS, MAX_SIDE = 2**30, 2**20  # of OpenCV, for masks too

PILLOW_TYPES = {'F': 'float32', 'I': 'int32', 'I;16': 'uint16', 'I;16B': 'uint16', 'I;16L': 'uint16'}

OTHER_FILES = (  # how files begin that are found in place of images, besides those of `core.files`
    (rb'....ftyp(heic|heix|mif1|msf1|hevc)', 'a HEIC image. Save it as JPEG or PNG'),
    (rb'%PDF', 'a PDF document. Save its image as JPEG or PNG'),
)


@dataclass(frozen=True)
class Picture:
    """What shows the picture in a file.

    Attributes:
        format: 'JPEG', 'PNG', 'WebP', or '' for all others.
        content: the file, of JPEG and PNG without accessories.
        orientation: of EXIF, 1..8; 1 is as stored.
        size: stored (width, height), or None where another library has to find it.
        damage: what is wrong with the file, or ''.
        depth, color_type, palette: of PNG: bits per channel, its number of the colour type, RGB bytes of the palette.
    """

    format: str
    content: bytes
    orientation: int = 1
    size: tuple[int, int] | None = None
    damage: str = ''
    depth: int = 8
    color_type: int | None = None
    palette: bytes = b''


def read_picture(content: bytes) -> Picture:
    """Find what shows the picture in a file's content. Never fails: a decoder has the last word."""
    if content.startswith(JPEG_START):
        return _read_jpeg(content)
    if content.startswith(PNG_START):
        return _read_png(content)
    if content.startswith(b'RIFF') and content[8:12] == b'WEBP':
        exif = dict(_webp_chunks(content)).get(b'EXIF', b'')
        return Picture('WebP', content, _orientation(exif))
    return Picture('', content)


def _read_jpeg(content):
    kept, exif, size, at, scan = [JPEG_START], b'', None, 2, None
    while scan is None:
        at = content.find(b'\xff', at)
        if at < 0 or at + 4 > len(content):
            return Picture('JPEG', content, damage='it ends within its header')
        marker = content[at + 1]
        if marker == 0xFF or marker in WITHOUT_LENGTH:
            at += 1 if marker == 0xFF else 2
        elif marker == START_OF_SCAN:
            scan = at
        else:
            end = at + 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
            segment = content[at:end]
            if marker in FRAMES and len(segment) >= 9:
                size = struct.unpack_from('>HH', segment, 5)[::-1]
            if marker == 0xE1 and segment[4:10] == b'Exif\0\0' and not exif:
                exif = segment[10:]
            if marker not in ACCESSORIES:
                kept.append(segment)
            at = end
    cut = content.rfind(JPEG_END, scan) < 0
    damage = 'it is truncated: a JPEG file ends with the bytes FF D9, which are missing' if cut else ''
    return Picture('JPEG', b''.join([*kept, content[scan:]]), _orientation(exif), size, damage)


def _read_png(content):
    kept, header, palette, exif, at, damage = [PNG_START], b'', b'', b'', len(PNG_START), ''
    name = b''
    while name != b'IEND':
        length = int.from_bytes(content[at : at + 4], 'big')
        end = at + 12 + length
        if end > len(content) or at + 12 > len(content):
            damage = damage or 'it is truncated: a PNG file ends with a chunk IEND, which is missing'
            break
        name, data = content[at + 4 : at + 8], content[at + 8 : end - 4]
        if name[0] & 0x20:  # lower case: a decoder may leave it out
            exif = data if name == b'eXIf' else exif
        else:
            if zlib.crc32(content[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], 'big'):
                damage = damage or f'the checksum of its chunk {name.decode("ascii", "replace")} is wrong'
            header = data if name == b'IHDR' else header
            palette = data if name == b'PLTE' else palette
            kept.append(content[at:end])
        at = end
    if len(header) != 13:
        return Picture('PNG', content, damage=damage or 'it has no header')
    width, height, depth, color_type = struct.unpack_from('>IIBB', header)
    shown = b''.join(kept)
    return Picture('PNG', shown, _orientation(exif), (width, height), damage, depth, color_type, palette)


def _webp_chunks(content) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 8], 'little')
        yield content[at : at + 4], content[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _orientation(exif):
    """Orientation in EXIF data, 1..8; 1 if it has none or is damaged."""
    exif = exif.removeprefix(b'Exif\0\0')
    order = {b'II': '<', b'MM': '>'}.get(exif[:2], '')
    try:
        (offset,) = struct.unpack_from(f'{order}I', exif, 4)
        (count,) = struct.unpack_from(f'{order}H', exif, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(f'{order}H6xH', exif, entry)
            if tag == ORIENTATION_TAG:
                return value if order and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def jpeg_damage(content: bytes) -> str:
    """What libjpeg reports as damage inside a JPEG file; '' if nothing, or if the file is no JPEG.

    Decoders go on after such damage, and show something else from there; few of them tell.
    """
    picture = read_picture(content)
    if picture.format == 'JPEG':
        try:
            simplejpeg.decode_jpeg(picture.content, 'GRAY', strict=True)
        except Exception as error:  # also where this decoder lacks what others can
            return str(error) if re.match('Corrupt|Premature|Inconsistent', str(error)) else ''
    return ''


def palette_colors(palette: bytes) -> list[bytes]:
    """The RGB bytes of each value of a palette."""
    return [palette[i : i + 3] for i in range(0, len(palette), 3)]


def fits(size: tuple[int, int] | None) -> bool:
    """Whether images of this (width, height) are read; unknown sizes may be."""
    return not size or (size[0] * size[1] <= MAX_PIXELS and max(size) <= MAX_SIDE)


def open_with_pillow(content: bytes) -> Image.Image:
    """Open the content of a file with Pillow, whatever its size. Raises whatever Pillow raises."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is lower than OpenCV's
    return Image.open(io.BytesIO(content))


def read_file(path: str | Path, kind: str, limit: int = -1) -> bytes:
    """Read a file.

    Args:
        path: the file.
        kind: 'image' or 'mask', in messages.
        limit: how many bytes; -1: all.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f'{kind} {path} is {"a folder" if stat.S_ISDIR(mode) else "a device"}; expected a file')
        with open(path, 'rb') as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(Path(path), kind) from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, 'strerror', None) or 'it does not fit into memory'
        raise InputError(f'{kind} {path} cannot be read: {reason}. Check its permissions and its disk.') from error


def _missing(path, kind):
    if path.is_symlink():
        return InputError(f'{kind} {path} is a link to {os.readlink(path)}, which does not exist. Mend the link.')
    others = other_suffixes(path)
    hint = f'there is {some(others)}: rename it' if others else 'check --data-dir, or make the lists again'
    return InputError(f'{kind} {path} does not exist; {hint}')


def other_suffixes(path: Path) -> list[str]:
    """Names of the files in the folder of `path` whose names differ from it by their suffix only."""
    return sorted(other.name for other in path.parent.glob(f'{glob.escape(path.stem)}.*'))


def undecodable(path: str | Path, kind: str, content: bytes, cause: Exception | None = None) -> InputError:
    """The error for a file that a library cannot decode, with the reason that can be found.

    Args:
        path: the file.
        kind: 'image' or 'mask'.
        content: the file's content.
        cause: what the library raised, if anything.
    """
    picture = read_picture(content)
    name, size, mode = picture.format, picture.size, ''
    with contextlib.suppress(Exception), open_with_pillow(picture.content) as opened:  # of many types
        name, size, mode = opened.format, size or opened.size, opened.mode
    other = what_begins_so(content, OTHER_FILES)
    if not content:
        reason = 'the file is empty. Copy it again.'
    elif other:
        reason = f'the file is {other}.'
    elif picture.damage:
        reason = f'the file is damaged: {picture.damage}. Copy it again.'
    elif not fits(size):
        return InputError(
            f'{kind} {path} is {size[0]}x{size[1]}; expected at most 2^30 pixels, and 2^20 a side. Cut it into tiles.'
        )
    elif mode in PILLOW_TYPES:
        return wrong_depth(path, kind, PILLOW_TYPES[mode])
    elif isinstance(cause, MemoryError):
        reason = 'it does not fit into memory. Make it smaller, or end other programs.'
    elif name:
        told = f' ({getattr(cause, "err", cause)})' if cause else ''
        reason = f'the {name} file is damaged, or of a rare kind{told}. Copy it again, or save it as JPEG or PNG.'
    else:
        reason = f'the file is damaged, or no image; it begins with {content[:12]!r}. Copy it again.'
    return InputError(f'{kind} {path} cannot be decoded: {reason}')


def wrong_depth(path: str | Path, kind: str, dtype: np.dtype | str) -> InputError:
    """The error for an image whose values do not have 8 bits."""
    dtype = np.dtype(dtype)
    values = f'{dtype.itemsize * 8}-bit {"floating-point" if dtype.kind == "f" else "integer"} values'
    return InputError(
        f'{kind} {path} has {values}; expected 8 bits per channel. Scale the values to 0..255, in the same way for all '
        'images, and save it as 8-bit JPEG or PNG.'
    )
