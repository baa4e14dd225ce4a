"""A network made ready to segment images."""

import numpy as np
import torch
from torch.utils.data import Dataset

from engine.evaluation import OnPrediction, evaluate
from engine.loaders import evaluation_loader
from engine.precision import compile_features
from model import POP
from model.kernels import fuse


class Segmenter:
    """Segments data sets with a network whose batch normalisations are fused into its convolutions.

    Args:
        net: with its final weights.
        device, dtype: where and in which precision it runs (`precision.precision`).
        compiled: torch.compile backbone and decoder.

    Attributes:
        net: the fused network, on the device.
    """

    def __init__(self, net: POP, device: torch.device, dtype: torch.dtype, compiled: bool = False):
        self.net, self.device, self.dtype = fuse(net.to(device), dtype), device, dtype
        if compiled:
            compile_features(self.net, frozen=True)

    def run(
        self,
        dataset: Dataset,
        on_prediction: OnPrediction | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> np.ndarray:
        """Segment this process's share of a `SegmentationDataset`; see `evaluation.evaluate`.

        Args:
            dataset: evaluation images and masks.
            on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].
            batch_size: per process; None: as `loaders.evaluation_loader` chooses.
            num_workers: loader processes.

        Returns:
            Confusion matrix of all processes' images, int64 [K, K], row = truth.
        """
        loader = evaluation_loader(dataset, batch_size, num_workers=num_workers, device=self.device)
        return evaluate(self.net, loader, self.device, self.dtype, on_prediction)
