"""1x1 convolutions whose gradients are two matrix products, for float32 on the CPU.

On features [h*w, C] with channels last, a 1x1 convolution is the product X W^T. Its gradients are G W and G^T X, which
PyTorch's matrix products compute faster than its convolutions' backward pass once there are many channels.

Dimensions: B batch, C input channels, O output channels, h x w feature size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.kernels.winograd import float32_on_cpu

MIN_CHANNELS = 1024  # the larger of C and O; with fewer, nothing is gained (measured in benchmarks/NOTES.md)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution of stride 1.

    Args:
        conv: a convolution that `fits`; its weight is taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        # on 'meta' no random numbers are drawn for a weight that is not used
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=False, device='meta')
        self.weight = conv.weight

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is a convolution that this class computes faster."""
        return type(module) is nn.Conv2d and (
            module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)
            and module.groups == 1 and module.bias is None
            and max(module.in_channels, module.out_channels) >= MIN_CHANNELS
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = torch.is_grad_enabled() and self.weight.requires_grad and self.bias is None
        if trained and float32_on_cpu(x, self.weight):
            return _Pointwise.apply(x, self.weight)
        return super().forward(x)


class _Pointwise(torch.autograd.Function):
    """x [B, C, h, w] and weight [O, C, 1, 1] to [B, O, h, w]."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        rows = gradient.permute(0, 2, 3, 1)  # [B, h, w, O]; no copy if channels are last in memory
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.flatten(1)).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.flatten(0, 2).T @ x.permute(0, 2, 3, 1).flatten(0, 2)  # [O, C]
            grad_weight = grad_weight.view_as(weight)
        return grad_x, grad_weight
