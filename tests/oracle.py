"""The method written plainly from its formulas, as slow as it is clear: what the fast forms are checked against.

Works on the parameters of a `POP` network, so that gradients of both forms land on the same tensors.
"""

import torch
import torch.nn.functional as F


def dense_logits(net, features):
    """Logits of the head with one full feature map per class through the MLP.

    Args:
        net (POP): whose prototypes and MLPs are used.
        features (Tensor): [B, C, h, w].

    Returns:
        Tensor: [B, 1 + Kb + Kn, h, w].
    """
    residual = features
    scores = []
    for prototypes, mlp in _prototype_sets(net):
        for prototype in prototypes:
            s = prototype / prototype.norm()
            p = (features * s[:, None, None]).sum(1, keepdim=True)  # [B, 1, h, w]
            q_k = p * s[:, None, None]  # [B, C, h, w]
            residual = residual - q_k
            scores.append(dense_mlp(mlp, q_k))
    background = dense_mlp(net.classifier_n if net.num_novel else net.classifier, residual)
    return torch.cat([background, *scores], dim=1)


def dense_mlp(mlp, x):
    """phi on every position: [B, C, h, w] to [B, 1, h, w]."""
    first, second, third = (mlp[i].weight[:, :, 0, 0] for i in (0, 2, 4))
    x = torch.einsum('oc,bchw->bohw', first, x).relu()
    x = torch.einsum('oc,bchw->bohw', second, x).relu()
    return torch.einsum('oc,bchw->bohw', third, x)


def dense_psp(decoder, x):
    """The pyramid decoder: pool, project, upsample, concatenate before the feature, convolve."""
    maps = []
    for size, stage in zip((1, 2, 3, 6), decoder.stages, strict=True):
        pooled = F.adaptive_avg_pool2d(x, size)
        projected = F.relu(stage[2](F.conv2d(pooled, stage[1].weight)))
        maps.append(F.interpolate(projected, x.shape[-2:], mode='bilinear', align_corners=False))
    return decoder.bottleneck(torch.cat([*maps, x], dim=1))


def dense_losses(logits, mask, net):
    """Both loss terms, pair by pair and pixel by pixel."""
    logits = F.interpolate(logits, mask.shape[-2:], mode='bilinear', align_corners=True)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    counted = mask != 255
    picked = log_probability.gather(1, mask.where(counted, 0)[:, None])[:, 0]
    overlaps = []
    trained = net.novel_emb if net.num_novel else net.base_emb
    for i, a in enumerate(trained):
        others = list(trained[i + 1 :]) + (list(net.base_emb) if net.num_novel else [])
        overlaps += [torch.dot(a / a.norm(), b / b.norm()).abs() for b in others]
    return {'ce': -picked[counted].mean(), 'orth': 10 * sum(overlaps) / len(overlaps)}


def _prototype_sets(net):
    yield net.base_emb, net.classifier
    if net.num_novel:
        yield net.novel_emb, net.classifier_n
