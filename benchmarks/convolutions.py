"""3x3 convolutions of resnet50v2 at 473x473: PyTorch's own against Winograd's (`model/kernels/winograd.py`).

    python benchmarks/convolutions.py [--precision float32 bfloat16] [--rounds 7]

For each of the network's shapes: median times of the forward pass, and of forward and backward pass, the two ways
taking turns; and the error of both ways against float64, relative to the root mean square. With fewer channels than
`MIN_CHANNELS_FORWARD`, both ways have the same forward pass. Use it on processors unlike those in NOTES.md.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import clock
from model.kernels import keep_freed_memory
from model.kernels.winograd import _Winograd
from utils.cli import positive

SHAPES = {  # batch 2 in training, 1 in the forward pass alone: input and output channels, size, dilation
    'stem': (64, 128, 237, 1),
    'layer1': (64, 64, 119, 1),
    'layer2': (128, 128, 60, 1),
    'layer3': (256, 256, 60, 2),
    'layer4': (512, 512, 60, 4),
    'decoder': (2048, 512, 60, 1),
}


def direct(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """PyTorch's convolution."""
    return F.conv2d(x, weight, padding=dilation, dilation=dilation)


def forward(convolve: Callable, x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """The forward pass alone."""
    with torch.no_grad():
        return convolve(x, weight, dilation)


def training(
    convolve: Callable, x: torch.Tensor, weight: torch.Tensor, dilation: int, gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Both passes."""
    return torch.autograd.grad(convolve(x, weight, dilation), (x, weight), gradient)


def in_turn(calls: Sequence[Callable], rounds: int) -> list[float]:
    """Median milliseconds of calls that take turns."""
    seconds = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, measured in zip(calls, seconds, strict=True):
            measured.append(clock(call))
    return [1e3 * statistics.median(measured) for measured in seconds]


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Input and weight of the size and spread of the network's."""
    channels, outputs, size, _ = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, size, size, generator=generator).relu()
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    return (t.to(dtype, memory_format=torch.channels_last).requires_grad_() for t in (x, weight))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--precision', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    parser.add_argument('--rounds', type=positive, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    print(f'{"":9} {"layer":8} {"forward, batch 1, ms":>22} {"both passes, batch 2, ms":>28} {"error":>21}')
    for precision in args.precision:
        for name, shape in SHAPES.items():
            x, weight = tensors(shape, getattr(torch, precision))
            dilation = shape[3]
            image = x.detach()[:1].contiguous(memory_format=torch.channels_last)
            gradient = direct(x, weight, dilation).detach()
            ways = (direct, _Winograd.apply)
            alone = in_turn([partial(forward, way, image, weight, dilation) for way in ways], args.rounds)
            both = in_turn([partial(training, way, x, weight, dilation, gradient) for way in ways], args.rounds)
            exact = direct(image.double(), weight.detach().double(), dilation)
            errors = [
                ((forward(way, image, weight, dilation) - exact).square().mean() / exact.square().mean()).sqrt().item()
                for way in ways
            ]
            print(
                f'{precision:9} {name:8} {alone[0]:8.1f} -> {alone[1]:7.1f} ({alone[0] / alone[1]:.2f})'
                f' {both[0]:12.1f} -> {both[1]:8.1f} ({both[0] / both[1]:.2f}) {errors[0]:11.1e} -> {errors[1]:.1e}',
                flush=True,
            )


if __name__ == '__main__':
    main()
