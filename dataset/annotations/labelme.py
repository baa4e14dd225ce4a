"""Read labelme's files, one for each photograph, and check all of their shapes.

    {"shapes":      [{"label": "dog", "shape_type": "polygon", "points": [[10.5, 20], [30, 20], [30, 40.5]]}, ...],
     "imagePath":   "../photographs/7.jpg", "imageHeight": 480, "imageWidth": 640,
     "imageData":   the photograph's file in base64, or null}

A rectangle has two points, or four corners; a circle its centre and a point on it; a mask two corners and a PNG in
base64. Points and lines have no area.
"""

import base64
import binascii
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from core.errors import InputError
from core.names import canonical
from dataset.annotations.coco import Instance, image_id_of
from dataset.annotations.entries import SIZE, TEXT, Fault, check_fields, read_json, shortened
from dataset.annotations.outlines import Outline, read_outline, run_lengths
from dataset.formats import fits, open_with_pillow, read_picture
from dataset.images import read_header

POLYGONS = ('polygon', 'rectangle', 'rotation', 'oriented_rectangle')  # the last two: boxes with four corners
WITHOUT_AREA = ('point', 'points', 'line', 'linestrip')
SHAPE_TYPES = (*POLYGONS, 'circle', 'mask', *WITHOUT_AREA)
FIELDS = {
    'label': TEXT,
    'shape_type': (lambda value: value in (None, *SHAPE_TYPES), f'one of {", ".join(SHAPE_TYPES)}'),
    'points': (lambda value: isinstance(value, list) and all(map(_is_point, value)), 'a list of points [x, y]'),
}
FILE_FIELDS = {
    'imagePath': (lambda value: isinstance(value, str) and image_id_of(value) != '', 'the name of a file'),
    'shapes': (lambda value: isinstance(value, list), 'a list'),
    'imageData': (lambda value: value is None or isinstance(value, str), 'a text or null'),
}
DEFAULTS = {'shape_type': None, 'imageData': None}  # no type: a polygon


def _is_point(value):
    return isinstance(value, list) and len(value) == 2 and {int, float}.issuperset(map(type, value))


@dataclass(frozen=True)
class LabelmeFile:
    """The content of a file.

    Attributes:
        path: of the file.
        image_path: of the photograph, relative to the file or absolute; folders are separated by '/'.
        size: (width, height) of the photograph.
        embedded: the file holds the photograph too.
        instances: in the order of the file; their numbers count the shapes from 0.
        left_out: the shapes without area, e.g. 'shape 3 of a.json'.
        faults: of the file and its shapes, with the shape; nothing may be drawn if there are some.
    """

    path: Path
    image_path: PurePosixPath
    size: tuple[int, int]
    embedded: bool
    instances: list[Instance]
    left_out: list[str]
    faults: list[tuple[str, Fault]]


def read_labelme(path: Path) -> LabelmeFile | None:
    """Read a file of labelme; None for JSON files of others.

    Raises:
        InputError: the file cannot be read, or is no JSON.
    """
    content = read_json(path, "one of labelme's files")
    if not isinstance(content, dict) or 'shapes' not in content:
        return None
    read = LabelmeFile(path, PurePosixPath('.'), (0, 0), False, [], [], [])
    try:
        check_fields(content, FILE_FIELDS, DEFAULTS)
        image_path = PurePosixPath(content['imagePath'].replace('\\', '/'))
        width, height = size = _size(content, path)
    except Fault as fault:
        read.faults.append((str(path), fault))
        return read
    for number, shape in enumerate(content['shapes']):
        try:
            check_fields(shape, FIELDS, DEFAULTS)
            outline = _outline(shape, height, width)
        except Fault as fault:
            read.faults.append((_described(number, shape, path), fault))
            continue
        if outline is None:
            read.left_out.append(_described(number, shape, path.name))
        else:
            read.instances.append(Instance(number, canonical(shape['label']).strip(), outline))
    embedded = bool(content.get('imageData'))
    return LabelmeFile(path, image_path, size, embedded, read.instances, read.left_out, read.faults)


def embedded_photograph(path: Path) -> bytes:
    """The file of the photograph that a file holds. Raises InputError where it is damaged."""
    try:
        return _decoded(read_json(path, "one of labelme's files")['imageData'])
    except Fault as fault:
        raise InputError(f'{path}: imageData must be {fault.expected}, found {fault.found}') from None


def displayed_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a photograph as it is displayed, from the content of its file; None for what is no image."""
    picture = read_picture(content)
    size = picture.size
    if not size:
        with contextlib.suppress(Exception), open_with_pillow(content) as opened:  # of many types
            size = opened.size
    return size and (size[::-1] if picture.orientation >= 5 else size)


def _described(number, shape, path):
    label = shape.get('label') if isinstance(shape, dict) else None
    return f'shape {number}{f" ({label})" if isinstance(label, str) else ""} of {path}'


def _size(content, path):
    """(width, height): as the file says, or of the photograph beside it or in it."""
    size = content.get('imageWidth'), content.get('imageHeight')
    if size == (None, None):  # of old versions
        beside = path.parent / content['imagePath'].replace('\\', '/')
        if content.get('imageData'):
            size = displayed_size(_decoded(content['imageData'])) or size
        elif os.path.isfile(beside):
            return read_header(beside)[0]
    if not all(map(SIZE[0], size)):
        check_fields(content, {'imageWidth': SIZE, 'imageHeight': SIZE}, {})
    if not fits(size):
        raise Fault('an image must have at most 2^30 pixels, and 2^20 a side', f'{size[0]}x{size[1]}')
    return size


def _decoded(text):
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Fault('base64 text', shortened(text)) from None


def _outline(shape: Mapping, height: int, width: int) -> Outline | None:
    """The outline of a shape whose fields have the right types, None if it has no area. Raises Fault."""
    kind, points = shape.get('shape_type') or 'polygon', shape['points']
    if kind in WITHOUT_AREA:
        return None
    if kind in ('circle', 'mask') or (kind == 'rectangle' and len(points) != 4):
        if len(points) != 2:
            raise Fault(f'a {kind} must have 2 points', f'{len(points)} of them')
        (left, top), (right, bottom) = points
        corners = [left, top, right, top, right, bottom, left, bottom]
        read_outline([corners], height, width)  # raises Fault where they are not in the image
        if kind == 'rectangle':
            return [corners]
        region = _disc(points, height, width) if kind == 'circle' else _mask(shape, height, width)
        return run_lengths(region) if region.any() else None
    return read_outline([[coordinate for point in points for coordinate in point]], height, width)


def _disc(points, height, width):
    """The pixels whose centres are in a circle, bool [H, W]."""
    (x, y), edge = points
    radius = float(np.hypot(edge[0] - x, edge[1] - y))
    (top, bottom), (left, right) = (
        np.clip([center - radius, center + radius + 1], 0, side).astype(int)
        for center, side in ((y, height), (x, width))
    )
    rows, columns = np.ogrid[top:bottom, left:right]
    region = np.zeros((height, width), bool)
    region[top:bottom, left:right] = np.hypot(columns + 0.5 - x, rows + 0.5 - y) <= radius
    return region


def _mask(shape, height, width):
    """The region that a mask shape shows, bool [H, W]."""
    (left, top), (right, bottom) = (map(round, point) for point in shape['points'])
    if not isinstance(shape.get('mask'), str):
        raise Fault('a mask must have its picture', shortened(shape.get('mask')))
    content = np.frombuffer(_decoded(shape['mask']), np.uint8)
    picture = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE) if content.size else None
    if picture is None:
        raise Fault('the picture of a mask must be a PNG in base64', shortened(shape['mask']))
    expected = (bottom - top + 1, right - left + 1)
    if picture.shape != expected or min(left, top) < 0 or bottom >= height or right >= width:
        corners = f'({left}, {top})..({right}, {bottom})'
        expected = 'the picture of a mask must fill the pixels from one corner to the other, inside of the image'
        raise Fault(expected, f'{picture.shape[1]}x{picture.shape[0]} at {corners} of {width}x{height}')
    region = np.zeros((height, width), bool)
    region[top : bottom + 1, left : right + 1] = picture != 0
    return region
