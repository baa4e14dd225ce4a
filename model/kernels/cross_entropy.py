"""Cross-entropy of upsampled logits without holding them: band by band, gradient included.

Upsampled logits would be the largest tensors of a training step. Here a band of rows is upsampled, scored, and its
gradient brought back to the features' resolution, in place, before the next band is made.

Dimensions: B batch, K logits, h x w feature size, H x W mask size.
"""

import torch
from torch.autograd.function import once_differentiable

from core import IGNORE_INDEX
from model.kernels.upsampling import interpolation, row_bands, widened


def summed_cross_entropy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the pixels that are not ignored, in float32 (float64 stays) also under autocast.

    Args:
        logits: [B, K, h, w]; upsampled to the mask, bilinear, align_corners=True.
        mask: labels 0..K-1 or 255 (ignored), int64 [B, H, W].

    Returns:
        Scalar; 0 if every pixel is ignored.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _SummedCrossEntropy.apply(logits, mask)


class _SummedCrossEntropy(torch.autograd.Function):
    """Logits [B, K, h, w] and mask [B, H, W] to the sum; the forward pass computes the gradient too."""

    @staticmethod
    def forward(ctx, logits, mask):
        wide = widened(logits, mask.shape[-1])  # [B, K, h, W]
        gradient = torch.zeros_like(wide)
        total = wide.new_zeros(())
        for rows, cells, taps in row_bands(logits, mask.shape[-2:]):
            z = taps @ wide[:, :, cells]  # [B, K, rows, W]
            z -= z.amax(dim=1, keepdim=True)
            labels = mask[:, None, rows]
            counted = labels != IGNORE_INDEX
            labels = labels.where(counted, 0)
            total -= (z.gather(1, labels) * counted).sum()
            z.exp_()
            partition = z.sum(dim=1, keepdim=True)
            total += (partition.log() * counted).sum()
            # gradient of the sum: probability minus one-hot
            z *= counted / partition
            z.scatter_(1, labels, z.gather(1, labels) - counted.to(z.dtype))
            gradient[:, :, cells] += taps.T @ z
        across = interpolation(mask.shape[-1], logits.shape[-1], wide.dtype, wide.device)
        ctx.save_for_backward((gradient @ across).to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return scale.to(gradient.dtype) * gradient, None
