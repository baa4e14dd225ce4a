"""The loss terms: cross-entropy, orthogonality of POP's prototypes; and stage 2's pseudo-labels.

Dimensions: B batch, K logits, h x w feature size, H x W mask size.
"""

import torch
import torch.nn.functional as F

from core import IGNORE_INDEX
from model.kernels import predict, summed_cross_entropy

ORTHOGONALITY_WEIGHT = 10.0


def pop_losses(
    logits: torch.Tensor,
    mask: torch.Tensor,
    trained: torch.Tensor,
    fixed: torch.Tensor | None = None,
    *,
    pixel_weight: float | None = None,
    micro_batches: int = 1,
) -> dict[str, torch.Tensor]:
    """The terms of POP's objective; their sum is minimised: cross-entropy + 10 orthogonality.

    Args:
        logits: [B, K, h, w].
        mask: int64 [B, H, W].
        trained, fixed: prototypes, as in `orthogonality`.
        pixel_weight: as in `cross_entropy`.
        micro_batches: number of batches whose losses add up to that of one step.

    Returns:
        'ce' and 'orth', scalars.
    """
    orth = ORTHOGONALITY_WEIGHT * orthogonality(trained, fixed)
    return {'ce': cross_entropy(logits, mask, pixel_weight), 'orth': orth / micro_batches}


def cross_entropy(logits: torch.Tensor, mask: torch.Tensor, pixel_weight: float | None = None) -> torch.Tensor:
    """Cross-entropy -log softmax(upsampled logits)[mask], summed over pixels that are not ignored and weighted.

    Args:
        logits: [B, K, h, w]; upsampled to the mask, bilinear, align_corners=True.
        mask: labels 0..K-1 or 255 (ignored), int64 [B, H, W].
        pixel_weight: of every pixel; by default 1 / number of pixels that are not ignored, which gives the mean.

    Returns:
        Scalar; 0 if every pixel is ignored.

    The sum is, without full-size logits in memory,

        F.cross_entropy(F.interpolate(logits, mask.shape[-2:], mode='bilinear', align_corners=True), mask,
                        ignore_index=255, reduction='sum')
    """
    total = summed_cross_entropy(logits, mask)
    if pixel_weight is None:
        return total / (mask != IGNORE_INDEX).sum().clamp(min=1)
    return total * pixel_weight


def orthogonality(trained: torch.Tensor, fixed: torch.Tensor | None = None) -> torch.Tensor:
    """Mean |<s_i, s_j>| over the pairs of normalised prototypes that training can move, in float32 under autocast too.

    Args:
        trained: [K, C]; every pair i < j counts.
        fixed: [F, C]; every pair (trained, fixed) counts.

    Returns:
        Scalar in [0, 1]; 0 if there is no pair.
    """
    with torch.autocast(trained.device.type, enabled=False):
        s = F.normalize(trained, dim=1)
        rows, columns = torch.triu_indices(len(s), len(s), offset=1, device=s.device)
        overlaps = (s @ s.T)[rows, columns]
        if fixed is not None:
            overlaps = torch.cat([overlaps, (s @ F.normalize(fixed, dim=1).T).flatten()])
        return overlaps.abs().sum() / max(overlaps.numel(), 1)


def with_pseudo_labels(logits: torch.Tensor, masks: torch.Tensor, num_base: int, first_label: int = 0) -> torch.Tensor:
    """Masks of B support images, followed by those of B base images with `pseudo_label`.

    Args:
        logits: [2 B, 1 + Kb + Kn, h, w].
        masks: int64 [2 B, H, W].
        num_base, first_label: as `pseudo_label`.
    """
    count = len(masks) // 2
    return torch.cat([masks[:count], pseudo_label(masks[count:], logits[count:], num_base, first_label)])


@torch.no_grad()
def pseudo_label(mask: torch.Tensor, logits: torch.Tensor, num_base: int, first_label: int = 0) -> torch.Tensor:
    """Give background pixels of base images the novel class that the current model predicts there.

    Base images show unlabelled novel objects; without this, stage 2 would train the network to call them background.

    Args:
        mask: labels 0..Kb or 255, int64 [B, H, W].
        logits: [B, 1 + Kb + Kn, h, w].
        num_base: Kb.
        first_label: 1 where there is no background (`Network.first_label`): then the pixels with label 0 show novel
            classes only.

    Returns:
        A new mask; background pixels hold the argmax over background and the novel classes of the logits, upsampled
        to the mask.
    """
    candidates = torch.cat([logits[:, first_label:1], logits[:, 1 + num_base :]], dim=1)
    choice = predict(candidates, mask.shape[-2:]) + first_label
    novel = torch.where(choice > 0, choice + num_base, choice)
    return torch.where(mask == 0, novel, mask)
