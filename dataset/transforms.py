"""Joint transforms of an image and its mask. Images are RGB uint8 [H, W, 3], masks uint8 [H, W], until `to_tensors`."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from core import IGNORE_INDEX

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
# normalised value of each 8-bit value, [256, 1, 3]: one lookup replaces three float operations per value
NORMALISED = (np.arange(256, dtype=np.float32)[:, None, None] / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD


@dataclass(frozen=True)
class Augmentation:
    """Random resize, flip and crop (in this order) of training images, then normalisation and padding.

    Attributes:
        crop_size: (H, W) of the result.
        scale_range: (low, high) of the resize factor, relative to the original size, or
        fit: relative to the size that fits the crop.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    fit: bool = False

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one view.

        Args:
            image, mask: RGB uint8 [h, w, 3] and uint8 [h, w].
            rng: source of all random choices.

        Returns:
            Image float32 [3, H, W] and mask uint8 [H, W].
        """
        factor = fit_factor(mask.shape, self.crop_size) if self.fit else 1
        image, mask = resize(image, mask, factor * rng.uniform(*self.scale_range))
        if rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        height, width = self.crop_size
        top = rng.integers(max(mask.shape[0] - height, 0) + 1)
        left = rng.integers(max(mask.shape[1] - width, 0) + 1)
        window = np.s_[top : top + height, left : left + width]
        return to_tensors(image[window], mask[window], self.crop_size)


def resize_to_fit(image: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Resize image and mask to the largest size within `size` (H, W) that keeps their aspect ratio."""
    return resize(image, mask, fit_factor(mask.shape, size))


def fit_factor(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """The largest factor by which `shape` (h, w) fits `size` (H, W)."""
    return min(size[0] / shape[0], size[1] / shape[1])


def canvas_of(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """What fills `size` (H, W) at the factor by which `shape` (h, w) fits it: height and width of a padded image."""
    factor = fit_factor(shape, size)
    return tuple(round(side / factor) for side in size)


def resize(image: np.ndarray, mask: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale each side to int(side * factor + 0.5), at least 1: the image bilinearly, the mask by nearest pixel."""
    height, width = (max(int(side * factor + 0.5), 1) for side in mask.shape)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return image, mask


def to_tensors(image: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise with ImageNet's mean and std, then pad right and bottom: the image with 0, the mask with 255.

    Args:
        image, mask: RGB uint8 [h, w, 3] and uint8 [h, w]; h <= H and w <= W.
        size: (H, W).

    Returns:
        Image float32 [3, H, W], channels last in memory, and mask uint8 [H, W].
    """
    height, width = mask.shape
    labels = np.full(size, IGNORE_INDEX, np.uint8)
    labels[:height, :width] = mask
    return image_tensor(image, size), torch.from_numpy(labels)


def image_tensor(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The image of `to_tensors`."""
    height, width = image.shape[:2]
    pixels = np.zeros((*size, 3), np.float32)
    pixels[:height, :width] = cv2.LUT(np.ascontiguousarray(image), NORMALISED)
    return torch.from_numpy(pixels).permute(2, 0, 1)
