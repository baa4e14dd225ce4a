"""Dilated depthwise 3x3 convolutions with a backward pass of their own, for bfloat16 on the CPU.

On processors with bfloat16 instructions, PyTorch 2.14's own backward pass is several times slower, and its weight
gradient is wrong on feature maps of 33x33.

Dimensions: B batch, C channels, h x w feature size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A dilated depthwise 3x3 convolution of stride 1, padded by its dilation.

    Args:
        conv: a convolution that `fits`; settings and weight are taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        channels = conv.in_channels
        # on 'meta' no random numbers are drawn for a weight that is not used
        super().__init__(
            channels, channels, 3, 1, conv.padding, conv.dilation, channels, bias=False, device='meta'
        )  # fmt: skip
        self.weight = conv.weight

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is a convolution of this kind."""
        return type(module) is nn.Conv2d and (
            module.kernel_size == (3, 3) and module.stride == (1, 1) and module.padding == module.dilation
            and module.dilation[0] == module.dilation[1] > 1 and module.padding_mode == 'zeros'
            and module.groups == module.in_channels == module.out_channels and module.bias is None
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        trained = torch.is_grad_enabled() and self.weight.requires_grad and self.bias is None
        if x.device.type == 'cpu' and dtype == torch.bfloat16 and trained:
            return _DepthwiseFunction.apply(x.to(dtype), self.weight.to(dtype), self.dilation[0])
        return super().forward(x)


class _DepthwiseFunction(torch.autograd.Function):
    """x [B, C, h, w] and weight [C, 1, 3, 3] of one type to [B, C, h, w], zero-padded."""

    @staticmethod
    def forward(ctx, x, weight, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _depthwise(x, weight, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        for row in range(3):
            for column in range(3):
                above, below = _overlap(x.shape[2], (row - 1) * ctx.dilation)
                left, right = _overlap(x.shape[3], (column - 1) * ctx.dilation)
                product = gradient[:, :, above, left] * x[:, :, below, right]
                grad_weight[:, 0, row, column] = product.sum(dim=(0, 2, 3))
        # the gradient by x is the convolution with the flipped kernel
        return _depthwise(gradient, weight.flip(2, 3), ctx.dilation), grad_weight, None


def _depthwise(x, weight, dilation):
    return F.conv2d(x, weight, padding=dilation, dilation=dilation, groups=len(weight))


def _overlap(size, shift):
    """The positions i in 0..size-1 for which i + shift is a position too, and these i + shift, as slices."""
    return slice(max(-shift, 0), max(size - max(shift, 0), 0)), slice(max(shift, 0), max(size + min(shift, 0), 0))
