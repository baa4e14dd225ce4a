"""Evaluation: segment images and compare them with their masks."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from core import signals
from core.ranks import is_main, world_size
from engine.distributed import all_sum
from engine.metrics import confusion_matrix
from engine.precision import autocast, to_device
from model.kernels.upsampling import needed, predict


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: Iterable[dict],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_prediction: Callable | None = None,
) -> np.ndarray:
    """Segment images and compare them with their masks.

    Args:
        net: a `POP` network; put into eval mode.
        batches: from `loaders.evaluation_loader`, or with 'features' in place of 'image' (`feature_cache`).
        device, dtype: where and in which precision the network runs (`precision.precision`).
        on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].

    Returns:
        Confusion matrix of all processes' images, int64 [K, K], row = truth.
    """
    net.eval()
    confusion = torch.zeros(net.num_logits, net.num_logits, dtype=torch.int64, device=device)
    scores = net.score_prototypes()
    for batch in tqdm(batches, 'evaluating', leave=False, disable=None if is_main() else True):
        if signals.asked() and world_size() == 1:  # several processes could not all stop at the same image
            raise signals.Stopped(signals.asked())
        for reason in batch.get('skipped', ()):
            tqdm.write(f'skipped: {reason}')
        if 'features' in batch:
            features = batch['features']
        elif 'image' in batch:
            with autocast(device, dtype):
                features = net.features(to_device(batch['image'], device))
        for i, mask in enumerate(batch['mask']):
            mask = mask.to(device, non_blocking=True)
            prediction = segment(net, features[i : i + 1], scores, batch['canvas'][i], mask.shape, dtype)
            confusion += confusion_matrix(mask, prediction, net.num_logits)
            if on_prediction:
                on_prediction(batch['id'][i], prediction, mask)
    return all_sum(confusion).cpu().numpy()


def segment(
    net: nn.Module,
    features: torch.Tensor,
    scores: tuple[torch.Tensor, torch.Tensor],
    canvas: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Labels of one image from its features. What shows only padding is not computed.

    Args:
        net: classifies the features.
        features: [1, C, h, w].
        scores: the network's `score_prototypes()`.
        canvas: size that the whole feature map is upsampled to.
        shape: (H, W) of the top left part that shows the image.
        dtype: of convolutions.

    Returns:
        int64 [H, W].
    """
    sizes = features.shape[-2:]
    rows, columns = (needed(*sides) for sides in zip(shape, canvas, sizes, strict=True))
    with autocast(features.device, dtype):
        logits = net.classify(features[:, :, :rows, :columns], scores)
    logits = F.pad(logits, (0, sizes[1] - columns, 0, sizes[0] - rows))
    return predict(logits, canvas, shape)[0]
