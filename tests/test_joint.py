"""POP in the joint space of decoder and backbone, against its plain formulas and against POP."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.features import LabelledFeatures
from model import POP, Head, build_model, joint_space
from model.discriminants import LEAST_STD
from model.joint import DROPOUT, EVIDENCE, JointPOP
from model.kernels import fuse
from model.losses import orthogonality
from model.network import Labelled, labels_at

OPTIONS = [
    {'prototypes': prototypes, 'background': background}
    for prototypes in ('joint', 'last', 'decoder')
    for background in ('base', 'novel')
]
PLAIN = {'calibration': 'none'}
AS_POP = {'prototypes': 'decoder', 'background': 'novel', **PLAIN}


class Backbone(nn.Module):
    """Clamps its input, then scales it channel by channel."""

    out_channels, middle_channels = 6, 6

    def __init__(self, output_stride=16):
        super().__init__()
        self.output_stride = output_stride  # said to be

    @property
    def dilatable_layers(self):
        return None, lambda x: x * torch.arange(1, 7, dtype=x.dtype)[:, None, None]

    def middle(self, x):
        return x.clamp(min=-3)

    def forward(self, x):
        return self.dilatable_layers[1](self.middle(x))


def decoder():
    layer = nn.Conv2d(6, 16, 1, bias=False)
    layer.out_channels = 16
    return layer


def network(options, num_base=3, num_novel=2, trained=True, output_stride=16):
    torch.manual_seed(0)
    net = JointPOP(Backbone(output_stride), decoder(), num_base, num_novel, **options).double()
    if trained:  # anything but the start
        with torch.no_grad():
            net.novel_emb.normal_()
            net.classifier_n[0].weight.normal_()
            if net.extra:
                net.backbone_mean.normal_()
                net.backbone_std.uniform_(0.5, 2)
    return net


def labelled(net, image, masks):
    return Labelled(net.maps(image), masks, [tuple(masks.shape[1:])] * len(masks))


def seen_of_backbone(net, image):
    """What novel prototypes see beside the decoder's features: the backbone's last layers, the last one first."""
    return torch.cat([net.backbone(image), net.backbone.middle(image)], dim=1)[:, : net.extra]


def mlp(layers, vector):
    """phi of one vector [C]."""
    weights = [layer.weight.flatten(1) for layer in layers if isinstance(layer, nn.Conv2d)]
    return (weights[2] @ (weights[1] @ (weights[0] @ vector).clamp(min=0)).clamp(min=0))[0]


def plain_logits(net, image, y, x):
    """Logits of one position [1 + Kb + Kn], written from the formulas."""
    z = seen_of_backbone(net, image)
    q = net.decoder(net.backbone(image))[0, :, y, x]
    base = [F.normalize(s, dim=0) for s in net.base_emb]
    rest = q - sum((s @ q) * s for s in base)
    logits = [mlp(net.classifier, (s @ q) * s) for s in base]
    joint, base = q, [F.pad(s, (0, net.extra)) for s in base]
    if net.extra:
        joint = torch.cat([q, (z[0, :, y, x] - net.backbone_mean) / net.backbone_std])
    novel = [F.normalize(s, dim=0) for s in net.novel_emb]
    logits += [mlp(net.classifier_n, (s @ joint) * s) for s in novel]
    residual = joint - sum((s @ joint) * s for s in base) - sum((s @ joint) * s for s in novel)
    if net.options['background'] == 'base':
        return torch.stack([mlp(net.classifier, rest), *logits])
    return torch.stack([mlp(net.classifier_n, residual), *logits])


@pytest.mark.parametrize('options', OPTIONS)
def test_logits_and_gradients_are_those_of_the_formulas(options):
    net, image = network(options | PLAIN), torch.randn(1, 6, 3, 4, dtype=torch.float64)
    logits = net(image)
    plain = torch.stack([torch.stack([plain_logits(net, image, y, x) for x in range(4)]) for y in range(3)])
    assert torch.allclose(logits[0].permute(1, 2, 0), plain, atol=1e-10)
    weights, grads = torch.randn_like(plain), []
    trained = [p for name, p in net.named_parameters() if name.startswith(('novel_emb', 'classifier_n'))]
    for outputs in (logits[0].permute(1, 2, 0), plain):
        grads.append(torch.autograd.grad((outputs * weights).sum(), trained))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads, strict=True))


def test_dropout_leaves_values_of_the_backbone_out_of_the_training_only():
    plain, dropping = network(PLAIN), network(PLAIN | {'dropout': 'backbone'})
    image = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    maps = plain.maps(image)
    assert torch.equal(dropping.eval()(image), plain.eval()(image))
    plain.train(), dropping.train()
    whole, base = plain.classify(plain.finish_maps(maps)), 1 + plain.num_base
    drawn = torch.stack([dropping.classify(dropping.finish_maps(maps)) for _ in range(20)])
    assert torch.allclose(drawn[:, :, :base], whole[:, :base]) and (drawn[:, :, base:].std(dim=0) > 0).all()
    x = torch.ones(1000, plain.extra, dtype=torch.float64)
    for net, expected in ((plain, 0), (dropping, DROPOUT)):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(net.project_backbone(x)['novel'].sum(), x)
        assert (grad == 0).double().mean() == pytest.approx(expected, abs=0.02)


def test_it_starts_as_pop_and_without_its_options_is_pop():
    image = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    for options in (AS_POP, {'background': 'novel', **PLAIN}):
        net = network(options, trained=False)
        pop = POP(Backbone(), decoder(), 3, 2).double()
        state = {key: value for key, value in net.state_dict().items() if key in pop.state_dict()}
        for key in ('novel_emb', 'classifier_n.0.weight'):
            state[key] = state[key][:, :16]
        pop.load_state_dict(state)
        assert torch.allclose(net(image), pop(image), atol=1e-12)
        if options is AS_POP:
            assert set(net.state_dict()) == set(pop.state_dict()) and net.map_shapes((8, 8)) == pop.map_shapes((8, 8))
    base = network({'background': 'base', **PLAIN}, trained=False)(image)
    assert torch.allclose(base[:, 1:], net(image)[:, 1:], atol=1e-12) and not torch.allclose(base, net(image))


def test_base_views_are_needed_only_where_something_looks_at_them():
    options = {'discriminants': 'none', 'calibration': 'none'}
    assert not JointPOP.uses_base_views(options)
    assert all(JointPOP.uses_base_views(options | {name: choice}) for name, choice in
               (('discriminants', 'added'), ('calibration', 'base')))  # fmt: skip


def test_the_backbone_is_standardised_by_all_positions_of_the_supports():
    net = network({})
    masks = torch.full((2, 12, 16), 255)  # whether they are labelled or not
    masks[:, 5, 5] = 4
    images = [torch.randn(2, 6, 3, 4, dtype=torch.float64) + torch.arange(6)[:, None, None] for _ in range(2)]
    for each in images:
        each[:, 5] = 7.0  # a silent channel
    supports = [Labelled(net.maps(each), masks, [(12, 12)] * 2) for each in images]  # the rest is padding
    net.start_from_supports(supports, [labelled(net, images[0], torch.ones(2, 3, 4, dtype=torch.long))])
    seen = [seen_of_backbone(net, each)[:, :, :, :3].transpose(0, 1).flatten(1) for each in images]
    seen = torch.cat(seen, dim=1)
    assert torch.allclose(net.backbone_mean, seen.mean(dim=1))
    std = seen.std(dim=1, unbiased=False)
    assert torch.allclose(net.backbone_std[:5], std[:5]) and len(std) == 12
    assert torch.allclose(net.backbone_std[[5, 11]], LEAST_STD * std.mean()) and not std[[5, 11]].any()


def test_the_backbones_map_is_kept_at_a_stride_of_16():
    net, plain = (network({'background': 'novel', **PLAIN}, output_stride=stride) for stride in (8, 16))
    image = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    maps = net.maps(image)
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == net.map_shapes((40, 56))
    assert maps['backbone'].shape[2:] == (3, 4) and net.finish_maps(maps)['backbone'].shape[2:] == (5, 7)
    assert torch.allclose(maps['backbone'][..., 2, 3], plain.maps(image)['backbone'][..., 4, 6])  # alone in its cell
    flat = image[..., :1, :1].expand_as(image)
    assert torch.allclose(net(flat), plain(flat), atol=1e-10)
    ramp = torch.arange(7.0, dtype=torch.float64).expand(1, 6, 5, 7)  # enlarged, it is where it was
    finished = net.finish_maps(net.maps(ramp))
    z = (seen_of_backbone(net, ramp) - net.backbone_mean[:, None, None]) / net.backbone_std[:, None, None]
    assert torch.allclose(finished['backbone'][..., 1:5], z[..., 1:5])
    s = F.normalize(net.novel_emb, dim=1)[:, 16:]
    assert torch.allclose(finished['novel'][..., 1:5], torch.einsum('kc,bchw->bkhw', s, z)[..., 1:5])


def test_novel_classes_win_as_many_pixels_of_base_images_as_calibration_allows(monkeypatch):
    monkeypatch.setattr(joint_space, 'FALSE_POSITIVE_RATE', 0.5)
    net, images = network({}, num_novel=3), torch.randn(2, 2, 6, 5, 4, dtype=torch.float64)
    net.classifier_n[4].weight.data.abs_().mul_(-0.01)  # novel logits are low
    masks = torch.randint(0, 4, (2, 2, 5, 4))
    masks[0, 0, :2] = 255
    with torch.no_grad():
        raw = [net.train()(image) for image in images]
        net.calibrate(labelled(net, image, mask) for image, mask in zip(images, masks, strict=True))
        raised = [net.eval()(image) for image in images]
        assert all(torch.equal(net.train()(image), logits) for image, logits in zip(images, raw, strict=True))
    seen = (masks.flatten() >= 1) & (masks.flatten() <= 3)
    before, after = (torch.stack(each).transpose(1, 2).transpose(0, 1).flatten(1)[:, seen] for each in (raw, raised))
    assert torch.equal(after[:4], before[:4])
    assert torch.allclose(after[4:] - before[4:], net.novel_offset[:, None].expand(-1, seen.sum()))
    wins = [(after[4 + k] > after[:4].amax(0) + 1e-9).sum().item() for k in range(3)]
    assert wins == [int(0.5 / 6 * seen.sum())] * 3 and all(net.novel_offset > 0) and 40 < seen.sum() < 72


@pytest.mark.parametrize('prototypes', ('joint', 'decoder'))
@pytest.mark.parametrize('output_stride', (8, 16))
def test_evaluation_adds_the_margins_of_discriminants(prototypes, output_stride):
    options = {'prototypes': prototypes, 'discriminants': 'added', 'calibration': 'none'}
    net = network(options, output_stride=output_stride)
    images, masks = torch.randn(3, 4, 6, 6, 8, dtype=torch.float64), torch.randint(0, 6, (3, 4, 6, 8))
    net.start_from_supports([labelled(net, images[0], masks[0])], [labelled(net, images[1], masks[1].clamp(max=3))])
    with torch.no_grad():
        maps = net.maps(images[2])
        plain, added = net.train()(images[2]), net.eval()(images[2])
        # what is fitted is what is evaluated: the same features at the same positions
        features = net.joint_features(maps).permute(0, 2, 3, 1)
        scores = (features @ net.discriminants.weight.T + net.discriminants.bias).permute(0, 3, 1, 2)
        margins = scores[:, 4:] - scores[:, :4].amax(dim=1, keepdim=True)
        every = 16 // output_stride
        found, without = (logits[:, 4:, ::every, ::every] for logits in (added, plain))
        assert torch.allclose(found, without + EVIDENCE * margins, atol=1e-9)
        assert torch.equal(net.coarse_labels(maps, masks[2]), masks[2][:, ::every, ::every])
    assert torch.equal(added[:, :4], plain[:, :4])


@pytest.mark.parametrize('size', ((65, 49), (60, 72), (257, 6)))
def test_labels_are_those_where_upsampling_puts_the_positions(size):
    place, mask = (4, 6), torch.zeros(1, *size, dtype=torch.long)
    centres = []
    for i in range(place[0]):
        for j in range(place[1]):
            maps = torch.zeros(1, 1, *place)
            maps[0, 0, i, j] = 1
            peak = F.interpolate(maps, size, mode='bilinear', align_corners=True).argmax().item()
            centres.append(peak)
    mask.view(-1)[:] = torch.arange(mask.numel())
    assert labels_at(mask, place).flatten().tolist() == centres


def test_without_background_calibration_leaves_it_out(monkeypatch):
    monkeypatch.setattr(joint_space, 'FALSE_POSITIVE_RATE', 0.5)
    net, image = network({}), torch.randn(1, 6, 5, 4, dtype=torch.float64)
    net.classifier_n[4].weight.data.abs_().mul_(-0.01)
    net.background = False
    views = [labelled(net, image, torch.ones(1, 5, 4, dtype=torch.long))]
    net.calibrate(views)
    alone = net.novel_offset.clone()
    views[0].maps['background'] += 100  # which evaluation never predicts
    net.calibrate(views)
    assert torch.equal(net.novel_offset, alone) and all(alone > 0)


def test_views_of_support_images_do_not_calibrate():
    batch = {
        'maps': {}, 'mask': torch.ones(2, 3, 4, dtype=torch.uint8), 'id': ['a', 'b'], 'shape': [(3, 4), (2, 4)],
        'canvas': [(5, 4)] * 2,
    }  # fmt: skip
    views = LabelledFeatures([batch, {'id': []}], torch.device('cpu'), {'b', 'c'})
    for _ in range(2):  # they can be looked at again
        (view,) = views
        assert [mask.unique().tolist() for mask in view.masks] == [[1, 255], [255]] and view.shapes == batch['shape']
        assert view.masks.shape == (2, 5, 4) and batch['mask'].unique().tolist() == [1]


def test_calibration_lowers_no_logit():
    net, image = network({}), torch.randn(1, 6, 3, 4, dtype=torch.float64)
    net.classifier_n[4].weight.data.abs_().mul_(1e3)  # all is novel
    net.calibrate([labelled(net, image, torch.ones(1, 3, 4, dtype=torch.long))])
    assert torch.equal(net.novel_offset, torch.zeros(2, dtype=torch.float64))


def test_calibration_without_a_labelled_pixel_raises_nothing():
    net, image = network({}), torch.randn(1, 6, 3, 4, dtype=torch.float64)
    net.novel_offset.fill_(1)
    net.calibrate([labelled(net, image, torch.full((1, 3, 4), 255))])
    assert torch.equal(net.eval()(image), net.train()(image))
    assert not network({'calibration': 'none'}).calibrates and not network({}, num_novel=0, trained=False).calibrates


@pytest.mark.parametrize('options', OPTIONS[:3])
def test_stage_2_trains_the_head_on_maps_of_the_base_network(tiny, options, tmp_path):
    torch.manual_seed(0)
    plain = build_model(tiny, 3, output_stride=32)  # of POP's stage 1
    save_checkpoint(tmp_path / 'base.pth', plain, {'model': 'pspnet_pop'}, 1, {})
    base = build_model(tiny, 3, output_stride=32, model='pspnet_joint', options=options)
    read_checkpoint(tmp_path / 'base.pth').load_into(base, {'model': base.BASE_MODEL})
    net = build_model(tiny, 3, 2, output_stride=32, model='pspnet_joint', options=options)
    net.start_from(base)
    net.freeze_base()
    frozen, images = fuse(base), torch.randn(4, 3, 65, 65)
    with torch.no_grad():
        maps = frozen.maps(images)
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == frozen.map_shapes((65, 65))
    logits = Head(net.train())({name: value.half() for name, value in maps.items()})  # kept in half precision
    assert logits.dtype == torch.float32
    with torch.no_grad():
        assert (logits - net.eval()(images)).norm() < 1e-2 * logits.norm()
    losses = net.novel_losses(logits, torch.randint(0, 6, (4, 65, 65)))
    padded = F.pad(net.base_emb, (0, net.novel_emb.shape[1] - net.base_emb.shape[1]))
    assert losses['orth'].item() == pytest.approx(10 * orthogonality(net.novel_emb, padded).item())
    sum(losses.values()).backward()
    trained = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert trained == {'novel_emb', *(f'classifier_n.{i}.weight' for i in (0, 2, 4))}
    save_checkpoint(tmp_path / 'novel.pth', net, {'model': 'pspnet_joint', 'options': options}, 1, {})
    saved = read_checkpoint(tmp_path / 'novel.pth')
    assert saved.class_counts == (3, 2)
    again = build_model(tiny, 3, output_stride=32, model='pspnet_joint', options=options)
    saved.load_base_into(again)
    assert torch.equal(again.base_emb, base.base_emb)


def test_unknown_options_are_refused(tiny):
    with pytest.raises(ValueError, match='POP, joint space has no background blue; it has prototypes joint'):
        build_model(tiny, 3, model='pspnet_joint', options={'background': 'blue'})
    with pytest.raises(ValueError, match='POP has no train decoder; it has no options'):
        build_model(tiny, 3, options={'train': 'decoder'})
