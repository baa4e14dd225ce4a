"""Support images as methods learn from them outside of training steps (`Network.start_from_supports`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from core.errors import InputError, some
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
        counts: name of each class -> K, the number of its images.
        frozen: gives the maps.
        device, dtype: where and in which precision it runs.
    """

    images: SegmentationDataset
    counts: Mapping[str, int]
    frozen: Network
    device: torch.device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Labelled]:
        first = 0
        for label, (name, count) in enumerate(self.counts.items(), 1 + self.frozen.num_base):
            rows = range(first, first + count)
            loader = evaluation_loader(self.images, count, num_workers=0, device=self.device, rows=rows)
            features = FrozenFeatures(self.frozen, loader, self.device, self.dtype)
            for images in LabelledFeatures(features, self.device):
                if not (images.masks == label).any():
                    height, width = images.masks.shape[1:]
                    raise InputError(
                        f'no support image shows {name} when it is shrunk to {width}x{height} '
                        f'({some(self.images.image_ids[first : first + count])}): its objects are too small. Choose '
                        'other images, or a larger --base-size.'
                    )
                yield images
            first += count
