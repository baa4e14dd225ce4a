"""Evaluation: segment images and compare them with their masks."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import signals
from core.ranks import is_main, world_size
from engine.distributed import all_sum, sum_over_processes
from engine.metrics import confusion_matrix
from engine.precision import autocast, to_device
from model import POP
from model.kernels import needed, predict

# called with (image id, prediction, mask), integer tensors [h, w]
OnPrediction = Callable[[str, torch.Tensor, torch.Tensor], None]
BATCHES_BETWEEN_EXCHANGES = 8  # of several processes, which stop together


class Counted:
    """Counts the images of an evaluation: those that could not be read (--skip-bad-images) have no prediction.

    Args:
        on_prediction: gets the predictions.
    """

    def __init__(self, on_prediction: OnPrediction | None = None):
        self.on_prediction, self.images = on_prediction, 0

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]."""
        self.images += 1
        if self.on_prediction:
            self.on_prediction(image_id, prediction, truth)

    def total(self) -> int:
        """Number of images of all processes."""
        return sum_over_processes(self.images)[0]


@torch.no_grad()
def evaluate(
    net: POP,
    batches: Iterable[dict],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_prediction: OnPrediction | None = None,
) -> np.ndarray:
    """Segment images and compare them with their masks.

    Args:
        net: put into eval mode.
        batches: from `loaders.evaluation_loader`, or with 'maps' in place of 'image' (`features`).
        device, dtype: where and in which precision the network runs (`precision.precision`).
        on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].

    Returns:
        Confusion matrix of all processes' images, int64 [K, K], row = truth.
    """
    net.eval()
    confusion = torch.zeros(net.num_logits, net.num_logits, dtype=torch.int64, device=device)
    scores = net.score_prototypes()
    for batch in interruptible(tqdm(batches, 'evaluating', leave=False, disable=None if is_main() else True)):
        for reason in batch['skipped']:
            tqdm.write(f'skipped: {reason}')
        if not batch['id']:
            continue
        if 'maps' in batch:
            maps = batch['maps']
        else:
            with autocast(device, dtype):
                maps = net.maps(to_device(batch['image'], device))
        masks = batch['mask'].to(device, non_blocking=True)
        for group in _groups(batch['canvas'], device):
            shapes = batch['shape'][group]
            height, width = map(max, zip(*shapes, strict=True))
            truth = masks[group, :height, :width]
            shown = {name: values[group] for name, values in maps.items()}
            predictions = segment(net, shown, scores, batch['canvas'][group.start], (height, width), dtype)
            confusion += confusion_matrix(truth, predictions, net.num_logits)
            if on_prediction:
                for image_id, (h, w), prediction, mask in zip(
                    batch['id'][group], shapes, predictions, truth, strict=True
                ):
                    on_prediction(image_id, prediction[:h, :w], mask[:h, :w])
    return all_sum(confusion).cpu().numpy()


def interruptible(batches: Iterable[dict]) -> Iterator[dict]:
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
    *received, count, processes = sum_over_processes(*signals.received(), int(finished), 1)
    signals.raise_if_received(received)
    return count == processes


def segment(
    net: POP,
    maps: dict[str, torch.Tensor],
    scores: tuple[torch.Tensor, torch.Tensor],
    canvas: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Labels of images from their maps. What shows only padding is not computed.

    Args:
        net: classifies the maps.
        maps: of `POP.maps`, [B, channels, h, w] each.
        scores: the network's `score_prototypes()`.
        canvas: size that the whole maps are upsampled to.
        shape: (H, W) of the top left part that shows the images.
        dtype: of convolutions.

    Returns:
        int64 [B, H, W].
    """
    any_map = next(iter(maps.values()))
    sizes = any_map.shape[-2:]
    rows, columns = (needed(*sides) for sides in zip(shape, canvas, sizes, strict=True))
    with autocast(any_map.device, dtype):
        logits = net.classify({name: values[:, :, :rows, :columns] for name, values in maps.items()}, scores)
    logits = F.pad(logits, (0, sizes[1] - columns, 0, sizes[0] - rows))
    return predict(logits, canvas, shape)


def _groups(canvases: list[tuple[int, int]], device: torch.device) -> Iterator[slice]:
    """Split a batch into images that are classified at once.

    A GPU takes as many as have the same canvas. A CPU takes one: leaving out its padding saves more time there.
    """
    first = 0
    for i in range(1, len(canvases) + 1):
        if i == len(canvases) or device.type == 'cpu' or canvases[i] != canvases[first]:
            yield slice(first, i)
            first = i
