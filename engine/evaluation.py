"""Evaluation: segment images and compare them with their masks."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from core import signals
from core.ranks import is_main, world_size
from engine.distributed import all_sum, sum_over_processes
from engine.metrics import confusion_matrix
from engine.precision import autocast, to_device
from model.kernels.upsampling import needed, predict

BATCHES_BETWEEN_EXCHANGES = 8  # of several processes, which stop together


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
    for batch in _interruptible(tqdm(batches, 'evaluating', leave=False, disable=None if is_main() else True)):
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


def _interruptible(batches: Iterable[dict]) -> Iterator[dict]:
    """Yield batches; when a signal has reached a process, raise Stopped in all of them after the same exchange.

    Processes may have different numbers of batches. One that has finished takes part until all have.
    """
    every = 1 if world_size() == 1 else BATCHES_BETWEEN_EXCHANGES
    for i, batch in enumerate(batches):
        if i % every == 0:
            _exchange_signals(finished=False)
        yield batch
    while not _exchange_signals(finished=True):
        pass


def _exchange_signals(finished):
    """Whether all processes have finished; Stopped where a signal has reached one of them."""
    *asked, count = sum_over_processes(*signals.flags(), int(finished))
    if any(asked):
        raise signals.stop(asked)
    return count == world_size()


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
