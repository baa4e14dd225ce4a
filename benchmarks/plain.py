"""The plain formulation as a network to train and evaluate: what the benchmarks compare with.

Float32, contiguous tensors, a 512-channel map of each class through the MLP, the pyramid upsampled and concatenated.
The decoder is that of the tests' oracle; the head is the oracle's with all that one MLP scores in one batch, as the
published code does. Everything else is what one would write first.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / 'tests'))

from oracle import dense_psp


class PlainPOP(nn.Module):
    """A POP network, used in the plain way: images [B, 3, H, W] to logits [B, K, h, w].

    Args:
        net (POP): its backbone's convolutions become PyTorch's own.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        for module in net.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d  # whose forward pass it has from then on

    def forward(self, images):
        features = dense_psp(self.net.decoder, self.net.backbone(images))
        return batched_logits(self.net, features)


def batched_logits(net, features):
    """The dense head, one batch for each MLP: features [B, C, h, w] to logits [B, K, h, w]."""
    q = features.flatten(2)  # [B, C, hw]

    def components(prototypes):
        s = F.normalize(prototypes, dim=1)  # [K, C]
        return (s @ q)[:, :, None] * s[:, :, None]  # [B, K, C, hw]

    def score(mlp, maps):
        return mlp(maps.view(-1, *features.shape[1:])).view(len(q), -1, *features.shape[2:])

    base = components(net.base_emb)
    residual = q - base.sum(dim=1)
    if not net.num_novel:
        return score(net.classifier, torch.cat([residual[:, None], base], dim=1))
    novel = components(net.novel_emb)
    residual = residual - novel.sum(dim=1)
    rest = score(net.classifier_n, torch.cat([residual[:, None], novel], dim=1))
    return torch.cat([rest[:, :1], score(net.classifier, base), rest[:, 1:]], dim=1)


def upsampled(logits, size):
    """Full-size logits, all at once."""
    return F.interpolate(logits, size, mode='bilinear', align_corners=True)


def loss(logits, mask, trained, fixed=None):
    """Cross-entropy on full-size logits, plus orthogonality."""
    s = F.normalize(trained, dim=1)
    overlaps = (s @ s.T)[torch.triu(torch.ones(len(s), len(s), dtype=torch.bool), diagonal=1)]
    if fixed is not None:
        overlaps = torch.cat([overlaps, (s @ F.normalize(fixed, dim=1).T).flatten()])
    return F.cross_entropy(upsampled(logits, mask.shape[-2:]), mask, ignore_index=255) + 10 * overlaps.abs().mean()


def pseudo_label(mask, logits, num_base):
    """Background pixels take the argmax over background and the novel classes."""
    full = upsampled(logits, mask.shape[-2:])
    choice = torch.cat([full[:, :1], full[:, num_base + 1 :]], dim=1).argmax(dim=1)
    choice[choice > 0] += num_base
    return torch.where(mask == 0, choice, mask)


def confusion_matrix(truth, prediction, num_classes):
    """Pixel counts by a loop over pairs of classes; arguments are arrays on the CPU.

    The slowest of the usual ways; the published code counts with bincount on the CPU.
    """
    counted = truth != 255
    truth, prediction = truth[counted], prediction[counted]
    predicted = [prediction == j for j in range(num_classes)]
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for i in range(num_classes):
        is_i = truth == i
        for j in range(num_classes):
            confusion[i, j] = (is_i & predicted[j]).sum()
    return confusion
