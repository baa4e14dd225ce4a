"""The same results, faster: what a reader of the method can skip.

`accelerate` replaces modules of a network by faster ones. Each of these is a class with

    fits(module) -> bool      whether it computes the same as `module`, faster
    __init__(module)          takes over the settings and weights of `module`; draws no random numbers

Everything here imports nothing of the project but `core`.
"""

from torch import nn

from model.kernels.cross_entropy import summed_cross_entropy
from model.kernels.depthwise import DilatedDepthwiseConv2d
from model.kernels.fusing import fuse
from model.kernels.malloc import keep_freed_memory, return_freed_memory
from model.kernels.pointwise import Conv1x1
from model.kernels.upsampling import needed, predict
from model.kernels.winograd import Conv3x3, FunctionalConv3x3

CONVOLUTIONS = (Conv3x3, Conv1x1, DilatedDepthwiseConv2d)


def accelerate(net: nn.Module) -> None:
    """Replace the convolutions of a network's backbone and decoder, in place, by faster ones, if any.

    Parameters and keys of the state dict stay as they are.

    Args:
        net (POP): carries `backbone`, and `decoder` with its hook `convolve`.
    """
    for parent in list(net.backbone.modules()):
        for name, child in list(parent.named_children()):
            faster = next((kernel for kernel in CONVOLUTIONS if kernel.fits(child)), None)
            if faster:
                setattr(parent, name, faster(child))
    if FunctionalConv3x3.fits(net.decoder.convolve):
        net.decoder.convolve = FunctionalConv3x3(net.decoder.convolve)


__all__ = [
    'accelerate', 'fuse', 'keep_freed_memory', 'needed', 'predict', 'return_freed_memory', 'summed_cross_entropy'
]  # fmt: skip
