"""Frozen networks run faster with each batch normalisation folded into the convolution before it."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse(net, dtype=torch.float32):
    """A frozen copy of a network whose backbone and decoder have no batch normalisations; exact up to rounding.

    Args:
        net (POP): left as it is.
        dtype (torch.dtype): of the copy's backbone and decoder: that of mixed precision, whose autocast would
            otherwise convert the weights in every call.

    Returns:
        POP: in eval mode, nothing of it to be trained.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for part in (net.backbone, net.decoder):
        _fold(part)
        part.to(dtype, memory_format=torch.channels_last)
        for module in part.modules():  # after the conversion, which would reorder what they keep
            if hasattr(module, 'freeze_weights'):
                module.freeze_weights()
    return net


def _fold(module):
    """Fold every batch normalisation that is registered right after a convolution, as all of them are here."""
    convolution = None
    for name, child in list(module.named_children()):
        if convolution and isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, nn.Identity())
        convolution = name if isinstance(child, nn.Conv2d) else None
        _fold(child)
