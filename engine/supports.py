"""Support images as methods learn from them outside of training steps (`Network.start_from_supports`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dataset import SegmentationDataset
from engine.features import FrozenFeatures, LabelledFeatures
from engine.loaders import evaluation_loader
from model import Network
from model.network import Labelled


@dataclass(frozen=True)
class Supports:
    """The support images of each novel class: a pass computes their maps, and gives one batch per class.

    Attributes:
        images: evaluation items with masks of their size, class by class in the order of the labels.
        counts: K, the number of images of each class.
        frozen: gives the maps.
        device, dtype: where and in which precision it runs.
    """

    images: SegmentationDataset
    counts: Sequence[int]
    frozen: Network
    device: torch.device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Labelled]:
        first = 0
        for count in self.counts:
            rows = range(first, first + count)
            loader = evaluation_loader(self.images, count, num_workers=0, device=self.device, rows=rows)
            features = FrozenFeatures(self.frozen, loader, self.device, self.dtype)
            yield from LabelledFeatures(features, self.device)
            first += count
