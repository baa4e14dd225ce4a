"""Winograd's convolution against PyTorch's direct one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model import PSP, build_model, reference
from model.kernels import fuse, winograd
from model.kernels.winograd import MIN_CHANNELS, MIN_CHANNELS_FORWARD, Conv3x3, FunctionalConv3x3, conv3x3


@pytest.mark.parametrize('dilation', [1, 2, 4])
@pytest.mark.parametrize('size', [(1, 1), (5, 8), (13, 3)])
def test_equals_the_direct_convolution_and_so_do_its_gradients(size, dilation, monkeypatch):
    monkeypatch.setattr(winograd, 'MIN_CHANNELS_FORWARD', 0)
    monkeypatch.setattr(winograd, 'CHANNELS_AT_ONCE', 2)  # of 3: in unequal parts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    outputs = [
        winograd._Winograd.apply(x, weight, dilation), F.conv2d(x, weight, padding=dilation, dilation=dilation)
    ]  # fmt: skip
    gradients = [torch.autograd.grad(y, (x, weight), gradient) for y in outputs]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize('dilation', [1, 2])
def test_is_as_exact_as_the_direct_convolution_in_float32(dilation):
    generator = torch.Generator().manual_seed(0)
    channels = MIN_CHANNELS_FORWARD
    x = torch.randn(2, channels, 29, 31, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    bias = torch.randn(channels, generator=generator)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=dilation, dilation=dilation)
    direct = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    fast = conv3x3(x, weight, bias, dilation)
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert (fast - exact).abs().max() <= (direct - exact).abs().max()
    assert not torch.equal(fast, direct)  # else this compared the direct form with itself


def test_takes_over_the_convolutions_that_it_is_faster_for():
    def fits(in_channels=MIN_CHANNELS, **settings):
        return Conv3x3.fits(torch.nn.Conv2d(in_channels, MIN_CHANNELS, 3, **({'bias': False, 'padding': 1} | settings)))

    assert fits() and fits(padding=2, dilation=2)
    assert not fits(padding=(1, 2), dilation=(1, 2)) and not fits(padding_mode='reflect')
    assert not fits(stride=2) and not fits(padding=0) and not fits(groups=2) and not fits(in_channels=32)


def test_draws_no_random_numbers():
    conv = torch.nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1, bias=False)
    torch.manual_seed(0)
    fast = Conv3x3(conv)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1) and fast.weight is conv.weight


def test_leaves_mixed_precision_and_small_maps_to_pytorch(monkeypatch):
    monkeypatch.setattr(winograd, '_Winograd', None)
    weight = torch.randn(MIN_CHANNELS, MIN_CHANNELS, 3, 3)
    with torch.autocast('cpu', torch.bfloat16):
        assert conv3x3(torch.randn(1, MIN_CHANNELS, 30, 30), weight).dtype == torch.bfloat16
    conv3x3(torch.randn(16, MIN_CHANNELS, 20, 20), weight)


def test_network_uses_it_and_computes_what_it_would_without(monkeypatch):
    torch.manual_seed(0)
    net = build_model('resnet50v2', 3).eval()
    x = torch.randn(1, 3, 233, 241)  # features of 30x31
    calls = []
    original = winograd._Winograd.apply
    monkeypatch.setattr(winograd._Winograd, 'apply', lambda *args: calls.append(args) or original(*args))
    with torch.no_grad():
        fast = net(x)
        monkeypatch.setattr(winograd, 'MIN_CHANNELS', 10**6)
        count = len(calls)
        plain = net(x)
    # layer1: 3, layer2: 3, layer3: 6, layer4: 3, the stem's second and third, the decoder
    assert count == len(calls) == 18
    assert (fast - plain).abs().max() < 1e-4 * plain.abs().max()


def test_frozen_networks_transform_their_kernels_once(monkeypatch):
    torch.manual_seed(0)
    net = build_model('resnet18', 3).eval()
    frozen = fuse(net)
    x = torch.randn(1, 3, 233, 241)
    with torch.no_grad():
        expected = net(x)
        monkeypatch.setattr(winograd, '_kernels', None)
        assert (frozen(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_frozen_convolutions_have_gradients_by_their_input():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(MIN_CHANNELS_FORWARD, MIN_CHANNELS_FORWARD, 3, padding=2, dilation=2, bias=False)
    frozen = Conv3x3(conv).requires_grad_(False)
    frozen.freeze_weight()
    x = torch.randn(1, MIN_CHANNELS_FORWARD, 29, 31, requires_grad=True)
    ours, theirs = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in (frozen, conv))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize('channels', [MIN_CHANNELS, MIN_CHANNELS_FORWARD])
def test_trains_with_a_bias_as_the_direct_convolution_does(channels, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 31, 29).to(memory_format=torch.channels_last).requires_grad_()
    weight = (torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)).requires_grad_()
    bias = torch.randn(channels, requires_grad=True)
    calls = []
    backward = winograd._correlate
    monkeypatch.setattr(winograd, '_correlate', lambda *args: calls.append(args) or backward(*args))
    gradients = []
    for function in (conv3x3, lambda *args: F.conv2d(*args, padding=1)):
        y = function(x, weight, bias)
        y *= 2  # the output may be changed in place
        gradients.append(torch.autograd.grad(y.square().sum(), (x, weight, bias)))
    assert calls
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_decoder_trains_as_its_plain_form_does():
    torch.manual_seed(0)
    decoder = PSP(MIN_CHANNELS_FORWARD, MIN_CHANNELS_FORWARD)
    assert FunctionalConv3x3.fits(decoder.convolve)
    decoder.convolve = FunctionalConv3x3(decoder.convolve)
    x = torch.randn(2, MIN_CHANNELS_FORWARD, 31, 31, requires_grad=True)
    wanted = (x, *decoder.parameters())
    gradients = [
        torch.autograd.grad(form(x).square().sum(), wanted) for form in (decoder, partial(reference.decode, decoder))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_network_trains_with_it():
    torch.manual_seed(0)
    net = build_model('resnet18', 3).train()
    loss = net(torch.randn(2, 3, 233, 233)).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
