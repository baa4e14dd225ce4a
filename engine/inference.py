"""A network made ready to segment images."""

import numpy as np
import torch

from dataset import SegmentationDataset
from engine.evaluation import OnPrediction, compare, evaluate
from engine.loaders import evaluation_loader
from engine.precision import compile_features
from engine.sliding import OnConfidence, Views, WindowLogits, segmented_views
from model import Network
from model.kernels import fuse


class Segmenter:
    """Segments data sets with a network whose batch normalisations are fused into its convolutions.

    Args:
        net: with its final weights.
        device, dtype: where and in which precision it runs (`precision.precision`).
        compiled: torch.compile backbone and decoder.
        views: how photographs are shown to the network; by default in one pass.

    Attributes:
        net: the fused network, on the device.
    """

    def __init__(
        self, net: Network, device: torch.device, dtype: torch.dtype, compiled: bool = False, views: Views | None = None
    ):
        self.net, self.device, self.dtype = fuse(net.to(device), dtype), device, dtype
        self.views = views or Views()
        if compiled:
            compile_features(self.net, frozen=True)

    def run(
        self,
        dataset: SegmentationDataset,
        on_prediction: OnPrediction | None = None,
        on_confidence: OnConfidence | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> np.ndarray:
        """Segment this process's share of the images; see `evaluation.evaluate`.

        Args:
            dataset: evaluation images and masks.
            on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].
            on_confidence: called with (id, confidence) of each image before that, uint8 [h, w]: the probability of each
                pixel's label times 255.
            batch_size: images, or windows, at a time; None: as `loaders.evaluation_loader` chooses.
            num_workers: loader processes. Views are made from photographs that one thread reads, or none.

        Returns:
            Confusion matrix of all processes' images, int64 [K, K], row = truth.
        """
        if on_confidence or self.views != Views():
            network = WindowLogits(self.net, self.device, self.dtype, batch_size)
            images = segmented_views(
                network, dataset, self.views, read_ahead=num_workers > 0, on_confidence=on_confidence
            )
            return compare(images, self.net.num_logits, self.device, on_prediction)
        loader = evaluation_loader(dataset, batch_size, num_workers=num_workers, device=self.device)
        return evaluate(self.net, loader, self.device, self.dtype, on_prediction)
