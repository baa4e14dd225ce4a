"""Reading images, masks and palettes."""

import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from core.errors import InputError
from dataset.formats import ORIENTATION_TAG
from dataset.images import read_header, read_image
from dataset.legend import voc_palette
from dataset.masks import read_mask
from report.panels import save_palette_png


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


def test_greyscale_of_few_bits_is_refused(tmp_path):
    """Decoders rescale its values to 0..255: they would read class id 1 of a 4-bit mask as 17."""
    picture = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    four_bits = io.BytesIO()
    palette = picture.copy()
    palette.putpalette(bytes(48))
    palette.save(four_bits, 'png', bits=4)
    content = bytearray(four_bits.getvalue())
    header = content.index(b'IHDR')
    content[header + 13] = 0  # colour type palette -> greyscale
    content[header + 17 : header + 21] = zlib.crc32(content[header : header + 17]).to_bytes(4, 'big')
    (tmp_path / 'm.png').write_bytes(content)
    with pytest.raises(InputError, match='fewer than 8 bits'):
        read_mask(tmp_path / 'm.png')


def test_a_truncated_photograph_is_refused_and_trailing_bytes_are_not(tmp_path, shapes):
    content = (shapes / 'JPEGImages/val_0000.jpg').read_bytes()
    path = tmp_path / 'i.jpg'
    path.write_bytes(content + b'\0\0')
    assert np.array_equal(read_image(path), read_image(shapes / 'JPEGImages/val_0000.jpg'))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match='cannot be decoded'):
        read_image(path)


@pytest.mark.parametrize(('orientation', 'turned'), ((1, False), (3, False), (6, True), (9, False)))
def test_the_header_gives_the_size_that_the_decoder_gives(tmp_path, orientation, turned):
    path = tmp_path / 'a.jpg'
    picture = Image.new('RGB', (60, 40))
    exif = picture.getexif()
    exif[ORIENTATION_TAG] = orientation
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'  # is not applied
    picture.save(path, exif=exif, xmp=xmp)
    size, found = read_header(path)
    assert size == read_image(path).shape[1::-1] == ((40, 60) if turned else (60, 40))
    assert found == (orientation if orientation in (1, 3, 6) else 1)


def test_real_masks_hold_voc_ids(voc_mini):
    path = sorted((voc_mini / 'SegmentationClassAug').iterdir())[0]
    assert set(np.unique(read_mask(path))) <= {*range(21), 255}


def test_voc_palette_has_vocs_colours():
    palette = voc_palette()
    assert palette[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip
