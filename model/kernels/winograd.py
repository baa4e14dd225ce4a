"""3x3 convolutions with 4/9 of the multiplications: Winograd's F(2x2, 3x3), for float32 on the CPU.

A tile of 2x2 outputs depends on 4x4 inputs d and on the 3x3 kernel g (Lavin and Gray, CVPR 2016),

    y = A^T [(G g G^T) * (B^T d B)] A

With * over all tiles and channels at once, that is one matrix product [T, C] [C, O] for each of the 16 positions (i, j)
of a transformed tile. The convolution itself takes 36 such products for the same outputs. The transforms of
tiles are sums and differences of few terms: the error is no larger than that of the direct form's longer sums.
PyTorch's CPU convolutions are direct; cuDNN already has Winograd's.

Dimensions: B batch, C input channels, O output channels, h x w feature size, T tiles.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# With fewer, the transforms cost what the products save (measured in benchmarks/NOTES.md). The choice does not depend
# on the batch size, so an image's prediction does not depend on the other images of its batch.
MIN_POSITIONS = 800  # h*w
MIN_CHANNELS = 64
MIN_CHANNELS_FORWARD = 128  # PyTorch's backward passes are slower than its forward ones
CHANNELS_AT_ONCE = 512  # of the weight's gradient: keeps its transformed inputs small

# B^T: row i is the sum of input `first` and `sign` times input `second`
INPUT = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))  # (first, second, sign)
# A^T: share of position i in either output
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
# G (x) G: the 16 positions from the kernel's 9 taps
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
KERNEL = torch.kron(_G, _G)  # [16, 9]


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1, padded by its dilation, by `conv3x3`.

    Args:
        conv: a convolution that `fits`; settings and weight are taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        channels = conv.in_channels, conv.out_channels
        # on 'meta' no random numbers are drawn for a weight that is not used
        super().__init__(*channels, 3, 1, conv.padding, conv.dilation, bias=False, device='meta')
        self.weight = conv.weight
        self.register_buffer('kernels', None, persistent=False)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is a convolution that this class computes faster."""
        return type(module) is nn.Conv2d and (
            module.kernel_size == (3, 3) and module.stride == (1, 1) and module.padding == module.dilation
            and module.dilation[0] == module.dilation[1] and module.padding_mode == 'zeros' and module.groups == 1
            and module.bias is None and min(module.in_channels, module.out_channels) >= MIN_CHANNELS
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv3x3(x, self.weight, self.bias, self.dilation[0], self.kernels)

    def freeze_weight(self) -> None:
        """Transform the kernels once; later changes of the weight have no effect."""
        self.kernels = transformed(self.weight)


class FunctionalConv3x3(nn.Module):
    """`partial(F.conv2d, padding=1)` for 3x3 kernels, by `conv3x3`: a convolution whose weight comes with each call.

    Args:
        convolve: the function that it replaces.
    """

    def __init__(self, convolve: Callable) -> None:
        super().__init__()
        self.register_buffer('weight', None, persistent=False)
        self.register_buffer('kernels', None, persistent=False)

    @staticmethod
    def fits(convolve: Callable) -> bool:
        """Whether a function is the one that this class computes faster."""
        return isinstance(convolve, partial) and convolve.func is F.conv2d and convolve.keywords == {'padding': 1}

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, C, h, w] and weight [O, C, 3, 3] to [B, O, h, w]; after `freeze_weight`, `weight` is ignored."""
        return conv3x3(x, weight if self.weight is None else self.weight, bias, kernels=self.kernels)

    def freeze_weight(self, weight: torch.Tensor) -> None:
        """Keep a copy of the weight, channels last, and its transformed kernels for all later calls."""
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.kernels = transformed(self.weight)


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: int = 1,
    kernels: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 3x3 convolution of stride 1 that keeps the size, by the faster of both ways.

    Args:
        x: [B, C, h, w].
        weight: [O, C, 3, 3].
        bias: [O].
        dilation: dilation of the kernel, and zero padding on every side.
        kernels: `transformed(weight)` of a frozen weight.

    Returns:
        [B, O, h, w].
    """
    large = x.shape[2] * x.shape[3] >= MIN_POSITIONS and min(weight.shape[:2]) >= MIN_CHANNELS
    if not (float32_on_cpu(x, weight) and large):
        return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    if kernels is None or (torch.is_grad_enabled() and x.requires_grad):
        y = _Winograd.apply(x, weight, dilation)
    else:
        y = _convolve(x, kernels.__getitem__, len(weight), dilation)
    return y if bias is None else y.add_(bias[:, None, None])


def float32_on_cpu(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a convolution of these tensors runs in float32 on the CPU."""
    float32 = x.dtype == weight.dtype == torch.float32
    return x.device.type == 'cpu' and float32 and not torch.is_autocast_enabled('cpu')


def transformed(weight: torch.Tensor) -> torch.Tensor | None:
    """The transformed kernels [4, 4, C, O] of a weight [O, C, 3, 3]; None if the direct convolution is faster."""
    if weight.device.type != 'cpu' or weight.dtype != torch.float32 or min(weight.shape[:2]) < MIN_CHANNELS_FORWARD:
        return None
    return torch.stack([_kernels(weight, i) for i in range(4)])


class _Winograd(torch.autograd.Function):
    """x [B, C, h, w] and weight [O, C, 3, 3] to [B, O, h, w], zero-padded by the dilation."""

    @staticmethod
    def forward(ctx, x, weight, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        if min(weight.shape[:2]) < MIN_CHANNELS_FORWARD:
            return F.conv2d(x, weight, padding=dilation, dilation=dilation)
        return _convolve(x, partial(_kernels, weight), len(weight), dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # the convolution with the flipped kernel
            grad_x = _convolve(gradient, partial(_kernels, weight, flipped=True), weight.shape[1], ctx.dilation)
        if ctx.needs_input_grad[1]:
            taps = x.new_empty(len(weight), 9, weight.shape[1])
            for some, part in zip(x.split(CHANNELS_AT_ONCE, 1), taps.split(CHANNELS_AT_ONCE, 2), strict=True):
                part.copy_(KERNEL.T.to(weight.dtype) @ _correlate(some, gradient, ctx.dilation))  # [O, 9, C']
            grad_weight = taps.unflatten(1, (3, 3)).permute(0, 3, 1, 2)  # [O, C, 3, 3], channels last
        return grad_x, grad_weight, None


def _kernels(weight, i, flipped=False):
    """Row i of the transformed kernels of a weight [O, C, 3, 3], [4, C, O].

    With `flipped`, of the convolution with the flipped kernel, from O channels to C: [4, O, C].
    """
    taps = weight.permute(0, 2, 3, 1).flatten(1, 2)  # [O, 9, C]; no copy if channels are last in memory
    matrix = KERNEL.flip(1) if flipped else KERNEL
    row = matrix[4 * i : 4 * i + 4].to(weight.dtype) @ taps  # [O, 4, C]
    return row.transpose(0, 1) if flipped else row.permute(1, 2, 0)


def _convolve(x, kernels, channels, dilation):
    """The convolution with transformed kernels.

    Args:
        x: [B, C, h, w].
        kernels: i -> row i of the transformed kernels, [4, C, O].
        channels: O.
        dilation: dilation of the kernel.

    Returns:
        [B, O, h, w], channels last.
    """
    batch, _, height, width = x.shape
    th, tw = _tile_count(height, dilation), _tile_count(width, dilation)
    product = x.new_empty(batch, th, dilation, tw, dilation, channels)
    across = x.new_empty(2, *product.shape)  # the two columns of outputs, of one row of positions
    y = x.new_empty(batch, th, 2, dilation, tw, 2, dilation, channels)
    for i, j, tiles in _transformed_tiles(x, dilation):  # [B, th, d, tw, d, C]
        if j == 0:
            row = kernels(i)
        torch.mm(tiles.flatten(0, -2), row[j], out=product.flatten(0, -2))
        for b in (0, 1):
            _add_share(across[b], product, OUTPUT[b], j)
        if j == 3:
            for a in (0, 1):
                _add_share(y[:, :, a], across.permute(1, 2, 3, 4, 0, 5, 6), OUTPUT[a], i)
    y = y.flatten(4, 6).flatten(1, 3)[:, :height, :width]  # [B, h, w, O]
    # a copy if tiles overhang; detached, because autograd treats views made inside a function as read-only
    return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).detach()


def _add_share(output, position, shares, i):
    """Add position i's share to an output; the first share of all overwrites it."""
    if not any(shares[:i]) and shares[i]:
        output.copy_(position)
    elif shares[i]:
        output.add_(position, alpha=shares[i])


def _correlate(x, gradient, dilation):
    """Gradient by the transformed kernels, [O, 16, C], of x [B, C, h, w] and the outputs' gradient [B, O, h, w]."""
    grad_kernels = x.new_empty(gradient.shape[1], 16, x.shape[1])
    parts = _padded_tiles(gradient, dilation, 0)  # [B, th, 2, d, tw, 2, d, O]
    rows = parts[:, :, 0], parts[:, :, 1]
    for i, j, tiles in _transformed_tiles(x, dilation):
        if j == 0:
            row = _gradient_share(rows, i)  # [B, th, d, tw, 2, d, O]
            columns = row[:, :, :, :, 0], row[:, :, :, :, 1]
        share = _gradient_share(columns, j)  # [B, th, d, tw, d, O]
        grad_kernels[:, 4 * i + j] = share.flatten(0, -2).T @ tiles.flatten(0, -2)
    return grad_kernels


def _gradient_share(outputs, i):
    """What position i of a tile receives of the gradients of its two outputs."""
    first, second = OUTPUT[0][i], OUTPUT[1][i]
    if first and second:
        return torch.add(outputs[0], outputs[1], alpha=second)
    return outputs[0] if first else outputs[1] * second


def _transformed_tiles(x, dilation):
    """The 16 positions of all transformed tiles B^T d B, one after the other in the same memory.

    Outputs of a dilated convolution that share inputs are `dilation` pixels apart. Each of the d x d grids of such
    pixels is tiled on its own.

    Yields:
        i; j; position (i, j) of all tiles, [B, th, d, tw, d, C].
    """
    x = _padded_tiles(x, dilation, 1)  # [B, th+1, 2, d, tw+1, 2, d, C]
    rows = x[:, :-1, 0], x[:, :-1, 1], x[:, 1:, 0], x[:, 1:, 1]
    row = torch.empty_like(rows[0], memory_format=torch.contiguous_format)  # [B, th, d, tw+1, 2, d, C]
    columns = row[:, :, :, :-1, 0], row[:, :, :, :-1, 1], row[:, :, :, 1:, 0], row[:, :, :, 1:, 1]
    position = torch.empty_like(columns[0], memory_format=torch.contiguous_format)  # [B, th, d, tw, d, C]
    for i, (above, below, row_sign) in enumerate(INPUT):
        torch.add(rows[above], rows[below], alpha=row_sign, out=row)
        for j, (left, right, sign) in enumerate(INPUT):
            torch.add(columns[left], columns[right], alpha=sign, out=position)
            yield i, j, position


def _tile_count(size, dilation):
    """Tiles that one side of the feature map takes, in each of the grids of pixels `dilation` apart."""
    return -(-size // (2 * dilation))


def _padded_tiles(x, dilation, border):
    """x [B, C, h, w] as pairs of pixels that are `dilation` apart, [B, th+border, 2, d, tw+border, 2, d, C].

    Zeros fill up what tiles need on the right and at the bottom and, with `border` 1, surround x.
    """
    batch, channels, height, width = x.shape
    vertical, horizontal = (_tile_count(size, dilation) + border for size in (height, width))
    padded = x.new_empty(batch, 2 * vertical * dilation, 2 * horizontal * dilation, channels)
    start = border * dilation
    bottom, right = start + height, start + width
    padded[:, start:bottom, start:right] = x.permute(0, 2, 3, 1)
    for frame in (padded[:, :start], padded[:, bottom:], padded[:, :, :start], padded[:, :, right:]):
        frame.zero_()
    return padded.view(batch, vertical, 2, dilation, horizontal, 2, dilation, channels)
