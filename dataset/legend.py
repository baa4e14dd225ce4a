"""Names and colours of labels."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np


@functools.cache
def voc_palette() -> np.ndarray:
    """PASCAL VOC's colours, uint8 [256, 3]: the bits of a value go to red, green and blue in turn, high bits first."""
    values = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((values >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


@functools.cache
def spread_palette() -> np.ndarray:
    """Colours that stay distinct with many classes, uint8 [256, 3]: hues at golden-ratio steps, three brightnesses."""
    values = np.arange(256)
    hue = values * 0.618034 % 1 * 360
    saturation = np.array([0.9, 0.55, 0.75])[values % 3]
    brightness = np.array([0.9, 1.0, 0.6])[values % 3]
    hsv = np.stack([hue, saturation, brightness], axis=1).astype(np.float32)
    palette = (255 * cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]).round().astype(np.uint8)
    return palette


PALETTES = {'voc': voc_palette, 'spread': spread_palette}
# a name in `PALETTES`, or (class id, RGB) of single classes, whose others have the colours of 'spread'
Palette = str | tuple[tuple[int, tuple[int, int, int]], ...]


def colors_of(palette: Palette, background: int | None = 0) -> np.ndarray:
    """Colours of the values in masks, uint8 [256, 3]; the background is black unless the palette gives it a colour."""
    named, own = (palette, ()) if isinstance(palette, str) else ('spread', palette)
    colors = PALETTES[named]().copy()
    if background is not None:
        colors[background] = 0
    for class_id, color in own:
        colors[class_id] = color
    return colors


@dataclass(frozen=True)
class Legend:
    """Names and colours of labels.

    Attributes:
        names: names of labels 0..K-1: background, base classes, novel classes.
        class_ids: class ids of the same labels, which are their values in masks.
        num_base: number of base classes.
        palette: the class id determines the colour, so a class has one colour in all folds.
        background: value of the background in masks. None: every pixel is of a class, so that nothing is predicted as
            label 0; its class id is then a value that no class has.
    """

    names: tuple[str, ...]
    class_ids: tuple[int, ...]
    num_base: int
    palette: Palette
    background: int | None = 0

    @classmethod
    def of(
        cls, classes: Sequence[tuple[int, str]], num_base: int, palette: Palette, background: int | None = 0
    ) -> 'Legend':
        """The legend of classes, (class id, name), in the order of their labels."""
        ids, names = zip(*classes, strict=True)
        if background is None:
            return cls(('no class', *names), (max(set(range(256)) - set(ids)), *ids), num_base, palette, None)
        return cls(('background', *names), (background, *ids), num_base, palette, background)

    @property
    def novel_labels(self) -> range:
        """Labels of the novel classes."""
        return range(self.num_base + 1, len(self.names))

    @property
    def classes(self) -> list[list]:
        """[class id, name] of each class in the order of the labels, as checkpoints store them."""
        return [list(pair) for pair in zip(self.class_ids, self.names, strict=True)][1:]

    @property
    def value_colors(self) -> np.ndarray:
        """Class id -> RGB colour, uint8 [256, 3]."""
        return colors_of(self.palette, self.background)

    @functools.cached_property
    def colors(self) -> np.ndarray:
        """Label -> RGB colour, uint8 [256, 3]; labels that name no class, such as 255, are white."""
        colors = np.full((256, 3), 255, np.uint8)
        colors[: len(self.class_ids)] = self.value_colors[list(self.class_ids)]
        return colors

    def cut(self, count: int) -> 'Legend':
        """The legend of the first `count` labels: a network of stage 1 has no novel classes."""
        return dataclasses.replace(self, names=self.names[:count], class_ids=self.class_ids[:count])

    def extended(self, classes: dict[str, int]) -> 'Legend':
        """The legend with further novel classes, name -> class id."""
        return dataclasses.replace(self, names=(*self.names, *classes), class_ids=(*self.class_ids, *classes.values()))
