"""LDA against normal distributions written from the formulas, and what it must not change."""

import pytest
import torch
from test_joint import Backbone, decoder
from torch.distributions import MultivariateNormal

from core.errors import InputError
from model.discriminants import SHRINKAGE, Discriminants
from model.lda import LDA
from model.network import Labelled

BASE, NOVEL = 2, 2
DIRECTIONS = torch.randn(1 + BASE + NOVEL, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(num_novel=NOVEL, output_stride=16, **options):
    torch.manual_seed(0)
    return LDA(Backbone(output_stride), decoder(), BASE, num_novel, **options).double()


def images(labels, seed):
    """Images [B, 6, h, w] whose pixels are near the direction of their label [B, h, w]."""
    noise = torch.randn(*labels.shape, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (DIRECTIONS[labels.clamp(max=len(DIRECTIONS) - 1)] + 0.7 * noise).permute(0, 3, 1, 2)


def seen(net, labels, seed):
    return Labelled(net.maps(images(labels, seed)), labels, [tuple(labels.shape[1:])] * len(labels))


def draw(choices, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(choices)[torch.randint(len(choices), (count, 7, 9), generator=generator)]


def registered(net, batches=3):
    """The network, with what it has learned from: base views with labels, supports with labels."""
    base, supports = draw((0, 1, 1, 2, 255), 3, 6), [draw((0, 3, 255), 4), draw((0, 3, 4), 5)]
    views = zip(base.chunk(batches), images(base, 3).chunk(batches), strict=True)
    net.start_from_supports(
        [seen(net, labels, seed) for seed, labels in enumerate(supports, 4)],
        [Labelled(net.maps(image), labels, [(7, 9)] * len(labels)) for labels, image in views],
    )
    return net, base, supports


def joined(net, labels, seed):
    """Vectors [N, D] and labels [N] of images."""
    with torch.no_grad():
        middle = net.backbone.middle(images(labels, seed))
        last = net.backbone(images(labels, seed))
        f = torch.cat([net.decoder(last), last, middle], dim=1)
    return f.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()


def test_novel_logits_follow_the_formulas():
    net, base, supports = registered(network(calibration='none'))
    f, labels = joined(net, base, 3)
    means = [f[labels == label].mean(dim=0) for label in range(1 + BASE)]
    centred = torch.cat([f[labels == label] - means[label] for label in range(1 + BASE)])
    covariance = centred.T @ centred / len(centred)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().diag()
    novel, theirs = map(
        torch.cat, zip(*(joined(net, support, seed) for seed, support in enumerate(supports, 4)), strict=True)
    )
    means += [novel[theirs == 1 + BASE + k].mean(dim=0) for k in range(NOVEL)]  # of all supports that show a class
    shares = [(labels == label).sum() / (labels < 255).sum() for label in range(1 + BASE)]
    shares += [sum(shares[1:]) / BASE] * NOVEL
    shown = draw((0, 1, 2, 3, 4), 9)
    with torch.no_grad():
        logits = net.eval()(images(shown, 9))
        stage_1 = network(0)
        stage_1.load_state_dict(net.state_dict(), strict=False)
        assert torch.allclose(logits[:, : 1 + BASE], stage_1(images(shown, 9)), atol=1e-10)
    f, _ = joined(net, shown, 9)
    d = torch.stack(
        [MultivariateNormal(m, shrunk).log_prob(f) + s.log() for m, s in zip(means, shares, strict=True)], 1
    )
    found = logits.permute(0, 2, 3, 1).flatten(0, 2)
    best = found[:, : 1 + BASE].amax(dim=1, keepdim=True)
    expected = best + d[:, 1 + BASE :] - d[:, : 1 + BASE].amax(dim=1, keepdim=True)
    assert torch.allclose(found[:, 1 + BASE :], expected, atol=1e-6)
    novel = d.argmax(dim=1) > BASE
    assert torch.equal(found.argmax(dim=1)[novel], d.argmax(dim=1)[novel]) and 30 < novel.sum() < len(novel) - 30
    assert (novel == (shown.flatten() > BASE)).float().mean() > 0.9


def test_batches_do_not_matter_and_unseen_classes_do_not_disturb():
    one, other = (registered(network(), batches)[0] for batches in (1, 3))
    assert torch.allclose(one.discriminants.weight, other.discriminants.weight)
    net = network()
    base = draw((0, 1), 3)  # nothing of class 2
    net.start_from_supports([seen(net, draw((0, 3), 4), 4), seen(net, draw((0, 4), 5), 5)], [seen(net, base, 3)])
    net.calibrate([seen(net, base, 3)])
    logits = net.eval()(images(draw((0, 1, 3, 4), 9), 9))
    assert logits.isfinite().all()


def test_a_channel_that_is_silent_in_base_views_hides_no_class():
    labels, shown = draw((0, 1, 2), 3, 20), draw((3,), 4, 20)
    silent, now_and_then = images(labels, 3), images(shown, 4)
    silent[:, 5], now_and_then[:, 5] = 0, 0
    now_and_then[:, 5, 3, 3] = 1
    discriminants = Discriminants(6, BASE, 1).double()
    discriminants.fit([(silent, labels, labels)], [(now_and_then, shown, shown)])
    new = images(draw((3,), 5), 5)
    new[:, 5] = 0
    scores = torch.einsum('kd,bdhw->bkhw', discriminants.weight, new) + discriminants.bias[:, None, None]
    assert (discriminants.margins(scores) > 0).float().mean() > 0.7


def test_base_views_without_a_base_class_are_refused():
    net = network()
    with pytest.raises(InputError, match=r'no pixel of a base class.*--base-views'):
        net.start_from_supports([seen(net, draw((0, 3, 4), 4), 4)], [seen(net, draw((0, 255), 3), 3)])


def test_an_object_smaller_than_a_position_is_registered_from_where_it_is():
    fitted, image = [], images(draw((0,), 4, 1), 4)
    small, plain = torch.zeros(1, 28, 36, dtype=torch.long), torch.zeros(1, 7, 9, dtype=torch.long)
    small[0, 2, 2] = 3  # no position's pixel, but within the first position
    plain[0, 0, 0] = 3
    for labels in (small, plain):
        net = network()
        supports = [Labelled(net.maps(image), labels, [tuple(labels.shape[1:])]), seen(net, draw((0, 4), 5), 5)]
        net.start_from_supports(supports, [seen(net, draw((0, 1, 2), 3), 3)])
        fitted.append(net.discriminants)
    assert torch.allclose(fitted[0].weight, fitted[1].weight) and torch.allclose(fitted[0].bias, fitted[1].bias)


def test_a_finer_backbone_is_averaged_to_a_stride_of_16():
    """On flat images, where averaging and enlarging change nothing."""
    fine, plain = (registered(network(output_stride=stride))[0] for stride in (8, 16))
    fine.load_state_dict(plain.state_dict())
    flat = images(draw((3,), 9), 9)[..., :1, :1].expand(-1, -1, 7, 9)
    assert torch.allclose(fine.eval()(flat), plain.eval()(flat), atol=1e-8)
    assert {name: tuple(value.shape[1:]) for name, value in fine.maps(flat).items()} == fine.map_shapes((56, 72))


@pytest.mark.parametrize('background', (True, False))
def test_without_background_nothing_is_told_from_it(background):
    net, _, _ = registered(network(calibration='none'))
    net.background = background
    maps = net.finish_maps(net.maps(images(draw((0, 1, 3), 9), 9)))
    changed = dict(maps)
    changed['discriminants'] = maps['discriminants'].clone()
    changed['discriminants'][:, 0] += 1e3  # all is background
    with torch.no_grad():
        logits, other = (net.eval().classify(each)[:, 1 + BASE :] for each in (maps, changed))
    assert torch.equal(logits, other) is not background
