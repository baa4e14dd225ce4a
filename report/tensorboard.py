"""Pictures of a run for TensorBoard: predictions on validation images, and similarity of prototypes.

They are drawn with arrays, because importing matplotlib, which `figures` needs, would slow every start of training.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import nn

from dataset.legend import Legend
from report.arrays import label_array, similarity


def similarity_picture(prototypes: Sequence[torch.Tensor], side: int = 320) -> np.ndarray:
    """The similarities as a picture, uint8 [side', side', 3] with side' >= side: blue -1, white 0, red 1."""
    matrix = similarity(prototypes).clip(-1, 1)
    red, blue = np.minimum(1 + matrix, 1), np.minimum(1 - matrix, 1)
    colors = (255 * np.stack([red, np.minimum(red, blue), blue], axis=2)).astype(np.uint8)
    cell = -(-side // len(matrix))
    return colors.repeat(cell, axis=0).repeat(cell, axis=1)


class ValidationPanel:
    """Shows the same few validation images after each validation, as one picture.

    These are the first images that show a novel class, or in stage 1 any class.

    Args:
        legend: names and colours of the labels.
        read_image: image id -> RGB uint8 [H, W, 3].
        count: how many images.
        side: side of the square that each image is drawn into, in pixels.
    """

    def __init__(self, legend: Legend, read_image: Callable[[str], np.ndarray], count: int = 6, side: int = 192):
        self.legend, self.read_image, self.count, self.side = legend, read_image, count, side
        self._wanted = list(legend.novel_labels) or list(range(1, len(legend.names)))
        self._fixed, self._predictions = {}, {}

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]; those of images that are not shown are ignored."""
        if image_id not in self._fixed and len(self._fixed) == self.count:
            return
        prediction, truth = label_array(prediction), label_array(truth)
        if image_id not in self._fixed:
            if not np.isin(truth, self._wanted).any():
                return
            image = cv2.resize(self.read_image(image_id), truth.shape[::-1], interpolation=cv2.INTER_AREA)
            self._fixed[image_id] = (self._tile(image), self._tile(self.legend.colors[truth]))
        self._predictions[image_id] = self._tile(self.legend.colors[prediction])

    def pictures(self, net: nn.Module) -> dict[str, np.ndarray]:
        """Name -> picture, uint8 [H, W, 3]: the network's prototypes and, once there are images, its predictions."""
        predictions = self.draw()
        shown = {'prototypes': similarity_picture(net.prototypes())}
        return shown if predictions is None else shown | {'predictions': predictions}

    def draw(self) -> np.ndarray | None:
        """uint8 [rows * side, 3 * side, 3]: image, ground truth and prediction in each row; None without images."""
        rows = [np.hstack([*tiles, self._predictions[image_id]]) for image_id, tiles in self._fixed.items()]
        return np.vstack(rows) if rows else None

    def _tile(self, picture):
        """Shrink a picture to fit a grey square of the side."""
        factor = min(self.side / max(picture.shape[:2]), 1)
        height, width = (max(int(factor * size), 1) for size in picture.shape[:2])
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)
        tile = np.full((self.side, self.side, 3), 128, np.uint8)
        tile[:height, :width] = small
        return tile
