"""Bilinear upsampling of logits (align_corners=True), a band of rows at a time: full-size logits are never in memory.

Interpolation is linear and separable: with R [H, h] and C [W, w] the interpolation matrices of rows and columns, a map
x [h, w] is upsampled to R x C^T. A band of rows of R touches few columns of R, hence few rows of x C^T.

Dimensions: B batch, K logits, h x w feature size, H x W size upsampled to.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

# elements of a band: few enough for a CPU's caches, enough to keep a GPU busy
BAND_ELEMENTS = {'cpu': 2**20, 'cuda': 2**26}


def predict(logits: torch.Tensor, size: tuple[int, int], shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Labels of upsampled logits, the argmax over K.

    Args:
        logits: [B, K, h, w].
        size: (H, W) to upsample to.
        shape: height and width of the top left part of the H x W labels to compute; all by default.

    Returns:
        int64 [B, *shape].
    """
    height, width = shape or size
    with torch.autocast(logits.device.type, enabled=False):
        wide = widened(logits, size[1])[..., :width]
        # max rather than argmax: several times faster over a dimension that is not the last
        return torch.cat(
            [(taps @ wide[:, :, cells]).max(dim=1).indices for _, cells, taps in row_bands(logits, size, height)], dim=1
        )


def widened(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Upsample the columns only: [B, K, h, w] to [B, K, h, width], in float32 (float64 stays).

    Call this, and multiply its result, with autocast disabled: it would round the products.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits @ interpolation(width, logits.shape[-1], logits.dtype, logits.device).T


def row_bands(
    logits: torch.Tensor, size: tuple[int, int], height: int | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Cut the rows of an upsampling of `logits` to `size` into bands.

    Args:
        logits: [B, K, h, w].
        size: (H, W).
        height: only so many of the H rows; all by default.

    Yields:
        Slice of upsampled rows; slice of the feature rows that they depend on; the band of R between them,
        [rows, feature rows], float32 (float64 for float64 logits).
    """
    batch, num_logits, source, _ = logits.shape
    height = height or size[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    matrix = interpolation(size[0], source, dtype, logits.device)
    for top, bottom in bands(height, batch * num_logits * size[1], logits.device):
        cells = cells_of(top, bottom, size[0], source)
        yield slice(top, bottom), cells, matrix[top:bottom, cells]


def bands(height: int, row_elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut rows of so many elements into bands: (first row, row after the last) of each."""
    step = max(BAND_ELEMENTS[device.type] // row_elements, 1)
    for top in range(0, height, step):
        yield top, min(top + step, height)


def cells_of(top: int, bottom: int, size: int, source: int) -> slice:
    """Which of `source` values the upsampled values top..bottom-1 of `size` depend on; perhaps a few more."""
    first = max(top * (source - 1) // max(size - 1, 1) - 1, 0)
    return slice(first, needed(bottom, size, source))


def needed(count: int, size: int, source: int) -> int:
    """How many of `source` values the first `count` of `size` upsampled values depend on.

    At most two more than the exact quotient says, as interpolation rounds its positions.
    """
    return min((count - 1) * (source - 1) // max(size - 1, 1) + 3, source)


@lru_cache(maxsize=64)
def interpolation(size: int, source: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix [size, source] that upsamples `source` values linearly to `size`.

    It is made by upsampling unit vectors, so it does the interpolation of `F.interpolate`.
    """
    units = torch.eye(source, dtype=dtype, device=device)[None]
    return F.interpolate(units, size, mode='linear', align_corners=True)[0].T.contiguous()
