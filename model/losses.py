"""The two loss terms of POP and stage 2's pseudo-labels.

Dimensions: B batch, K logits, h x w feature size, H x W mask size.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from core import IGNORE_INDEX
from engine.distributed import world_size
from model.kernels.upsampling import interpolation, predict, row_bands, widened

ORTHOGONALITY_WEIGHT = 10.0


def cross_entropy(logits, mask, pixels=None):
    """Mean cross-entropy over the pixels of a batch that are not ignored.

    Args:
        logits (Tensor): [B, K, h, w]; upsampled to the mask.
        mask (Tensor): labels 0..K-1 or 255 (ignored), int64 [B, H, W].
        pixels (int, optional): where the batch is shared out to processes or taken in parts, the pixels of all of it.
            Parts' losses then add up to that of the whole, and processes' losses have it as their mean.

    Returns:
        Tensor: scalar; 0 where every pixel is ignored.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total = _UpsampledCrossEntropy.apply(logits, mask)
    if pixels is None:
        return total / (mask != IGNORE_INDEX).sum().clamp(min=1)
    return total * (world_size() / max(pixels, 1))


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits upsampled to a mask, summed; arguments as in `cross_entropy`.

    Upsampled logits would be the largest tensors of a training step. Here a band of rows is upsampled, scored and its
    gradient brought back to the features' resolution, in place, before the next one is made.
    """

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


def orthogonality(trained, fixed=None):
    """Mean |<s_i, s_j>| of the pairs of prototypes that training can still move apart (float32 under autocast too).

    Args:
        trained (Tensor): [K, C]; every pair i < j counts.
        fixed (Tensor, optional): [F, C]; every pair (trained, fixed) counts.

    Returns:
        Tensor: scalar in [0, 1]; 0 where there is no pair.
    """
    with torch.autocast(trained.device.type, enabled=False):
        s = F.normalize(trained, dim=1)
        rows, columns = torch.triu_indices(len(s), len(s), offset=1, device=s.device)
        overlaps = (s @ s.T)[rows, columns]
        if fixed is not None:
            overlaps = torch.cat([overlaps, (s @ F.normalize(fixed, dim=1).T).flatten()])
        return overlaps.abs().sum() / max(overlaps.numel(), 1)


def pop_losses(logits, mask, trained, fixed=None, pixels=None, parts=1):
    """The terms of POP's objective, weighted; their sum is what is minimised.

    Args:
        logits (Tensor): [B, K, h, w].
        mask (Tensor): int64 [B, H, W].
        trained, fixed: the prototypes, as in `orthogonality`.
        pixels (int, optional): as in `cross_entropy`.
        parts (int): how many of such losses add up to that of a step.

    Returns:
        dict: 'ce' and 'orth', scalar tensors.
    """
    orth = ORTHOGONALITY_WEIGHT * orthogonality(trained, fixed)
    return {'ce': cross_entropy(logits, mask, pixels), 'orth': orth / parts}


@torch.no_grad()
def pseudo_label(mask, logits, num_base):
    """Give background pixels of base images the novel class that the current model sees there.

    Base images show unlabelled novel objects; without this, stage 2 would learn to call them background.

    Args:
        mask (Tensor): labels 0..Kb or 255, int64 [B, H, W].
        logits (Tensor): [B, 1 + Kb + Kn, h, w].
        num_base (int): Kb.

    Returns:
        Tensor: a new mask; background pixels hold the argmax over background and the novel classes.
    """
    candidates = torch.cat([logits[:, :1], logits[:, 1 + num_base :]], dim=1)
    choice = predict(candidates, mask.shape[-2:])
    novel = torch.where(choice > 0, choice + num_base, choice)
    return torch.where(mask == 0, novel, mask)
