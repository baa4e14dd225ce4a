"""Upsampling by bands against PyTorch's upsampling of the whole: labels, loss and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.kernels import upsampling
from model.kernels.upsampling import needed, predict
from model.losses import cross_entropy

# feature size, mask size: enlarged, unequal, reduced, equal, one row
SIZES = (((5, 7), (33, 50)), ((4, 4), (31, 31)), ((9, 6), (5, 4)), ((6, 5), (6, 5)), ((3, 4), (1, 9)), ((1, 2), (5, 6)))


@pytest.fixture(params=(1, 300, 2**20))
def band_elements(request, monkeypatch):
    """Bands of one row, of some rows, and one band."""
    monkeypatch.setitem(upsampling.BAND_ELEMENTS, 'cpu', request.param)


def whole(logits, size):
    return F.interpolate(logits, size, mode='bilinear', align_corners=True)


@pytest.mark.parametrize(('source', 'size'), SIZES)
def test_labels_are_those_of_the_whole(band_elements, source, size):
    logits = torch.randn(2, 4, *source, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = whole(logits, size).argmax(dim=1)
    assert torch.equal(predict(logits, size), expected)
    height, width = max(size[0] - 2, 1), max(size[1] // 2, 1)
    assert torch.equal(predict(logits, size, (height, width)), expected[:, :height, :width])


@pytest.mark.parametrize(('source', 'size'), SIZES)
def test_loss_and_gradient_are_those_of_the_whole(band_elements, source, size):
    generator = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(2, 4, *source, dtype=torch.float64, generator=generator)
    mask = torch.randint(0, 4, (2, *size), generator=generator)
    mask[0, : size[0] // 2] = 255
    logits.requires_grad_()
    expected = F.cross_entropy(whole(logits, size), mask, ignore_index=255)
    found = cross_entropy(logits, mask)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss * 3, logits)[0] for loss in (expected, found)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_loss_survives_logits_that_overflow_exp():
    logits = torch.tensor([300.0, -300.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert cross_entropy(logits, torch.ones(1, 9, 9, dtype=torch.long)).item() == pytest.approx(600)


def test_autocast_rounds_neither_loss_nor_labels():
    generator = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(1, 4, 9, 9, generator=generator), torch.randint(0, 4, (1, 65, 65), generator=generator)
    loss, labels = cross_entropy(logits, mask), predict(logits, (65, 65))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(cross_entropy(logits, mask), loss) and torch.equal(predict(logits, (65, 65)), labels)


@pytest.mark.parametrize(('source', 'size'), ((60, 473), (33, 257), (5, 33), (9, 5), (60, 500), (1, 7), (7, 1)))
def test_needed_cells_are_enough(source, size):
    x = torch.randn(1, 1, source, 2)
    full = whole(x, (size, 2))
    for count in range(1, size + 1):
        cells = needed(count, size, source)
        assert cells <= math.ceil((count - 1) * (source - 1) / max(size - 1, 1)) + 3
        cut = torch.cat([x[:, :, :cells], torch.full_like(x[:, :, cells:], 1e9)], dim=2)
        assert torch.equal(whole(cut, (size, 2))[:, :, :count], full[:, :, :count])
