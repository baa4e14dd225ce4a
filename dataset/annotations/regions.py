"""Connected regions of masks, with outlines as COCO stores them."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np


class Region(NamedTuple):
    """Connected pixels of one class.

    Attributes:
        label: the class.
        box: (x, y, width, height).
        inside: which pixels of the box belong to it, bool [height, width].
        area: number of pixels.
        counts: run lengths that cover the image column by column, as `outlines.read_outline` returns them.
    """

    label: int
    box: tuple[int, int, int, int]
    inside: np.ndarray
    area: int
    counts: np.ndarray


def find_regions(labels: np.ndarray) -> Iterator[Region]:
    """The regions of all labels but 0: pixels that touch, also at corners, belong together.

    Args:
        labels: uint8 [H, W].
    """
    columns = np.ascontiguousarray(labels.T)  # run lengths go down the columns
    present = np.flatnonzero(cv2.calcHist([columns], [0], None, [256], [0, 256]))
    for label in present[present > 0].tolist():
        of_label = cv2.compare(columns, label, cv2.CMP_EQ)
        _, numbers, statistics, _ = cv2.connectedComponentsWithStats(of_label, connectivity=8, ltype=cv2.CV_32S)
        flat = numbers.ravel()
        starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
        runs = np.stack([starts, np.append(starts[1:], flat.size)], axis=1)
        owners = flat[starts]
        order = np.argsort(owners, kind='stable')
        ends = np.searchsorted(owners[order], np.arange(len(statistics)), side='right')
        for number in range(1, len(statistics)):
            own = runs[order[ends[number - 1] : ends[number]]]
            counts = np.diff(own.ravel(), prepend=0, append=flat.size)
            y, x, height, width, area = statistics[number].tolist()
            inside = (numbers[x : x + width, y : y + height] == number).T
            yield Region(label, (x, y, width, height), inside, area, counts[: len(counts) - (counts[-1] == 0)])


def polygon_of(region: Region) -> list[int]:
    """The outline of a region along the borders of its pixels, as one polygon [x0, y0, x1, y1, ...] without curves.

    Holes are reached over a line that is drawn forth and back. Filled by the even-odd rule or by the winding number,
    hence also by pycocotools, the polygon covers the region's pixels and no other one.
    """
    # A corner of the outline is where an odd number of the four pixels around it is inside; where two are that touch
    # only there, it is two corners.
    padded = np.pad(region.inside, 1)
    above, below = padded[:-1], padded[1:]
    odd = above[:, :-1] ^ above[:, 1:] ^ below[:, :-1] ^ below[:, 1:]
    crossing = (above[:, :-1] ^ above[:, 1:]) & (above[:, :-1] ^ below[:, :-1]) & ~odd
    rows, columns = np.nonzero(odd | crossing)
    times = 1 + crossing[rows, columns]
    rows, columns = rows.repeat(times), columns.repeat(times)
    # Along each row, every other stretch between corners is an edge, and likewise along each column.
    across = np.arange(len(rows)) ^ 1
    by_column = np.lexsort((rows, columns))
    down = np.empty_like(by_column)
    down[by_column] = by_column[np.arange(len(rows)) ^ 1]
    # With the inside on the right, edges above it go from left to right, those below it from right to left.
    left = np.arange(0, len(rows), 2)
    firsts = np.where(padded[rows[left] + 1, columns[left] + 1], left, left + 1)
    across, down = across.tolist(), down.tolist()
    points = np.stack([columns + region.box[0], rows + region.box[1]], axis=1).tolist()
    polygon, seen = [], set()
    for corner in firsts.tolist():
        loop = []
        while corner not in seen:
            seen.add(corner)
            loop += [points[corner], points[across[corner]]]
            corner = down[across[corner]]
        if loop and polygon:
            loop = [polygon[0], *loop, loop[0]]
        polygon += loop
    return [coordinate for point in polygon for coordinate in point]
