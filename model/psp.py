"""PSP decoder, with the pyramid's share of its convolution in closed form: one small matrix product.

Dimensions: B batch, C decoder channels, Cb backbone channels, h x w feature size, S = 1 + 4 + 9 + 36 = 50 pyramid
positions.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn


class PSP(nn.Module):
    """Pyramid pooling decoder (Zhao et al., CVPR 2017).

    The plain form pools the feature to 1, 2, 3 and 6 bins, upsamples each map to h x w, concatenates them before the
    feature and applies a 3x3 convolution. Upsampling followed by convolution is linear in the pooled maps, so with U_s
    the upsampling matrix of scale s and shift_t the taps of the zero-padded convolution

        conv3x3(up(z_s)) = sum_t shift_t(U_s) (W_{s,t} z_s)

    which is a [C x 9S] [9S x hw] product: the weights are applied to 50 pooled positions instead of h*w upsampled ones.
    Only the backbone's own channels go through the 3x3 convolution. The result is the same up to rounding.

    Args:
        in_channels: Cb.
        channels: C.
        bins: side lengths of the pyramid's maps.
    """

    def __init__(self, in_channels: int, channels: int = 512, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = channels
        self.bins = tuple(bins)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size),
                nn.Conv2d(in_channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )
            for size in bins
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(len(bins) * channels + in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )
        self.convolve = partial(F.conv2d, padding=1)  # (x, weight, bias): of the backbone's own channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decode backbone features [B, Cb, h, w] to [B, C, h, w]."""
        conv, *rest = self.bottleneck
        pyramid_weights, feature_weight = self.split_weight()
        # the convolution has a bias only if a batch normalisation is fused into it
        y = self.convolve(x, feature_weight, conv.bias)  # [B, C, h, w]
        y += self._pyramid(x, pyramid_weights)
        for layer in rest:
            y = layer(y)
        return y

    def split_weight(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The 3x3 convolution's weight: for each scale [C, 3, 3, C], and for the backbone's channels [C, Cb, 3, 3]."""
        # rows (output channel, tap), columns input channels: no copy where the weight is stored channels-last
        weight = self.bottleneck[0].weight.permute(0, 2, 3, 1)  # [C, 3, 3, n*C + Cb]
        *pyramid, feature = weight.split([self.out_channels] * len(self.bins) + [self.in_channels], dim=3)
        return pyramid, feature.permute(0, 3, 1, 2)

    def _pyramid(self, x, weights):
        """The pyramid's share of the 3x3 convolution: sum over scales and taps, [B, C, h, w]."""
        height, width = x.shape[-2:]
        pooling = _pooling(self.bins, height, width, x.device, x.dtype)  # [h*w, S]
        # one product in place of four poolings, whose backward pass has no deterministic form on GPUs
        pooled = (x.flatten(2) @ pooling).split([size * size for size in self.bins], dim=2)  # [B, Cb, s*s] each
        taps = []
        for (_, *project), size, part, weight in zip(self.stages, self.bins, pooled, weights, strict=True):
            z = nn.Sequential(*project)(part.unflatten(2, (size, size))).flatten(2)  # [B, C, s*s]
            product = weight.flatten(0, 2) @ z  # [B, C*9, s*s]
            taps.append(product.unflatten(1, (-1, 9)).flatten(2))  # [B, C, 9*s*s]
        shifts = _upsampling(self.bins, height, width, x.device, taps[0].dtype)  # [9*S, h*w]
        pyramid = torch.cat(taps, dim=2) @ shifts  # [B, C, h*w]
        return pyramid.unflatten(2, (height, width))


# torch.compile takes the results of these two as constants, for which sizes must be static. It would trace through a
# cache, hence through the cached functions below. It tells constants apart by the names of functions.


@torch.compiler.assume_constant_result
def _pooling(*arguments):
    return _pooling_matrix(*arguments)


@torch.compiler.assume_constant_result
def _upsampling(*arguments):
    return _upsampling_taps(*arguments)


@lru_cache(maxsize=8)
def _pooling_matrix(bins, height, width, device, dtype):
    """Means over the bins of every scale, [height * width, S].

    Bins are rectangles, so a scale is the product of rows and columns, each made by pooling unit vectors.
    """

    def means(side, size):
        return F.adaptive_avg_pool1d(torch.eye(side, dtype=torch.float64)[None], size)[0]  # [side, size]

    scales = [torch.kron(means(height, size), means(width, size)) for size in bins]  # [h*w, s*s] each
    return torch.cat(scales, dim=1).to(device, dtype)


@lru_cache(maxsize=8)
def _upsampling_taps(bins, height, width, device, dtype):
    """shift_t(U_s) for every scale and the nine taps of a zero-padded 3x3 convolution, [9 * S, height * width].

    U_s is made by upsampling unit maps, so it does the interpolation of the plain form.
    """
    taps = []
    for size in bins:
        units = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
        upsampled = F.interpolate(units, (height, width), mode='bilinear', align_corners=False)  # [s*s, 1, h, w]
        taps.append(F.unfold(upsampled, 3, padding=1).transpose(0, 1).flatten(0, 1))  # [9*s*s, h*w]
    return torch.cat(taps).to(device, dtype)
