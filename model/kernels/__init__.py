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
from model.kernels.sync_batch_norm import SyncBatchNorm2d
from model.kernels.upsampling import bands, cells_of, interpolation, needed, predict
from model.kernels.winograd import Conv3x3, FunctionalConv3x3

CONVOLUTIONS = (Conv3x3, Conv1x1, DilatedDepthwiseConv2d)


def accelerate(net: nn.Module) -> None:
    """Replace the convolutions of a network's backbone and decoder, in place, by faster ones, if any.

    Parameters and keys of the state dict stay as they are.

    Args:
        net: carries `backbone`, and `decoder` with its hook `convolve`.
    """
    _replace(net.backbone, CONVOLUTIONS)
    if FunctionalConv3x3.fits(net.decoder.convolve):
        net.decoder.convolve = FunctionalConv3x3(net.decoder.convolve)


def share_batch_statistics(net: nn.Module) -> None:
    """Replace the batch normalisations of a network, in place, by ones over the batches of all processes.

    Parameters and keys of the state dict stay as they are.
    """
    _replace(net, (SyncBatchNorm2d,))


def _replace(module, kernels):
    """Replace each module inside another one by the first kernel that fits it, if any."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            faster = next((kernel for kernel in kernels if kernel.fits(child)), None)
            if faster:
                setattr(parent, name, faster(child))


__all__ = [
    'accelerate', 'bands', 'cells_of', 'fuse', 'interpolation', 'keep_freed_memory', 'needed', 'predict',
    'return_freed_memory', 'share_batch_statistics', 'summed_cross_entropy'
]  # fmt: skip
