"""1x1 convolutions with gradients by matrix products against PyTorch's own."""

import pytest
import torch
from torch import nn

from model.kernels.pointwise import MIN_CHANNELS, Conv1x1


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_equals_pytorchs_convolution_and_so_do_its_gradients(layout):
    conv = nn.Conv2d(6, MIN_CHANNELS, 1, bias=False).to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 7, generator=generator).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(2, MIN_CHANNELS, 5, 7, generator=generator).to(memory_format=layout)
    outputs = [conv(x), Conv1x1(conv)(x)]
    assert 'Pointwise' in outputs[1].grad_fn.name()  # else this compared PyTorch's with itself
    gradients = [torch.autograd.grad(y, (x, conv.weight), gradient) for y in outputs]
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_weight_can_be_trained_behind_a_fixed_input():
    conv = Conv1x1(nn.Conv2d(4, MIN_CHANNELS, 1, bias=False))
    conv(torch.ones(1, 4, 2, 2)).sum().backward()
    torch.testing.assert_close(conv.weight.grad, torch.full_like(conv.weight, 4))


def test_takes_over_the_convolutions_that_it_is_faster_for():
    def fits(channels=MIN_CHANNELS, size=1, **settings):
        return Conv1x1.fits(nn.Conv2d(channels, 64, size, **({'bias': False} | settings)))

    assert fits()
    assert not fits(channels=512) and not fits(size=3) and not fits(bias=True)
    assert not fits(stride=2) and not fits(padding=1) and not fits(groups=2)
