"""Test-time augmentation and sliding windows (--slide --scale --flip --scales): several views of a photograph.

A view shows the photograph resized by one factor, in one window or in several overlapping ones. The logits of a view's
windows are blended: where windows overlap, they are averaged with weights that fall linearly toward a window's border.
The class probabilities (softmax) of all views are averaged.

Interpolation and blending are linear, and the weight of a pixel is one of its row times one of its column. So, with
L_ij [h, w] a class's logits of window (i, j), R_i [rows, h] and C_j [columns, w] the interpolation matrices, and u_i
and v_j the weights of its rows and columns, the blended logits of the photograph are

    sum_i diag(u_i) R_i (sum_j L_ij (diag(v_j) C_j)^T)

They are computed for a few rows at a time. In memory are the photograph, its labels, and the inner sums of the windows
that these rows touch, whatever the height of the photograph.

Dimensions: K logits, H x W photograph, h x w features of a window.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import signals
from core.ranks import is_main, rank, world_size
from dataset import SegmentationDataset
from dataset.transforms import canvas_of, fit_factor, image_tensor
from engine.evaluation import Segmented, readable, visible_logits
from engine.loaders import EVALUATION_BATCH
from engine.precision import autocast, to_device
from model import Network
from model.kernels import bands, cells_of, interpolation

# called with (image id, confidence of the predicted labels), uint8 [H, W], 255 is 1
OnConfidence = Callable[[str, torch.Tensor], None]
STRIDE = (2, 3)  # of a window's side, at most


@dataclass(frozen=True)
class View:
    """A photograph as the network sees it.

    Attributes:
        factor: by which the photograph is resized.
        window: (H, W) of the network's input.
        canvas: what fills a window, (height, width) in pixels of the photograph.
        mirrored: left and right are exchanged.
    """

    factor: float
    window: tuple[int, int]
    canvas: tuple[int, int]
    mirrored: bool


@dataclass(frozen=True)
class Views:
    """Which views of a photograph are segmented: test-time augmentation.

    Attributes:
        scale: windows slide over the photograph resized by this factor; None: the photograph is resized to fit one.
        scales: views are resized by each of these factors in addition.
        flip: there is a mirrored view for each other one.
    """

    scale: float | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __str__(self) -> str:
        """What differs from one pass, in words; '' if nothing."""
        parts = [f'windows at scale {self.scale:g}'] if self.scale else []
        if self.scales != (1.0,):
            parts.append(f'{"times" if self.scale else "scales"} {", ".join(f"{scale:g}" for scale in self.scales)}')
        return ', '.join([*parts, *(['mirrored too'] if self.flip else [])])

    def of(self, shape: tuple[int, int], size: tuple[int, int]) -> list[View]:
        """The views of a photograph of `shape` (height, width) for a network whose input has `size` (H, W)."""
        views = []
        for more in self.scales:
            if self.scale:
                factor, window = self.scale * more, size
                canvas = tuple(max(round(side / factor), 1) for side in size)
            else:
                window = tuple(max(round(side * more), 1) for side in size)
                factor, canvas = fit_factor(shape, window), canvas_of(shape, window)
            views += [View(factor, window, canvas, mirrored) for mirrored in ((False, True) if self.flip else (False,))]
        return views


@dataclass(frozen=True)
class Axis:
    """Windows along the rows or the columns of a photograph.

    Attributes:
        starts: their first pixels.
        side: their length in pixels of the photograph.
        seen: the same as the network sees it, without padding.
        canvas: what fills a window, in pixels of the photograph.
        weights: of each window's pixels, float32 [windows, side]; at each pixel, those of all windows sum to one.
    """

    starts: Sequence[int]
    side: int
    seen: int
    canvas: int
    weights: torch.Tensor

    @classmethod
    def over(cls, length: int, view: View, axis: int) -> 'Axis':
        """Windows at equal distances, at most 2/3 of a window, over `length` pixels; axis 0 are the rows."""
        window, canvas = view.window[axis], view.canvas[axis]
        side = min(length, canvas)
        steps = -(-(length - side) // max(side * STRIDE[0] // STRIDE[1], 1))
        starts = [round(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]
        tent = np.minimum(np.arange(side) + 1, side - np.arange(side)).astype(np.float64)
        total = np.zeros(length)
        for start in starts:
            total[start : start + side] += tent
        weights = np.stack([tent / total[start : start + side] for start in starts])
        seen = window if steps else min(max(int(side * view.factor + 0.5), 1), window)  # as `transforms.resize`
        return cls(starts, side, seen, canvas, torch.from_numpy(weights).float())


class Blended:
    """Blended logits of one view of a photograph, which are asked for from top to bottom.

    Args:
        network: gives the logits of windows.
        photograph: RGB uint8 [H, W, 3].
        view: what the network sees of it.
        bar: counts the windows.
    """

    def __init__(self, network: 'WindowLogits', photograph: np.ndarray, view: View, bar: tqdm):
        self.network, self.photograph, self.view, self.bar = network, photograph, view, bar
        self.rows, self.columns = (Axis.over(photograph.shape[axis], view, axis) for axis in (0, 1))
        self._row_weights, self._column_weights = (
            axis.weights[:, :, None].to(network.device) for axis in (self.rows, self.columns)
        )
        self._windows = self._all_windows()
        self._waiting = deque(enumerate(self.rows.starts))
        self._open = []  # of windows that the present rows touch: number, first row, logits [K, h, W]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.rows.starts) * len(self.columns.starts)

    def band(self, top: int, bottom: int) -> torch.Tensor:
        """Logits of rows top..bottom-1, float32 [K, rows, W]; not above those of the last call."""
        side, canvas = self.rows.side, self.rows.canvas
        self._open = [each for each in self._open if each[1] + side > top]
        while self._waiting and self._waiting[0][1] < bottom:
            number, start = self._waiting.popleft()
            self._open.append((number, start, self._row_of_windows()))
        blended = None
        for number, start, wide in self._open:
            first, last = max(top - start, 0), min(bottom - start, side)
            cells = cells_of(first, last, canvas, wide.shape[1])
            taps = self._interpolation(canvas, wide.shape[1])[first:last, cells] * self._row_weights[number, first:last]
            part = taps @ wide[:, cells]
            part = F.pad(part, (0, 0, start + first - top, bottom - start - last))
            blended = part if blended is None else blended + part
        return blended

    def _row_of_windows(self):
        """The next row of windows, blended along the columns: [K, h, W]."""
        wide = None
        # the windows last: of the next row, zip takes none
        for weights, start, logits in zip(self._column_weights, self.columns.starts, self._windows, strict=False):
            if wide is None:
                wide = logits.new_zeros(*logits.shape[:2], self.photograph.shape[1])
            taps = self._interpolation(self.columns.canvas, logits.shape[2])[: self.columns.side]
            taps = (taps.flip(0) if self.view.mirrored else taps) * weights
            wide[:, :, start : start + self.columns.side] += logits @ taps.T
        return wide

    def _interpolation(self, size, source):
        return interpolation(size, source, torch.float32, self.network.device)

    def _all_windows(self):
        """Logits [K, h, w] of all windows, row by row."""
        places = ((top, left) for top in self.rows.starts for left in self.columns.starts)
        while batch := list(islice(places, self.network.batch_size)):
            images = torch.stack([self._window(*place) for place in batch])
            yield from self.network(images, self.view.canvas, (self.rows.side, self.columns.side))
            self.bar.update(len(batch))

    def _window(self, top, left):
        """What the network sees of a window, float32 [3, H, W]."""
        pixels = self.photograph[top : top + self.rows.side, left : left + self.columns.side]
        size = (self.columns.seen, self.rows.seen)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)  # as in training
        return image_tensor(pixels[:, ::-1] if self.view.mirrored else pixels, self.view.window)


class WindowLogits:
    """Gives the logits of windows.

    Args:
        net: in eval mode, on the device.
        device, dtype: where and in which precision it runs.
        batch_size: windows at a time; None: `EVALUATION_BATCH` of the device.
    """

    def __init__(self, net: Network, device: torch.device, dtype: torch.dtype, batch_size: int | None):
        self.net, self.device, self.dtype = net, device, dtype
        self.batch_size = batch_size or EVALUATION_BATCH[device.type]
        self.constants = net.constants()

    def __call__(self, images: torch.Tensor, canvas: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
        """Logits, float32 [B, K, h, w].

        Args:
            images: float32 [B, 3, H, W].
            canvas: what fills them, in pixels of the photograph.
            shape: how much of that they show, at the top left.
        """
        if world_size() == 1:  # several processes stop together, between photographs
            signals.raise_if_received()
        with autocast(self.device, self.dtype):
            maps = self.net.finish_maps(self.net.maps(to_device(images, self.device)))
        return visible_logits(self.net, maps, self.constants, canvas, shape, self.dtype).float()


def segment_views(
    network: WindowLogits, photograph: np.ndarray, views: Sequence[View]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment a photograph by the mean of its views' class probabilities.

    Args:
        network: gives the logits of windows.
        photograph: RGB uint8 [H, W, 3].
        views: at least one.

    Returns:
        Labels, and the mean probability of each pixel's label times 255; uint8 [H, W] each, on the network's device.
    """
    height, width = photograph.shape[:2]
    labels = torch.empty(height, width, dtype=torch.uint8, device=network.device)
    confidence = torch.empty_like(labels)
    # windows may take long; so that short work is not disturbed, the bar waits
    with tqdm(desc='windows', leave=False, delay=3, disable=None if is_main() else True) as bar:
        blended = [Blended(network, photograph, view, bar) for view in views]
        bar.total = sum(map(len, blended))
        for top, bottom in bands(height, network.net.num_logits * width, network.device):
            if len(blended) == 1:
                logits = blended[0].band(top, bottom)
                best, best_labels = logits.max(dim=0)
                probability = (best - logits.logsumexp(dim=0)).exp()
            else:
                mean = sum(view.band(top, bottom).softmax(dim=0) for view in blended) / len(blended)
                probability, best_labels = mean.max(dim=0)
            labels[top:bottom] = best_labels
            confidence[top:bottom] = probability.mul(255).round()
    return labels, confidence


@torch.no_grad()
def segmented_views(
    network: WindowLogits,
    dataset: SegmentationDataset,
    views: Views,
    *,
    read_ahead: bool = False,
    on_confidence: OnConfidence | None = None,
) -> Iterator[Segmented]:
    """Segment this process's share of the images by views of them.

    Args:
        network: gives the logits of windows.
        dataset: evaluation images and masks at their original size.
        views: which views.
        read_ahead: read the next image, in a thread, while this one is segmented.
        on_confidence: called with (id, confidence) of each image before its labels are yielded.
    """
    rows = range(rank(), len(dataset), world_size())
    items = _read_ahead(dataset, rows) if read_ahead else map(dataset.original, rows)
    for item in readable(items, len(rows)):
        photograph, mask = item.pop('image'), item.pop('mask')
        labels, confidence = segment_views(network, photograph, views.of(mask.shape, dataset.fit_size))
        del photograph
        if on_confidence:
            on_confidence(item['id'], confidence)
        del confidence
        yield Segmented([item['id']], [mask.shape], labels[None], torch.from_numpy(mask)[None].to(network.device))


def _read_ahead(dataset, rows):
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for index in rows:
            following = pool.submit(dataset.original, index)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()
