"""Bilinear upsampling of logits (align_corners=True), some rows at a time: full-size logits are never held whole.

Interpolation is linear and separable: with R [H, h] and C [W, w] the interpolation matrices of rows and columns, a map
x [h, w] is upsampled to R x C^T. A band of rows of R touches few columns of R, hence few rows of x C^T.

Dimensions: B batch, K logits, h x w feature size, H x W size upsampled to.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

# elements of a band: what stays in a CPU's caches, and what keeps a GPU busy
BAND_ELEMENTS = {'cpu': 2**20, 'cuda': 2**26}


def predict(logits, size, shape=None):
    """Labels of upsampled logits.

    Args:
        logits (Tensor): [B, K, h, w].
        size ((int, int)): (H, W) to upsample to.
        shape ((int, int), optional): compute only this top left part of the H x W labels.

    Returns:
        Tensor: int64 [B, *shape], the argmax over K.
    """
    height, width = shape or size
    with torch.autocast(logits.device.type, enabled=False):
        wide = widened(logits, size[1])[..., :width]
        bands = row_bands(logits, size, height)
        # max rather than argmax: several times faster over a dimension that is not the last
        return torch.cat([(taps @ wide[:, :, cells]).max(dim=1).indices for _, cells, taps in bands], dim=1)


def widened(logits, width):
    """Upsample the columns only: [B, K, h, w] to [B, K, h, width], in float32 (float64 stays).

    Call this and what multiplies its result outside of autocast, which would round the products.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits @ interpolation(width, logits.shape[-1], logits.dtype, logits.device).T


def row_bands(logits, size, height=None):
    """Cut the rows of an upsampling of `logits` to `size` into bands.

    Args:
        logits (Tensor): [B, K, h, w].
        size ((int, int)): (H, W).
        height (int, optional): only so many of the H rows.

    Yields:
        tuple: slice of upsampled rows; slice of the feature rows that they depend on; the band of R between them,
        [rows, feature rows], float32 (float64 for float64 logits).
    """
    batch, num_logits, source, _ = logits.shape
    height = height or size[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    matrix = interpolation(size[0], source, dtype, logits.device)
    step = max(BAND_ELEMENTS[logits.device.type] // (batch * num_logits * size[1]), 1)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first = max(top * (source - 1) // max(size[0] - 1, 1) - 1, 0)
        cells = slice(first, needed(bottom, size[0], source))
        yield slice(top, bottom), cells, matrix[top:bottom, cells]


def needed(count, size, source):
    """How many of `source` values the first `count` of `size` upsampled ones depend on.

    At most two more than exact quotients would say, as interpolation rounds them.
    """
    return min((count - 1) * (source - 1) // max(size - 1, 1) + 3, source)


@lru_cache(maxsize=64)
def interpolation(size, source, dtype, device):
    """The matrix [size, source] that upsamples `source` values linearly to `size`.

    Made by upsampling unit vectors, so that it is the interpolation that `F.interpolate` does.
    """
    units = torch.eye(source, dtype=dtype, device=device)[None]
    return F.interpolate(units, size, mode='linear', align_corners=True)[0].T.contiguous()
