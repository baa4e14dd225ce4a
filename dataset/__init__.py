"""Data sets of both stages and of evaluation, made from a `DatasetSpec` and list files."""

from dataset.classes import DATASETS
from dataset.fewshot import FewShotDataset
from dataset.fold import FoldData
from dataset.images import Photographs
from dataset.segmentation import SegmentationDataset
from dataset.spec import DatasetSpec
from dataset.transforms import Augmentation

__all__ = [
    'DATASETS', 'Augmentation', 'DatasetSpec', 'FewShotDataset', 'FoldData', 'Photographs', 'SegmentationDataset'
]  # fmt: skip
