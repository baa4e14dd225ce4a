"""The whole method written plainly from the paper's equations (Liu et al., CVPR 2023): start reading here.

A 512-channel map of each class goes through the MLP, the pyramid is upsampled and concatenated, losses are computed on
full-size logits. The functions work on the parameters of a `POP` network, in whatever type these have. Tests check the
fast forms against this one, and the benchmarks measure their speed by it.

Dimensions: B batch, C feature channels, Cb backbone channels, Kb base classes, Kn novel classes, K = 1 + Kb + Kn
logits, h x w feature size, H x W mask size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from core import IGNORE_INDEX
from model.backbones import build_backbone
from model.pop import POP
from model.psp import PSP


class Reference(nn.Module):
    """A POP network computed plainly; `net` has the weights that `build_model` gives with the same seed.

    Args: those of `build_model`.
    """

    def __init__(self, backbone: str, num_base: int, num_novel: int = 0, output_stride: int = 8) -> None:
        super().__init__()
        features = build_backbone(backbone, output_stride)
        self.net = POP(features, PSP(features.out_channels), num_base, num_novel)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images [B, 3, H, W]: logits [B, K, h, w] of background, base classes, novel classes."""
        return classify(self.net, decode(self.net.decoder, self.net.backbone(images)))


def decode(decoder: PSP, x: torch.Tensor) -> torch.Tensor:
    """The pyramid decoder: pool, project, upsample, concatenate before the feature, convolve.

    Args:
        decoder: whose parameters are used.
        x: backbone features [B, Cb, h, w].

    Returns:
        Features [B, C, h, w].
    """
    maps = [
        F.interpolate(stage(x), x.shape[-2:], mode='bilinear', align_corners=False)  # [B, C, h, w]
        for stage in decoder.stages
    ]
    return decoder.bottleneck(torch.cat([*maps, x], dim=1))


def classify(net: POP, features: torch.Tensor) -> torch.Tensor:
    """The prototype head: p_k = <s_k, q>, q_k = p_k s_k, r = q - sum_k q_k; logit_k = phi(q_k), logit_0 = phi(r).

    Args:
        net: whose prototypes and MLPs are used: phi for base classes, phi_n for novel classes, and for the residual
            once there are novel classes.
        features: q, [B, C, h, w].

    Returns:
        Logits [B, K, h, w].
    """
    base = components(net.base_emb, features)  # [B, Kb, C, h, w]
    residual = features - base.sum(dim=1)  # [B, C, h, w]
    if not net.num_novel:
        return score(net.classifier, torch.cat([residual[:, None], base], dim=1))
    novel = components(net.novel_emb, features)  # [B, Kn, C, h, w]
    residual = residual - novel.sum(dim=1)
    rest = score(net.classifier_n, torch.cat([residual[:, None], novel], dim=1))  # [B, 1 + Kn, h, w]
    return torch.cat([rest[:, :1], score(net.classifier, base), rest[:, 1:]], dim=1)


def components(prototypes: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The foreground components q_k = <s_k, q> s_k of q, [B, C, h, w], for prototypes [K, C]: [B, K, C, h, w]."""
    s = F.normalize(prototypes, dim=1)
    p = torch.einsum('kc,bchw->bkhw', s, features)
    return p[:, :, None] * s[:, :, None, None]


def score(phi: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """phi of every map, all in one batch: [B, K, C, h, w] to [B, K, h, w]."""
    return phi(maps.flatten(0, 1)).view(len(maps), -1, *maps.shape[3:])


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Full-size logits: [B, K, h, w] to [B, K, *size]."""
    return F.interpolate(logits, size, mode='bilinear', align_corners=True)


def losses(
    logits: torch.Tensor, mask: torch.Tensor, trained: torch.Tensor, fixed: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Cross-entropy of full-size logits, and 10 times the mean |<s_i, s_j>|.

    Args:
        logits: [B, K, h, w].
        mask: labels 0..K-1 or 255 (ignored), int64 [B, H, W].
        trained: prototypes of which all pairs i < j count: of base classes in stage 1, of novel classes in stage 2.
        fixed: prototypes of which all pairs with a trained one count: of base classes in stage 2.

    Returns:
        'ce' and 'orth', scalars; their sum is minimised.
    """
    s = F.normalize(trained, dim=1)
    overlaps = (s @ s.T)[torch.triu(torch.ones(len(s), len(s), dtype=torch.bool), diagonal=1)]
    if fixed is not None:
        overlaps = torch.cat([overlaps, (s @ F.normalize(fixed, dim=1).T).flatten()])
    ce = F.cross_entropy(upsample(logits, mask.shape[-2:]), mask, ignore_index=IGNORE_INDEX)
    return {'ce': ce, 'orth': 10 * overlaps.abs().mean()}


def pseudo_label(mask: torch.Tensor, logits: torch.Tensor, num_base: int) -> torch.Tensor:
    """Background pixels of base images, int64 [B, H, W], take the argmax over background and the novel classes."""
    full = upsample(logits, mask.shape[-2:])
    choice = torch.cat([full[:, :1], full[:, num_base + 1 :]], dim=1).argmax(dim=1)
    choice[choice > 0] += num_base
    return torch.where(mask == 0, choice, mask)


def confusion_matrix(truth: torch.Tensor, prediction: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Pixel counts of every pair (true label, predicted label), int64 [num_labels, num_labels].

    Args:
        truth, prediction: labels of the same shape on the CPU, tensors or arrays; truth 255 is not counted.
        num_labels: K.
    """
    counted = truth != IGNORE_INDEX
    truth, prediction = truth[counted], prediction[counted]
    predicted = [prediction == j for j in range(num_labels)]
    confusion = torch.zeros(num_labels, num_labels, dtype=torch.int64)
    for i in range(num_labels):
        is_i = truth == i
        for j in range(num_labels):
            confusion[i, j] = (is_i & predicted[j]).sum()
    return confusion
