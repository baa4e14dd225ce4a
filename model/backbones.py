"""Backbones: torchvision's networks, cut before their classifier and dilated to an output stride.

`resnet50v2` / `resnet101v2` are the ResNets of PSPNet: a stem of three 3x3 convolutions in place of the 7x7 one.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.kernels.pointwise import Conv1x1
from model.kernels.winograd import Conv3x3


class ResNet(models.ResNet):
    """torchvision's ResNet without pooling and classifier.

    Args:
        block (type): BasicBlock or Bottleneck.
        layers (sequence of int): number of blocks in each of the four layers.
        deep_stem (bool): three 3x3 convolutions (64, 64, 128 channels) in place of the 7x7 one.
    """

    def __init__(self, block, layers, deep_stem=False):
        super().__init__(block, layers)
        del self.avgpool, self.fc
        self.deep_stem = deep_stem
        if deep_stem:
            self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
            self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(64)
            self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(128)
            self.inplanes = 128
            self.layer1 = self._make_layer(block, 64, layers[0])
            for conv in (self.conv1, self.conv2, self.conv3, *self.layer1.modules()):
                if isinstance(conv, nn.Conv2d):
                    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        self.out_channels = 512 * block.expansion

    @property
    def stages(self):
        """The stages of stride 16 and 32."""
        return self.layer3, self.layer4

    def forward(self, x):
        """Map images [B, 3, H, W] to features [B, out_channels, h, w]."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        x = self.maxpool(x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 up to its last inverted residual (320 channels)."""

    out_channels = 320

    def __init__(self):
        super().__init__()
        self.features = models.mobilenet_v2().features[:18]

    @property
    def stages(self):
        """The stages of stride 16 and 32."""
        return self.features[7:14], self.features[14:18]

    def forward(self, x):
        """Map images [B, 3, H, W] to features [B, 320, h, w]."""
        return self.features(x)


BACKBONES = {
    'resnet18': lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    'resnet50': lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    'resnet101': lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    'resnet50v2': lambda: ResNet(Bottleneck, (3, 4, 6, 3), deep_stem=True),
    'resnet101v2': lambda: ResNet(Bottleneck, (3, 4, 23, 3), deep_stem=True),
    'mobilenet_v2': MobileNetV2,
}

# dilation of the stages whose own strides would be 16 and 32
DILATIONS = {8: (2, 4), 16: (1, 2), 32: (1, 1)}


def build_backbone(name, output_stride=8):
    """Build a backbone with random weights.

    Args:
        name (str): a name from `BACKBONES`.
        output_stride (int): input size over feature size: 8, 16 or 32.

    Returns:
        nn.Module: maps [B, 3, H, W] to [B, out_channels, h, w]; carries `out_channels`.

    Raises:
        ValueError: unknown name or output stride.
    """
    if name not in BACKBONES:
        raise ValueError(f'backbone {name!r} not supported; choose one of {", ".join(BACKBONES)}')
    if output_stride not in DILATIONS:
        raise ValueError(f'output stride {output_stride} not supported; choose one of 8, 16, 32')
    backbone = BACKBONES[name]()
    for stage, dilation in zip(backbone.stages, DILATIONS[output_stride], strict=True):
        if dilation > 1:
            _dilate(stage, dilation)
    for parent, child, conv in _convolutions(backbone):
        for faster in (Conv3x3, Conv1x1):
            if faster.fits(conv):
                setattr(parent, child, faster(conv))
    return backbone


def _convolutions(module):
    """Every convolution in a module, so that it can be changed or replaced: (parent, name in parent, convolution)."""
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d)
    ]


def _dilate(stage, dilation):
    """Trade the stage's stride for dilation, in every 3x3 convolution, the first block's included.

    torchvision's own `replace_stride_with_dilation` leaves the first block at the previous dilation and refuses
    BasicBlock; PSPNet's networks, which published checkpoints were trained with, dilate every block.
    """
    for parent, name, conv in _convolutions(stage):
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
            if conv.groups == conv.in_channels:
                setattr(parent, name, DilatedDepthwiseConv2d(conv))


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution whose backward pass is written out for bfloat16 on the CPU.

    On processors with bfloat16 instructions PyTorch 2.14's own is several times slower, and its weight gradient was
    found wrong on feature maps of 33x33.

    Args:
        conv (nn.Conv2d): without bias; settings and weight are taken over.
    """

    def __init__(self, conv):
        channels = conv.in_channels
        super().__init__(channels, channels, 3, 1, conv.padding, conv.dilation, channels, bias=False)
        self.weight = conv.weight

    def forward(self, x):
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
        by_weight = torch.empty_like(weight)
        for row in range(3):
            for column in range(3):
                above, below = _overlap(x.shape[2], (row - 1) * ctx.dilation)
                left, right = _overlap(x.shape[3], (column - 1) * ctx.dilation)
                product = gradient[:, :, above, left] * x[:, :, below, right]
                by_weight[:, 0, row, column] = product.sum(dim=(0, 2, 3))
        # the gradient by x is the convolution with the kernel turned round
        return _depthwise(gradient, weight.flip(2, 3), ctx.dilation), by_weight, None


def _depthwise(x, weight, dilation):
    return F.conv2d(x, weight, padding=dilation, dilation=dilation, groups=len(weight))


def _overlap(size, shift):
    """Positions i in 0..size-1 for which i + shift is one too, and these i + shift, as slices."""
    return slice(max(-shift, 0), max(size - max(shift, 0), 0)), slice(max(shift, 0), max(size + min(shift, 0), 0))
