"""What takes the place of training where a method registers its novel classes (`Network.register`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dataset import SegmentationDataset
from engine.features import FrozenFeatures, LabelledFeatures
from engine.loaders import evaluation_loader
from engine.trainer import Trainer
from model import Network
from model.network import Labelled


class Registration(Trainer):
    """A trainer whose only epoch has no steps: the stage registers the novel classes."""

    def train_epoch(self):
        self.stage.register()


@dataclass(frozen=True)
class Supports:
    """The support images of each novel class, as `Network.register` takes them: a pass gives one batch per class.

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
