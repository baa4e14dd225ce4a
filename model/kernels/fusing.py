"""Frozen networks run faster with each batch normalisation fused into the convolution before it."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a frozen copy of a network, without batch normalisations in its backbone and decoder.

    Its results are the same up to rounding.

    Args:
        net: carries `backbone` and `decoder`; stays as it is.
        dtype: type of the copy's backbone and decoder. If it is the type of mixed precision, autocast need not convert
            the weights in every call.

    Returns:
        The copy, in eval mode; none of its parameters is trained. Convolutions keep what they derive from their
        weights, so later changes of the weights have no effect.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for part in (net.backbone, net.decoder):
        _fuse_batch_norms(part)
        part.to(dtype, memory_format=torch.channels_last)
    # after the conversion, which would reorder what is kept
    for module in net.backbone.modules():
        if hasattr(module, 'freeze_weight'):
            module.freeze_weight()
    if hasattr(net.decoder.convolve, 'freeze_weight'):
        net.decoder.convolve.freeze_weight(net.decoder.split_weight()[1])
    return net


def _fuse_batch_norms(module):
    """Fuse every batch normalisation that is registered right after a convolution, as all of them are here."""
    convolution = None
    for name, child in list(module.named_children()):
        if convolution and isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, nn.Identity())
        convolution = name if isinstance(child, nn.Conv2d) else None
        _fuse_batch_norms(child)
