"""Outlines of objects as COCO stores them, polygons or run lengths: checked, and drawn into masks."""

import math
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from dataset.annotations.entries import Fault, shortened

RASTERIZERS = ('opencv', 'coco')
# Labelling tools let vertices lie a little outside of the image, and drawing cuts that off. Swapped coordinates, or
# those of an image of another size, lie far outside in some objects of a file.
OUTSIDE = 1 / 20  # of the image's width or height
OUTSIDE_PIXELS = 2  # at least

Outline = list[list[float]] | np.ndarray


def read_outline(segmentation: Any, height: int, width: int) -> Outline | None:
    """Check the `segmentation` of an annotation.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...]; or run lengths {'size': [height, width], 'counts'}, with
            counts as numbers or as the string that pycocotools makes of them. None, [] and [[]], which exporters write
            for boxes, are no outline.
        height, width: size of the image in pixels.

    Returns:
        The list of polygons. Or int64 run lengths that cover the image column by column: numbers of pixels outside and
        inside in turn. None if there is no outline, or no pixel inside.

    Raises:
        Fault: it is something else.
    """
    if segmentation is None or segmentation in ([], [[]]):
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
        return segmentation
    if isinstance(segmentation, dict):
        runs = _read_runs(segmentation, height, width)
        return runs if runs[1::2].any() else None
    raise Fault('segmentation must be a list of polygons, or run lengths {"size", "counts"}', shortened(segmentation))


def _check_polygon(polygon, height, width):
    if not isinstance(polygon, list):
        raise Fault(
            'segmentation must be a list of polygons [[x0, y0, x1, y1, ...], ...]', f'[{shortened(polygon)}, ...]'
        )
    if not {int, float}.issuperset(map(type, polygon)):
        raise Fault('a polygon must hold numbers x0, y0, x1, y1, ... only', shortened(polygon))
    if len(polygon) < 6 or len(polygon) % 2:
        expected = 'a polygon must have an even number of coordinates, at least 6'
        raise Fault(expected, f'{len(polygon)} of them, {shortened(polygon)}')
    for axis, name, side in ((0, 'x', width), (1, 'y', height)):
        values = polygon[axis::2]
        low, high = min(values), max(values)
        outside = max(OUTSIDE * side, OUTSIDE_PIXELS)
        # A NaN in the first place fails the comparisons, others are in the sum.
        if not (-outside <= low and high <= side + outside) or math.isnan(sum(values)):
            far = next(value for value in values if not -outside <= value <= side + outside)
            raise Fault('a polygon must lie in its image', f'{name} = {shortened(far)}, expected 0..{side}')


def _read_runs(rle, height, width):
    """Run lengths of a dict {'size', 'counts'}, int64."""
    if rle.get('size') != [height, width]:
        expected = "the size of run lengths must be the image's [height, width]"
        raise Fault(expected, f'{shortened(rle.get("size"))}, image {[height, width]}')
    counts = rle.get('counts')
    if isinstance(counts, str):
        counts = decompress(counts).tolist()
    if not isinstance(counts, list) or not {int}.issuperset(map(type, counts)) or min(counts, default=0) < 0:
        raise Fault('run lengths ("counts") must be integers >= 0, or a string of compressed ones', shortened(counts))
    if sum(counts) != height * width:
        expected = 'run lengths must cover all pixels of the image'
        raise Fault(expected, f'{sum(counts)} of {height} x {width} = {height * width}')
    return np.array(counts, np.int64)


def decompress(counts: str) -> np.ndarray:
    """Run lengths of a string of pycocotools, int64.

    A character holds 5 bits of a number, low bits first, and whether more follow. From the fourth number on, it is the
    difference to the number two places before.

    Raises:
        Fault: the string is none of pycocotools.
    """
    codes = np.frombuffer(counts.encode('utf-8', 'replace'), np.uint8).astype(np.int64) - ord('0')
    last = np.flatnonzero((codes & 32) == 0)  # characters of numbers
    digits = np.diff(last, prepend=-1)
    ends_early = not len(last) or last[-1] != len(codes) - 1
    if ends_early or codes.min() < 0 or codes.max() >= 64 or digits.max() > 8:
        raise Fault('a string of run lengths must be one that pycocotools writes', shortened(counts))
    first = last + 1 - digits
    place = np.arange(len(codes)) - np.repeat(first, digits)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= ((codes[last] & 16) != 0) * (1 << (5 * digits))  # two's complement
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def run_lengths(region: np.ndarray) -> np.ndarray:
    """The outline of a region (bool [H, W]) as int64 run lengths, as `read_outline` returns them."""
    flat = region.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(changes, prepend=0, append=flat.size)


def rasterize(
    height: int,
    width: int,
    objects: Iterable[tuple[int, Outline]],
    rasterizer: str = 'opencv',
    dtype: type = np.uint8,
) -> np.ndarray:
    """Draw an image's objects into a mask, later ones over earlier ones.

    Args:
        height, width: size of the image in pixels.
        objects: (class id, outline as `read_outline` returns it), in drawing order.
        rasterizer: how polygons are filled. 'opencv': fillPoly on truncated vertices; 'coco': exact, by pycocotools.
        dtype: of the mask, uint8 or int32.

    Returns:
        [height, width], class ids; 0 where no object is.
    """
    mask = np.zeros((height, width), dtype)
    for class_id, outline in objects:
        if isinstance(outline, np.ndarray):
            inside = np.arange(len(outline)) % 2 == 1
            mask[np.repeat(inside, outline).reshape(width, height).T] = class_id
        elif rasterizer == 'coco':
            mask[coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outline, height, width))) != 0] = class_id
        else:
            for polygon in outline:
                vertices = np.asarray(polygon, np.float64).reshape(-1, 2).astype(np.int32)  # truncated
                cv2.fillPoly(mask, [vertices], int(class_id))
    return mask
