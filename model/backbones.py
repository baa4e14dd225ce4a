"""Backbones: torchvision's networks, cut before their classifier and dilated to an output stride.

`resnet50v2` / `resnet101v2` are the ResNets of PSPNet: a stem of three 3x3 convolutions in place of the 7x7 one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck


class ResNet(models.ResNet):
    """torchvision's ResNet without pooling and classifier.

    Args:
        block: block of all four layers.
        layers: number of blocks in each of the four layers.
        deep_stem: three 3x3 convolutions (64, 64, 128 channels) in place of the 7x7 one.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: Sequence[int], deep_stem: bool = False) -> None:
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
        self.out_channels, self.middle_channels = 512 * block.expansion, 256 * block.expansion

    @property
    def dilatable_layers(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The layers that bring the stride to 16 and to 32."""
        return self.layer3, self.layer4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to features [B, out_channels, h, w]."""
        return self.layer4(self.middle(x))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to the features before the last dilatable layer, [B, middle_channels, h', w']."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        x = self.maxpool(x)
        return self.layer3(self.layer2(self.layer1(x)))


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 up to its last inverted residual (320 channels)."""

    out_channels, middle_channels = 320, 96

    def __init__(self) -> None:
        super().__init__()
        self.features = models.mobilenet_v2().features[:18]

    @property
    def dilatable_layers(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The layers that bring the stride to 16 and to 32."""
        return self.features[7:14], self.features[14:18]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to features [B, 320, h, w]."""
        return self.features(x)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to the features before the last dilatable layer, [B, 96, h', w']."""
        return self.features[:14](x)


BACKBONES = {
    'resnet18': lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    'resnet50': lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    'resnet101': lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    'resnet50v2': lambda: ResNet(Bottleneck, (3, 4, 6, 3), deep_stem=True),
    'resnet101v2': lambda: ResNet(Bottleneck, (3, 4, 23, 3), deep_stem=True),
    'mobilenet_v2': MobileNetV2,
}

# dilation of the layers whose own strides would be 16 and 32, by output stride
DILATIONS = {8: (2, 4), 16: (1, 2), 32: (1, 1)}


def build_backbone(name: str, output_stride: int = 8) -> nn.Module:
    """Build a backbone with random weights.

    Args:
        name: one of `BACKBONES`.
        output_stride: input size over feature size: 8, 16 or 32.

    Returns:
        Maps [B, 3, H, W] to [B, out_channels, h, w]; carries `out_channels` and `output_stride`.

    Raises:
        ValueError: unknown name or output stride.
    """
    if name not in BACKBONES:
        raise ValueError(f'backbone {name!r} not supported; choose one of {", ".join(BACKBONES)}')
    if output_stride not in DILATIONS:
        raise ValueError(f'output stride {output_stride} not supported; choose one of 8, 16, 32')
    backbone = BACKBONES[name]()
    backbone.output_stride = output_stride
    for layer, dilation in zip(backbone.dilatable_layers, DILATIONS[output_stride], strict=True):
        if dilation > 1:
            _dilate(layer, dilation)
    return backbone


def _dilate(layer, dilation):
    """Replace the stride of a layer by dilation, in every 3x3 convolution, the first block's included.

    torchvision's own `replace_stride_with_dilation` leaves the first block at the previous dilation and refuses
    BasicBlock; PSPNet's networks, which published checkpoints were trained with, dilate every block.
    """
    for conv in layer.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
                if conv.groups > 1:
                    # advances the random state, so that seeded decoder weights stay as in earlier versions
                    torch.rand_like(conv.weight)


def find_backbone(state: Mapping[str, torch.Tensor], prefix: str = '') -> str | None:
    """The backbone whose parameters a state dict holds, by their names and shapes; None where it is none of ours.

    Args:
        state: parameter name -> tensor; other parameters may be among them.
        prefix: of the backbone's names.
    """
    for backbone in BACKBONES:
        with torch.device('meta'):  # no memory, no initialisation
            wanted = build_backbone(backbone).state_dict()
        names = [name for name in wanted if not name.endswith('num_batches_tracked')]
        if all(prefix + name in state and state[prefix + name].shape == wanted[name].shape for name in names):
            return backbone
    return None
