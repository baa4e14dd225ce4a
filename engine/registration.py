"""What takes the place of training where a method registers its novel classes (`Network.register`)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from core import IGNORE_INDEX
from dataset import SegmentationDataset
from engine.features import FrozenFeatures
from engine.loaders import evaluation_loader
from engine.trainer import Trainer
from model import Network
from model.network import Maps


class Registration(Trainer):
    """A trainer whose only epoch has no steps: the stage registers the novel classes."""

    def train_epoch(self):
        self.stage.register()


def supports_by_class(
    supports: SegmentationDataset, counts: Sequence[int], frozen: Network, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Maps, torch.Tensor]]:
    """The support images of each novel class, as `Network.register` takes them.

    Args:
        supports: evaluation items with masks of their size, class by class in the order of the labels.
        counts: K, the number of items of each class.
        frozen: gives the maps.
        device, dtype: where and in which precision it runs.

    Yields:
        Maps, and masks int64 [K, H, W] of the size of the images with their padding, which is not counted.
    """
    first = 0
    for count in counts:
        rows = range(first, first + count)
        loader = evaluation_loader(supports, count, num_workers=0, device=device, rows=rows)
        (batch,) = FrozenFeatures(frozen, loader, device, dtype)
        missing = [whole - side for whole, side in zip(supports.fit_size, batch['mask'].shape[1:], strict=True)]
        masks = F.pad(batch['mask'], (0, missing[1], 0, missing[0]), value=IGNORE_INDEX)
        yield batch['maps'], masks.to(device).long()
        first += count
