"""The methods beside POP: CAPL against plain loops written from its formulas, fine-tuning, and what all share."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from engine import evaluation, precision
from engine.checkpoint import read_checkpoint, save_checkpoint
from model import MODELS, PSP, Head, build_model
from model.capl import CAPL
from model.kernels import fuse
from model.network import Labelled

METHODS = ('pspnet_pop', 'pspnet_ft', 'pspnet_capl')
CPU = torch.device('cpu')


def small(method, num_base=3, num_novel=0, channels=16):
    """A network whose input is the backbone's feature, in float64."""
    torch.manual_seed(num_base)
    backbone = nn.Identity()
    backbone.output_stride, backbone.out_channels = 1, 8
    return method(backbone, PSP(8, channels), num_base, num_novel).double()


def unit(vector):
    return vector / vector.norm()


def sigmoid_mlp(net, p, m):
    hidden = (net.mlp[0].weight @ torch.cat([p, m])).clamp(min=0)
    return 1 / (1 + torch.exp(-(net.mlp[2].weight[0] @ hidden + net.mlp[2].bias[0])))


def pixels(features, masks, label):
    """Feature vectors at the positions whose nearest pixel has a label."""
    height, width = features.shape[2:]
    rows, columns = masks.shape[1:]
    return [
        features[b, :, y, x]
        for b in range(len(features)) for y in range(height) for x in range(width)
        if masks[b, math.floor(y * rows / height), math.floor(x * columns / width)] == label
    ]  # fmt: skip


def blocks(batch, labels, side=5, factor=4, seed=0):
    """Masks of blocks, so that nearest pixels are well defined; 255 among them."""
    choice = torch.tensor([*labels, 255])
    drawn = torch.randint(len(choice), (batch, side, side), generator=torch.Generator().manual_seed(seed))
    return choice[drawn].repeat_interleave(factor, 1).repeat_interleave(factor, 2)


@pytest.mark.parametrize('background', (0.4, 0.6))
def test_capl_enriches_prototypes_with_fake_supports_as_its_formulas_say(background):
    net, features = small(CAPL, 5), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    masks = blocks(2, (0, 1, 2, 3, 5))  # class 4 is not shown
    draws = torch.tensor([background, 0.5, 0.1, 0.9, 0.0, 0.3])
    novel = {2, 5}  # half of four, those with the lowest draws
    expected = []
    for k, prototype in enumerate(net.proto):
        p, shown = unit(prototype), [unit(f) for f in pixels(features, masks, k)]
        if shown and k in novel:
            expected.append(sum(shown) / len(shown))
        elif shown and (k > 0 or background < 0.5):
            m = sum(shown) / len(shown)
            gate = sigmoid_mlp(net, p, m)
            expected.append(gate * p + (1 - gate) * m)
        else:
            expected.append(p)
    found = net.enriched(features, masks, draws)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-10)
    # an odd number of classes is rounded down
    one = net.enriched(features, masks.where(masks == 1, 255), draws)[1]
    assert torch.allclose(one, sigmoid_and_mix(net, features, masks, 1), rtol=1e-10)


def sigmoid_and_mix(net, features, masks, k):
    shown = [unit(f) for f in pixels(features, masks, k)]
    p, m = unit(net.proto[k]), sum(shown) / len(shown)
    gate = sigmoid_mlp(net, p, m)
    return gate * p + (1 - gate) * m


def refined_by_hand(net, image):
    """p' of one image [C, h, w]."""
    vectors = [unit(f) for f in image.flatten(1).T]
    rows = []
    for prototype in net.proto:
        p = unit(prototype)
        scores = [math.exp(10 * (f @ p).item()) for f in vectors]
        g = sum(score * f for score, f in zip(scores, vectors, strict=True)) / sum(scores)
        w = max((unit(g) @ p).item(), 0)
        rows.append(w * g + (1 - w) * p)
    return torch.stack(rows)


def cosines(image, rows):
    return torch.stack([10 * torch.einsum('chw,c->hw', F.normalize(image, dim=0), unit(row)) for row in rows])


def test_capl_logits_registration_and_losses_follow_the_formulas():
    net = small(CAPL, 3, 2)
    features = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    # registration: two classes with two supports each; these show other classes too
    supports = [(torch.randn(2, 16, 5, 5, dtype=torch.float64), blocks(2, labels, seed=s))
                for s, labels in ((1, (0, 1, 4)), (2, (0, 2, 4, 5)))]  # fmt: skip
    novel, context = [], []
    for label, (maps, masks) in zip((4, 5), supports, strict=True):
        mean = {k: sum(found) / len(found) for k in range(6) if (found := pixels(maps, masks, k))}
        novel.append(unit(mean[label]))
        context.append([mean.get(k, net.proto[k]) for k in range(4)])
    rows = []
    for k in range(4):
        p, m = unit(net.proto[k]), unit((context[0][k] + context[1][k]) / 2)
        gate = sigmoid_mlp(net, p, m)
        rows.append(unit(gate * p + (1 - gate) * m))
    with torch.no_grad():
        before = copy.deepcopy(net.state_dict())
        net.start_from_supports([Labelled({'features': maps}, masks, []) for maps, masks in supports], [])
        assert torch.allclose(net.registered, torch.stack(rows + novel), rtol=1e-10)
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items() if key != 'registered')
        logits = net.classify({'features': features})
        for image, found in zip(features, logits, strict=True):
            p2 = torch.cat([refined_by_hand(net, image) + torch.stack(rows), torch.stack(novel)])
            assert torch.allclose(found, cosines(image, p2), rtol=1e-9)
            assert torch.allclose(net.classify({'features': image[None]}, net.constants())[0], found, rtol=1e-9)

    base, images = small(CAPL, 3), torch.randn(4, 16, 5, 5, dtype=torch.float64)
    masks = blocks(4, (0, 1, 2, 3))
    auxiliary = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    torch.manual_seed(7)
    losses = base.base_losses((images, auxiliary), masks)
    torch.manual_seed(7)
    p1 = base.enriched(images[2:], masks[2:], torch.rand(4))
    p2 = [refined_by_hand(base, image) + p1 for image in images]
    expected = {
        'ce_support': (0.5, torch.stack([cosines(image, p1) for image in images])),
        'ce': (0.5, torch.stack([cosines(image, p) for image, p in zip(images, p2, strict=True)])),
        'aux': (0.4, auxiliary),
    }
    for name, (weight, logits) in expected.items():
        full = F.interpolate(logits, masks.shape[1:], mode='bilinear', align_corners=True)
        assert losses[name].item() == pytest.approx(weight * F.cross_entropy(full, masks, ignore_index=255).item())


def test_a_class_smaller_than_a_position_is_registered_from_where_it_is():
    net, features = small(CAPL, 1, 1), torch.randn(1, 16, 2, 2, dtype=torch.float64)
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[0, 6, 7] = 2  # no position's nearest pixel
    net.start_from_supports([Labelled({'features': features}, masks, [])], [])
    assert torch.allclose(net.registered[2], F.normalize(features[0, :, 1, 1], dim=0))


@pytest.mark.parametrize('name', METHODS)
def test_stage_1_gives_every_parameter_a_gradient(tiny, name):
    """Also where no class is context: DistributedDataParallel waits for all gradients."""
    torch.manual_seed(0)
    net = build_model(tiny, 3, output_stride=32, model=name)
    net.start_base()
    net.train()
    images = torch.randn(4, 3, 65, 65)
    for masks in (torch.randint(0, 4, (4, 65, 65)), torch.full((4, 65, 65), 255)):
        net.zero_grad()
        losses = net.base_losses(net(images), masks, pixel_weight=1e-4)
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(value.isfinite() for value in losses.values())
    net.eval()
    assert net(images).shape == (4, 4, 3, 3)
    shares = [0.3, 0.7]  # of micro-batches: weighted losses add up
    one, other = (weighted_loss(net, images, masks % 4, weight) for weight in shares)
    assert other.item() == pytest.approx(one.item() * 7 / 3, rel=1e-4)


def weighted_loss(net, images, masks, weight):
    net.train()
    torch.manual_seed(1)
    return net.base_losses(net(images), masks, pixel_weight=weight)['ce']


@pytest.mark.parametrize(('variant', 'trained'), (('head', {'classifier_n'}), ('decoder', {'classifier_n', 'decoder'})))
def test_fine_tuning_trains_what_its_variant_says(tiny, variant, trained):
    torch.manual_seed(0)
    options = {'train': variant}
    base = build_model(tiny, 3, output_stride=32, model='pspnet_ft', options=options)
    net = build_model(tiny, 3, 2, output_stride=32, model='pspnet_ft', options=options)
    net.start_from(base)
    net.freeze_base()
    before = copy.deepcopy(net.state_dict())
    assert {name.split('.')[0] for name, p in net.named_parameters() if p.requires_grad} == trained
    frozen, images = fuse(base), torch.randn(4, 3, 65, 65)
    net.train()
    maps = frozen.maps(images)
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == frozen.map_shapes((65, 65))
    # what is kept has half precision
    kept = Head(net)({name: value.half() for name, value in maps.items()})
    with torch.no_grad():
        assert (kept - net.eval()(images)).norm() < 1e-2 * kept.norm()
    net.train()
    masks = torch.randint(0, 6, (4, 65, 65))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    sum(net.novel_losses(Head(net)(maps), masks).values()).backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split('.')[0] for name in changed} == trained
    norm = {name.rsplit('.', 1)[0] for name in before if name.endswith('running_mean')}
    assert not {name for name in changed if name.rsplit('.', 1)[0] in norm}
    state = net.state_dict()
    assert net.count_classes(state) == (3, 2) and [len(part) for part in net.prototypes()] == [3, 2]


@pytest.mark.parametrize('device', ('cpu', 'cuda'))
def test_an_image_is_segmented_alike_whatever_is_beside_it(tiny, device, monkeypatch):
    """CAPL looks at whole images: their padding, and others of the batch, must have no effect."""
    net = build_model(tiny, 2, 1, output_stride=8, model='pspnet_capl')
    torch.manual_seed(0)
    images = torch.zeros(2, 3, 65, 65)
    images[0, :, :33, :49], images[1, :, :65, :25] = torch.randn(3, 33, 49), torch.randn(3, 65, 25)
    shapes = [(33, 49), (65, 25)]
    group = evaluation._groups
    monkeypatch.setattr(evaluation, '_groups', lambda alike, _: group(alike, torch.device(device)))
    maps = {'features': net.eval().features(images)}

    def segmented(chosen, canvas=(65, 65)):
        batch = {
            'maps': {name: value[chosen] for name, value in maps.items()}, 'mask': torch.zeros(len(chosen), 65, 65),
            'id': [str(i) for i in chosen], 'skipped': [], 'shape': [shapes[i] for i in chosen],
            'canvas': [canvas] * len(chosen),
        }  # fmt: skip
        groups = evaluation.one_pass(net, [batch], CPU)
        return {
            image_id: labels for part in groups for image_id, labels in zip(part.ids, part.predictions, strict=True)
        }

    alone, together = segmented([0]) | segmented([1]), segmented([0, 1])
    with torch.no_grad():
        maps['features'][0, :, 5:] = 100.0  # of padding only: row 5 is at y = 40
    for image_id, labels in segmented([0, 1]).items():
        assert torch.equal(labels, alone[image_id]) and torch.equal(labels, together[image_id])


@pytest.mark.parametrize('name', METHODS[1:])
def test_checkpoints_say_their_method_and_leave_the_auxiliary_head_out(tiny, name, tmp_path):
    torch.manual_seed(0)
    base = build_model(tiny, 3, output_stride=32, model=name)
    base.start_base()
    save_checkpoint(tmp_path / 'base.pth', base, {'model': name, 'fold': 0}, 1, {})
    save_checkpoint(tmp_path / 'pop.pth', build_model(tiny, 3), {'fold': 0}, 1, {})  # as before there was --model
    checkpoint = read_checkpoint(tmp_path / 'base.pth')
    assert checkpoint.model == name and checkpoint.class_counts == (3, 0)
    with pytest.raises(InputError, match=f'of --model {name}; utils.teach takes pspnet_pop'):
        checkpoint.expect_pop('utils.teach')
    novel = build_model(tiny, 3, 2, output_stride=32, model=name)
    assert all(key.startswith(novel.STAGE_2_PREFIXES) for key in checkpoint.load_into(novel, {'model': name}))
    resumed = build_model(tiny, 3, output_stride=32, model=name)
    resumed.start_base()
    assert checkpoint.load_into(resumed) == []
    state = resumed.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    save_checkpoint(tmp_path / 'novel.pth', novel, {'model': name}, 1, {})
    second = read_checkpoint(tmp_path / 'novel.pth')
    assert second.class_counts == (3, 2)
    again = build_model(tiny, 3, output_stride=32, model=name)
    second.load_base_into(again, {'model': name})
    assert torch.equal(again.decoder.bottleneck[3].weight, base.decoder.bottleneck[3].weight)
    for path, expected, theirs in (('base.pth', 'pspnet_pop', name), ('pop.pth', name, 'pspnet_pop')):
        with pytest.raises(InputError, match=f'of {theirs}, expected {expected}. Give --model {theirs}'):
            read_checkpoint(tmp_path / path).load_into(resumed, {'model': expected})
    damaged = {key: value for key, value in base.state_dict().items() if not key.startswith(('classifier', 'proto'))}
    torch.save({'format': 'pop', 'config': {'model': name}, 'model': damaged}, tmp_path / 'damaged.pth')
    with pytest.raises(InputError, match=f'no checkpoint of a {MODELS[name].title} network: it has no '):
        _ = read_checkpoint(tmp_path / 'damaged.pth').class_counts
    torch.save({'format': 'pop', 'config': {'model': 'later'}, 'model': damaged}, tmp_path / 'later.pth')
    with pytest.raises(InputError, match='--model later; this version has pspnet_pop'):
        _ = read_checkpoint(tmp_path / 'later.pth').class_counts


@pytest.mark.parametrize('name', METHODS[1:])
def test_mixed_precision_gives_about_the_same_losses_and_logits(name):
    net = build_small_stage_1(MODELS[name])
    images, masks = torch.randn(4, 8, 9, 9), blocks(4, (0, 1, 2, 3))
    for training in (True, False):
        values = []
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            net.train(training)
            with precision.autocast(CPU, dtype):
                found = net(images)
            values.append(torch.stack([*net.base_losses(found, masks).values()]) if training else found)
        assert values[1].dtype == torch.float32
        assert (values[0] - values[1]).norm() < 0.05 * values[0].norm()


def build_small_stage_1(method):
    """A small network in float32 with its auxiliary head, which takes the backbone's features here."""
    net = small(method).float()
    net.backbone.middle, net.backbone.middle_channels = nn.Identity(), 8
    net.backbone.dilatable_layers = (None, nn.Identity())
    net.start_base()
    return net
