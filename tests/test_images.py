"""Reading images, masks and palettes."""

import io
import os
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from core.errors import InputError
from dataset import DATASETS
from dataset.formats import ORIENTATION_TAG
from dataset.images import read_header, read_image
from dataset.legend import voc_palette
from dataset.masks import read_mask, save_palette_png


def test_palette_and_greyscale_masks_read_alike(tmp_path):
    mask = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    cv2.imwrite(str(tmp_path / 'grey.png'), mask)
    save_palette_png(tmp_path / 'palette.png', mask, voc_palette())
    assert np.array_equal(read_mask(tmp_path / 'grey.png'), mask)
    assert np.array_equal(read_mask(tmp_path / 'palette.png'), mask)


def test_palette_masks_of_few_bits_read_as_ids(tmp_path):
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette()[:4].tobytes())
    picture.save(tmp_path / 'm.png', bits=2)
    assert np.array_equal(read_mask(tmp_path / 'm.png'), mask)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def with_chunk(content, chunk):
    """A PNG with one more chunk behind its header."""
    return content[:33] + chunk + content[33:]


def with_header(content, **changed):
    """A PNG whose header says something else."""
    header = dict(
        zip(('width', 'height', 'depth', 'color', *'abc'), struct.unpack('>IIBBBBB', content[16:29]), strict=True)
    )
    return content[:8] + png_chunk(b'IHDR', struct.pack('>IIBBBBB', *(header | changed).values())) + content[33:]


def with_segment(content, marker, data):
    """A JPEG with one more segment behind its start."""
    return content[:2] + bytes((0xFF, marker)) + struct.pack('>H', len(data) + 2) + data + content[2:]


VALUES = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64) % 21
MASK = Image.fromarray(VALUES)
PALETTE_MASK = MASK.copy()
PALETTE_MASK.putpalette(voc_palette().tobytes())
PHOTOGRAPH = Image.fromarray(cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (64, 48)))
JPEG, PNG = encoded(PHOTOGRAPH, 'jpeg'), encoded(PHOTOGRAPH, 'png')


@pytest.mark.parametrize(('content', 'message'), (
    (with_header(encoded(PALETTE_MASK.point(lambda v: v % 4), 'png', bits=4), color=0), 'fewer than 8 bits (4)'),
    (encoded(Image.fromarray(VALUES > 0), 'png'), 'fewer than 8 bits (1)'),
    (encoded(Image.fromarray(VALUES.astype(np.uint16)), 'png'), 'has 16 bits per channel'),
    (encoded(PALETTE_MASK.convert('RGB'), 'png'), 'colour-coded mask (RGB)'),
    (encoded(PALETTE_MASK.convert('RGBA'), 'png'), 'colour-coded mask (RGBA)'),
    (encoded(MASK.convert('LA'), 'png'), 'colour-coded mask (grey with transparency)'),
    (encoded(MASK, 'jpeg'), 'is a JPEG file under the name of a PNG. JPEG has changed its values'),
    (encoded(MASK, 'tiff'), 'is a TIFF file under the name of a PNG. Export the mask again'),
    (encoded(PALETTE_MASK, 'bmp'), 'is a BMP file under the name of a PNG'),
    (encoded(PALETTE_MASK, 'webp'), 'is a WEBP file under the name of a PNG'),
))  # fmt: skip
def test_masks_that_hold_no_class_ids_are_refused(tmp_path, content, message):
    path = tmp_path / 'm.png'
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_mask(path)


def test_reordered_palettes_are_refused_and_others_are_not(tmp_path):
    """The value of a pixel is its class id, unless its colour is that of another class."""
    path, colors = tmp_path / 'm.png', DATASETS['voc'].class_colors
    mask = np.array([[0, 1], [2, 255]], np.uint8)

    def write(values, palette):
        picture = Image.fromarray(values)
        picture.putpalette(bytes(range(256)) * 3)
        whole = png_chunk(b'PLTE', bytes(range(256)) * 3)
        path.write_bytes(encoded(picture, 'png').replace(whole, png_chunk(b'PLTE', np.uint8(palette).tobytes())))

    voc = voc_palette()
    for palette in (
        voc, voc[:3], np.zeros((256, 3)), np.full((256, 3), 255), np.arange(256).repeat(3),
        [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.random.default_rng(0).integers(0, 255, (256, 3)),
    ):  # fmt: skip
        write(mask, palette)
        assert np.array_equal(read_mask(path, colors), mask)
    compact = np.array([[0, 1], [2, 3]], np.uint8)
    for order, found in (
        ((0, 15, 4, 255), '1 has the colour of class 15, 2 has the colour of class 4'),
        ((255, 1, 2, 0), '0 has the colour of class 255'),
        ((0, 2, 1, 3), '1 has the colour of class 2'),
        ((15, 0, 0, 0), '0 has the colour of class 15'),
    ):
        write(compact, voc[list(order)])
        with pytest.raises(InputError, match=f'reordered: the value {found}'):
            read_mask(path, colors)
        assert np.array_equal(read_mask(path), compact)  # of a data set with other colours
    write(compact, [*voc[:4], voc[20], voc[19]])  # not used
    assert np.array_equal(read_mask(path, colors), compact)


@pytest.mark.parametrize('chunk', (
    png_chunk(b'zTXt', b'c\0\0' + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))),
    png_chunk(b'iTXt', b'c\0\1\0\0\0no zlib'),
    png_chunk(b'iCCP', b'profile\0\0' + b'no zlib'),
    png_chunk(b'eXIf', b'MM\0*\xff\xff\xff\xff'),
    png_chunk(b'tEXt', b'Comment\0text')[:-1] + b'?',
    png_chunk(b'tRNS', bytes(300)),
    png_chunk(b'pHYs', b'') + png_chunk(b'acTL', b'\0'),
), ids=lambda chunk: chunk[4:8].decode())  # fmt: skip
def test_accessories_of_png_files_do_not_matter(tmp_path, chunk):
    path = tmp_path / 'm.png'
    for picture in (MASK, PALETTE_MASK):
        path.write_bytes(with_chunk(encoded(picture, 'png'), chunk))
        assert np.array_equal(read_mask(path), VALUES)
    path.write_bytes(with_chunk(PNG, chunk))
    assert np.array_equal(read_image(path), np.array(PHOTOGRAPH)) and read_header(path) == ((64, 48), 1)


@pytest.mark.parametrize(('marker', 'data'), (
    (0xE1, b'Exif\0\0MM\0*\xff\xff\xff\xff'),
    (0xE1, b'Exif\0\0II*\0\x08\0\0\0\xff\xff' + bytes(range(200))),
    (0xE1, b'Exif\0\0'),
    (0xE2, b'ICC_PROFILE\0\x09\x01' + bytes(9)),
    (0xE2, b'MPF\0II*\0\xff\xff\xff\x7f'),
    (0xED, b'Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff'),
    (0xFE, bytes(65533)),
))  # fmt: skip
def test_accessories_of_jpeg_files_do_not_matter(tmp_path, marker, data):
    path = tmp_path / 'i.jpg'
    path.write_bytes(with_segment(JPEG, marker, data))
    expected = cv2.imdecode(np.frombuffer(JPEG, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(read_image(path), expected) and read_header(path) == ((64, 48), 1)


@pytest.mark.parametrize('content', (
    encoded(PHOTOGRAPH.convert('L'), 'jpeg'), encoded(PHOTOGRAPH.convert('CMYK'), 'jpeg', quality=95),
    encoded(PHOTOGRAPH, 'jpeg', progressive=True), encoded(PHOTOGRAPH.quantize(50), 'png'),
    encoded(PHOTOGRAPH.convert('RGBA'), 'png'), encoded(PHOTOGRAPH.convert('LA'), 'png'),
    encoded(PHOTOGRAPH.convert('1'), 'png'), encoded(PHOTOGRAPH.quantize(50), 'bmp'), encoded(PHOTOGRAPH, 'webp'),
    encoded(PHOTOGRAPH.convert('CMYK'), 'tiff'),
))  # fmt: skip
def test_photographs_of_all_kinds_show_their_colours(tmp_path, content):
    path = tmp_path / 'i.jpg'
    path.write_bytes(content)
    expected = np.array(Image.open(path).convert('RGB'))
    assert np.abs(read_image(path) - expected.astype(int)).max() <= 2  # CMYK is rounded differently
    assert read_header(path) == ((64, 48), 1)


def test_real_photographs_are_decoded_as_opencv_does(voc_mini):
    for path in sorted((voc_mini / 'JPEGImages').iterdir())[:20]:
        assert np.array_equal(read_image(path), cv2.imread(str(path), cv2.IMREAD_COLOR_RGB))


@pytest.mark.parametrize(('content', 'message'), (
    (b'', 'cannot be decoded: the file is empty'),
    (bytes(5000), 'it begins with zeros, as after a crash or a full disk'),
    (b'\n <!doctype HTML><head>', 'a web page, as failed downloads leave it'),
    (b'{"error": "not found"}', 'XML or JSON text'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'a pointer of Git LFS'),
    (b'../../.git/annex/objects/ab', 'pointer of git-annex'),
    (b'no picture', "or no image; it begins with b'no picture'"),
    (JPEG[:400], 'it ends within its header'),
    (JPEG[:-300], 'it is truncated: a JPEG file ends with the bytes FF D9'),
    (JPEG[:-300] + bytes(300), 'it is truncated: a JPEG file ends with the bytes FF D9'),
    (with_segment(JPEG, 0xE1, JPEG)[:-300], 'it is truncated'),  # the preview in it is complete
    (PNG[:-20], 'it is truncated: a PNG file ends with a chunk IEND'),
    (PNG[:200] + bytes((PNG[200] ^ 1,)) + PNG[201:], 'the checksum of its chunk IDAT is wrong'),
    (with_header(PNG, width=40_000, height=40_000), 'is 40000x40000; expected at most 2^30 pixels'),
    (with_header(PNG, width=2**20 + 1), 'is 1048577x48; expected at most 2^30 pixels, and 2^20 a side'),
    (encoded(Image.fromarray(VALUES / np.float32(20)), 'tiff'), 'has 32-bit floating-point values; expected 8 bits'),
    (encoded(MASK.convert('I'), 'tiff'), 'has 32-bit integer values'),
    (encoded(Image.fromarray(VALUES.astype(np.uint16)), 'tiff'), 'has 16-bit integer values'),
    (cv2.imencode('.png', np.zeros((4, 4, 3), np.uint16))[1].tobytes(), 'has 16-bit integer values'),
    (cv2.imencode('.tif', np.zeros((4, 4, 3), np.float32))[1].tobytes(), 'has 32-bit floating-point values'),
), ids=range(20))  # fmt: skip
def test_the_message_says_why_an_image_cannot_be_decoded(tmp_path, content, message):
    path = tmp_path / 'i.jpg'
    path.write_bytes(content)
    with pytest.raises(InputError, match=f'image {re.escape(str(path))} .*{re.escape(message)}'):
        read_image(path)


def test_what_is_no_file_is_told(tmp_path, monkeypatch):
    path = tmp_path / 'i.jpg'
    for make, message in (
        (lambda: None, 'does not exist'), (path.mkdir, 'is a folder'),
        (lambda: (path.rmdir(), os.mkfifo(path)), 'is a device'),  # which would be waited for
        (lambda: (path.unlink(), path.symlink_to('lost.jpg')), 'is a link to lost.jpg, which does not exist'),
        (lambda: (path.unlink(), path.symlink_to(path)), 'cannot be read: Too many levels of symbolic links'),
    ):  # fmt: skip
        make()
        for read in (read_image, read_header, read_mask):
            with pytest.raises(InputError, match=f'{path} {message}'):
                read(path)
    path.unlink()
    path.write_bytes(JPEG)

    def denied(*_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr('builtins.open', denied)
    with pytest.raises(InputError, match=r'cannot be read: Permission denied\. Check its permissions'):
        read_image(path)


def test_limits_and_failures_of_libraries(tmp_path, monkeypatch):
    path = tmp_path / 'm.png'
    MASK.save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)  # Pillow's limit is not ours
    assert np.array_equal(read_mask(path), VALUES)
    path.write_bytes(with_header(encoded(MASK, 'png'), height=2**25))
    with pytest.raises(InputError, match=r'is 64x33554432; expected at most 2\^30 pixels'):
        read_mask(path)
    path.write_bytes(JPEG)
    for error, reason in (
        (MemoryError(), 'it does not fit into memory'), (ValueError('a reason'), 'of a rare kind (a reason)'),
    ):  # fmt: skip

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(cv2, 'imdecode', fail)
        with pytest.raises(InputError, match=f'{path} cannot be decoded: .*{re.escape(reason)}'):
            read_image(path)


@pytest.mark.parametrize('kind', ('jpeg', 'png'))
@pytest.mark.parametrize('orientation', range(10))  # 0 and 9 are none
def test_photographs_are_read_as_they_are_displayed(tmp_path, kind, orientation):
    path = tmp_path / 'i.jpg'
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'  # is not applied
    PHOTOGRAPH.save(path, kind, exif=exif, **({'xmp': xmp} if kind == 'jpeg' else {}))
    displayed = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(read_image(path), displayed)
    assert read_header(path) == (displayed.shape[1::-1], orientation if 1 <= orientation <= 8 else 1)


def test_damaged_entries_do_not_hide_the_orientation(tmp_path):
    path = tmp_path / 'i.jpg'
    entries = struct.pack('>HHII', 0x010E, 2, 2**31, 2**31) + struct.pack('>HHIHH', ORIENTATION_TAG, 3, 1, 6, 0)
    path.write_bytes(with_segment(JPEG, 0xE1, b'Exif\0\0MM\0*\0\0\0\x08' + struct.pack('>H', 9) + entries))
    assert read_header(path) == ((48, 64), 6) and read_image(path).shape == (64, 48, 3)


def test_real_masks_hold_voc_ids(voc_mini):
    path = sorted((voc_mini / 'SegmentationClassAug').iterdir())[0]
    assert set(np.unique(read_mask(path))) <= {*range(21), 255}


def test_voc_palette_has_vocs_colours():
    palette = voc_palette()
    assert palette[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip
