"""Connected regions of masks, with outlines as COCO stores them."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np


class Region(NamedTuple):
    """Connected pixels of one class.

    Attributes:
        label: the class.
        counts: run lengths that cover the image column by column, as `read_outline` returns them.
        box: (x, y, width, height).
        area: number of pixels.
    """

    label: int
    counts: np.ndarray
    box: tuple[int, int, int, int]
    area: int


def find_regions(labels: np.ndarray) -> Iterator[Region]:
    """The regions of all labels but 0: pixels that touch, also at corners, belong together.

    Args:
        labels: uint8 [H, W].
    """
    columns = np.ascontiguousarray(labels.T)  # run lengths go down the columns
    present = np.flatnonzero(cv2.calcHist([columns], [0], None, [256], [0, 256]))
    for label in present[present > 0].tolist():
        inside = cv2.compare(columns, label, cv2.CMP_EQ)
        _, numbers, statistics, _ = cv2.connectedComponentsWithStats(inside, connectivity=8, ltype=cv2.CV_32S)
        numbers = numbers.ravel()
        starts = np.concatenate(([0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1))
        runs = np.stack([starts, np.append(starts[1:], numbers.size)], axis=1)
        owners = numbers[starts]
        order = np.argsort(owners, kind='stable')
        ends = np.searchsorted(owners[order], np.arange(len(statistics)), side='right')
        for number in range(1, len(statistics)):
            own = runs[order[ends[number - 1] : ends[number]]]
            counts = np.diff(own.ravel(), prepend=0, append=numbers.size)
            y, x, height, width, area = statistics[number].tolist()
            yield Region(label, counts[: len(counts) - (counts[-1] == 0)], (x, y, width, height), area)
