"""Evaluation: segment images and compare them with their masks."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import signals
from core.ranks import is_main, world_size
from engine.distributed import all_sum, sum_over_processes
from engine.metrics import confusion_matrix
from engine.precision import autocast, to_device
from model import Network
from model.kernels import needed, predict

# called with (image id, prediction, mask), integer tensors [h, w]
OnPrediction = Callable[[str, torch.Tensor, torch.Tensor], None]
NEVER = -1e4  # a logit that no class falls below; float16 holds it too
COUNTED_AT_ONCE = 2**24  # pixels: counting takes several times their memory
BATCHES_BETWEEN_EXCHANGES = 8  # of several processes, which stop together


class Counted:
    """Counts the images of an evaluation: those that could not be read (--skip-bad-images) have no prediction.

    Args:
        writers: get the predictions, in turn; None is none.
    """

    def __init__(self, *writers: OnPrediction | None):
        self.writers, self.images = [write for write in writers if write], 0

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]."""
        self.images += 1
        for write in self.writers:
            write(image_id, prediction, truth)

    def total(self) -> int:
        """Number of images of all processes."""
        return sum_over_processes(self.images)[0]


class Segmented(NamedTuple):
    """Images that were segmented together.

    Attributes:
        ids, shapes: of each, image id and (h, w).
        predictions, truth: labels, integer [B, H, W]; what is outside of an image's shape is not counted.
    """

    ids: list[str]
    shapes: list[tuple[int, int]]
    predictions: torch.Tensor
    truth: torch.Tensor


def evaluate(
    net: Network,
    batches: Iterable[dict],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_prediction: OnPrediction | None = None,
) -> np.ndarray:
    """Segment images in one pass each and compare them with their masks.

    Args:
        net: put into eval mode.
        batches: from `loaders.evaluation_loader`, or with 'maps' in place of 'image' (`features`).
        device, dtype: where and in which precision the network runs (`precision.precision`).
        on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].

    Returns:
        Confusion matrix of all processes' images, int64 [K, K], row = truth.
    """
    return compare(one_pass(net, batches, device, dtype), net.num_logits, device, on_prediction)


def compare(
    images: Iterable[Segmented], num_logits: int, device: torch.device, on_prediction: OnPrediction | None = None
) -> np.ndarray:
    """Compare predictions with masks.

    Args:
        images: of this process.
        num_logits: K.
        device: of the predictions.
        on_prediction: called with (id, prediction, mask) of each image, integer tensors [h, w].

    Returns:
        Confusion matrix of all processes' images, int64 [K, K], row = truth.
    """
    confusion = torch.zeros(num_logits, num_logits, dtype=torch.int64, device=device)
    for ids, shapes, predictions, truth in images:
        rows = max(COUNTED_AT_ONCE // truth[:, 0].numel(), 1)
        for part in zip(truth.split(rows, dim=1), predictions.split(rows, dim=1), strict=True):
            confusion += confusion_matrix(*part, num_logits)
        if on_prediction:
            for image_id, (h, w), prediction, mask in zip(ids, shapes, predictions, truth, strict=True):
                on_prediction(image_id, prediction[:h, :w], mask[:h, :w])
    return all_sum(confusion).cpu().numpy()


@torch.no_grad()
def one_pass(
    net: Network, batches: Iterable[dict], device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[Segmented]:
    """Segment images in one pass each; arguments as `evaluate`."""
    net.eval()
    constants = net.constants()
    for batch in readable(batches):
        with autocast(device, dtype):
            maps = batch['maps'] if 'maps' in batch else net.maps(to_device(batch['image'], device))
            maps = net.finish_maps(maps)
        masks = batch['mask'].to(device, non_blocking=True)
        # where classes depend on the whole image, what is shown of it must not depend on the others in the batch
        alike = batch['canvas'] if net.POSITIONWISE else list(zip(batch['canvas'], batch['shape'], strict=True))
        for group in _groups(alike, device):
            shapes = batch['shape'][group]
            height, width = map(max, zip(*shapes, strict=True))
            shown = {name: values[group] for name, values in maps.items()}
            canvas, shape = batch['canvas'][group.start], (height, width)
            predictions = predict(visible_logits(net, shown, constants, canvas, shape, dtype), canvas, shape)
            yield Segmented(batch['id'][group], shapes, predictions, masks[group, :height, :width])


def readable(batches: Iterable[dict], total: int | None = None) -> Iterator[dict]:
    """Yield the batches that hold an image, with a progress bar, reasons for what is skipped, and a way to interrupt.

    Args:
        batches: of this process; 'skipped' is a list of reasons or a reason.
        total: number of batches, where they do not have it.
    """
    bar = tqdm(batches, 'evaluating', total, leave=False, disable=None if is_main() else True)
    for batch in interruptible(bar):
        skipped = batch['skipped']
        for reason in [skipped] if isinstance(skipped, str) else skipped:
            if reason:
                tqdm.write(f'skipped: {reason}')
        if batch.get('id'):
            yield batch


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


def visible_logits(
    net: Network,
    maps: dict[str, torch.Tensor],
    constants: tuple[torch.Tensor, torch.Tensor] | None,
    canvas: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of images from their maps. What shows only padding is not computed.

    Args:
        net: classifies the maps.
        maps: of `Network.finish_maps`, [B, channels, h, w] each.
        constants: the network's `constants()`.
        canvas: size that the whole maps are upsampled to.
        shape: (H, W) of the top left part that shows the images.
        dtype: of convolutions.

    Returns:
        [B, K, h, w], zero where they show only padding.
    """
    any_map = next(iter(maps.values()))
    sizes = any_map.shape[-2:]
    count = needed if net.POSITIONWISE else _shown
    rows, columns = (count(*sides) for sides in zip(shape, canvas, sizes, strict=True))
    with autocast(any_map.device, dtype):
        logits = net.classify({name: values[:, :, :rows, :columns] for name, values in maps.items()}, constants)
    logits[:, : net.first_label] = NEVER
    return F.pad(logits, (0, sizes[1] - columns, 0, sizes[0] - rows))


def _shown(count: int, size: int, source: int) -> int:
    """As `needed`, without positions beyond the image, whose weights are 0 but for rounding."""
    return -(-(count - 1) * (source - 1) // max(size - 1, 1)) + 1


def _groups(alike: list[tuple], device: torch.device) -> Iterator[slice]:
    """Split a batch into images that are classified at once.

    A GPU takes neighbours that are alike. A CPU takes one: leaving out its padding saves more time there.
    """
    first = 0
    for i in range(1, len(alike) + 1):
        if i == len(alike) or device.type == 'cpu' or alike[i] != alike[first]:
            yield slice(first, i)
            first = i
