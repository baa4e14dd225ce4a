"""The network against its plain form (`model.reference`), and the shape of the networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from model import BACKBONES, POP, PSP, Head, build_backbone, build_model, reference
from model.kernels import accelerate, fuse
from model.kernels.depthwise import DilatedDepthwiseConv2d
from model.losses import orthogonality, pop_losses, pseudo_label

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def head(num_base, num_novel, dtype, channels=64):
    """A POP network whose input is the backbone's feature, with prototypes that are far from orthogonal."""
    torch.manual_seed(num_base + num_novel)
    net = POP(nn.Identity(), PSP(32, channels), num_base, num_novel).to(dtype)
    for prototypes in net.prototypes():
        nn.init.normal_(prototypes)
    if num_novel:
        nn.init.kaiming_uniform_(net.classifier_n[0].weight)
    return net


def relative_difference(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('num_novel', (0, 5, 20))
@pytest.mark.parametrize('num_base', (15, 60))
def test_logits_losses_and_every_gradient_agree_with_the_reference(num_base, num_novel, dtype):
    net = head(num_base, num_novel, dtype)
    x = torch.randn(2, 32, 9, 7, dtype=dtype)
    mask = torch.randint(0, net.num_logits, (2, 33, 25))
    mask[:, :5] = 255
    plain = copy.deepcopy(net)

    trained, fixed = (net.novel_emb, net.base_emb) if num_novel else (net.base_emb, None)
    logits = net(x)
    losses = pop_losses(logits, mask, trained, fixed)
    plain_features = reference.decode(plain.decoder, x)
    plain_logits = reference.classify(plain, plain_features)
    plain_trained, plain_fixed = (plain.novel_emb, plain.base_emb) if num_novel else (plain.base_emb, None)
    plain_losses = reference.losses(plain_logits, mask, plain_trained, plain_fixed)

    projections = torch.einsum('kc,bchw->bkhw', torch.cat(plain.prototypes()), plain_features)
    assert (projections > 0).any() and (projections < 0).any()
    assert relative_difference(logits, plain_logits) < TOLERANCE[dtype]
    assert losses.keys() == plain_losses.keys()
    for name in losses:
        assert relative_difference(losses[name], plain_losses[name]) < TOLERANCE[dtype], name
    # one backward per term: a wrong gradient of one must not hide behind the other
    for name in losses:
        net.zero_grad()
        plain.zero_grad()
        losses[name].backward(retain_graph=True)
        plain_losses[name].backward(retain_graph=True)
        for (key, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            # float32: entries that cancel to nothing are compared against the size of the network's gradient
            gradient, expected = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
            if dtype == torch.float64 and expected.norm() > 1e-12:
                assert relative_difference(gradient, expected) < TOLERANCE[dtype], (name, key)
            else:
                assert (gradient - expected).norm() <= TOLERANCE[dtype] * max(expected.norm(), 1e-3), (name, key)


@pytest.mark.parametrize('num_novel', (0, 3))
def test_reference_follows_the_equations_class_by_class_and_pair_by_pair(num_novel):
    net = head(4, num_novel, torch.float64)
    q = torch.randn(2, 64, 5, 7, dtype=torch.float64)
    residual, expected = q, []
    phis = (net.classifier, net.classifier_n) if num_novel else (net.classifier,)
    for prototypes, phi in zip(net.prototypes(), phis, strict=True):
        for prototype in prototypes:
            s = (prototype / prototype.norm())[:, None, None]
            q_k = (q * s).sum(1, keepdim=True) * s
            residual = residual - q_k
            expected.append(mlp(phi, q_k))
    expected.insert(0, mlp(phi, residual))
    logits = reference.classify(net, q)
    assert relative_difference(logits, torch.cat(expected, dim=1)) < 1e-12

    mask = torch.randint(0, net.num_logits, (2, 17, 21))
    mask[0, :3] = 255
    trained, fixed = (net.novel_emb, net.base_emb) if num_novel else (net.base_emb, None)
    overlaps = []
    for i, a in enumerate(trained):
        others = [*trained[i + 1 :], *(net.base_emb if num_novel else ())]
        overlaps += [torch.dot(a / a.norm(), b / b.norm()).abs() for b in others]
    full = F.interpolate(logits, (17, 21), mode='bilinear', align_corners=True).log_softmax(dim=1)
    picked = full.gather(1, mask.where(mask != 255, 0)[:, None])[:, 0][mask != 255]
    losses = reference.losses(logits, mask, trained, fixed)
    assert losses['orth'].item() == pytest.approx(10 * sum(overlaps).item() / len(overlaps), rel=1e-12)
    assert losses['ce'].item() == pytest.approx(-picked.mean().item(), rel=1e-12)
    assert torch.equal(reference.pseudo_label(mask, logits, 4), pseudo_label(mask, logits, 4))


def mlp(phi, x):
    """phi written out: [B, C, h, w] to [B, 1, h, w]."""
    for i in (0, 2, 4):
        x = torch.einsum('oc,bchw->bohw', phi[i].weight[:, :, 0, 0], x if i == 0 else x.relu())
    return x


@pytest.mark.parametrize('name', ('resnet18', 'mobilenet_v2'))
def test_networks_with_kernels_agree_with_their_plain_form(name):
    nets = []
    for build in (build_model, reference.Reference):
        torch.manual_seed(0)
        nets.append(build(name, 4, 2, output_stride=8).eval())
    ours, plain = nets
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert len({type(m) for m in ours.modules() if isinstance(m, nn.Conv2d)}) > 1
    assert ours.state_dict().keys() == plain.net.state_dict().keys()
    assert all(torch.equal(value, plain.net.state_dict()[key]) for key, value in ours.state_dict().items())
    images = torch.randn(1, 3, 241, 233)  # features of 31x30: large enough for Winograd's convolutions
    with torch.no_grad():
        assert relative_difference(ours(images), plain(images)) < 1e-4


@pytest.mark.parametrize('size', ((1, 1), (4, 9), (6, 6), (17, 17)))
def test_psp_agrees_with_the_reference_on_any_feature_size(size):
    torch.manual_seed(0)
    decoder = PSP(16, 24).double().eval()
    x = torch.randn(3, 16, *size, dtype=torch.float64)
    assert relative_difference(decoder(x), reference.decode(decoder, x)) < 1e-9


def test_decomposition_adds_up_and_orthonormal_prototypes_leave_no_projection_in_the_residual():
    net = head(15, 5, torch.float64)
    basis = torch.linalg.qr(torch.randn(64, 20, dtype=torch.float64))[0].T
    net.base_emb.data, net.novel_emb.data = 3 * basis[:15], 0.5 * basis[15:]  # lengths must not matter
    along = torch.randn(2, 20, dtype=torch.float64)
    q = torch.einsum('bk,kc->bc', along, basis)[:, :, None, None]  # no residual at all
    logits = net.classify(net.decompose(q))
    assert torch.allclose(logits[:, 0], torch.zeros(1, dtype=torch.float64), atol=1e-12)
    for k in range(20):
        phi = net.classifier if k < 15 else net.classifier_n
        component = (along[:, k, None] * basis[k])[:, :, None, None]
        assert torch.allclose(logits[:, 1 + k], mlp(phi, component)[:, 0], rtol=1e-9)


def test_head_runs_the_decomposition_in_float32_under_autocast():
    net = head(15, 5, torch.float32)
    q = torch.randn(1, 64, 9, 9) * 10
    exact = reference.classify(net, q)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = net.classify(net.decompose(q))
    assert mixed.dtype == torch.float32
    assert relative_difference(mixed[:, 1:], exact[:, 1:]) < 1e-5  # foreground never leaves float32
    assert relative_difference(mixed[:, :1], exact[:, :1]) < 0.05  # the background's MLP is bfloat16


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('output_stride', (8, 16, 32))
def test_backbones_have_their_stride_and_dilate_every_block(name, output_stride):
    backbone = build_backbone(name, output_stride).eval()
    side = {8: 12, 16: 6, 32: 3}[output_stride]
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 96, 96))
    assert features.shape == (1, backbone.out_channels, side, side)
    for layer, dilation in zip(
        backbone.dilatable_layers, {8: (2, 4), 16: (1, 2), 32: (1, 1)}[output_stride], strict=True
    ):
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert convs and all(conv.dilation == (dilation, dilation) for conv in convs)


def test_a_473_crop_gives_60_by_60_features_at_stride_8():
    with torch.no_grad():
        assert build_backbone('resnet18', 8).eval()(torch.randn(1, 3, 473, 473)).shape[-2:] == (60, 60)


@pytest.mark.parametrize('name', ('resnet18', 'resnet50', 'mobilenet_v2'))
def test_undilated_backbones_compute_what_torchvision_computes(name):
    torch.manual_seed(0)
    theirs = getattr(models, name)().eval()
    backbone = build_backbone(name, 32).eval()
    backbone.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in backbone.state_dict()})
    cut = theirs.features[:18] if name == 'mobilenet_v2' else nn.Sequential(*list(theirs.children())[:-2])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(x), cut(x))


def test_deep_stem_has_the_published_keys_and_shapes():
    state = build_backbone('resnet50v2').state_dict()
    assert [list(state[f'conv{i}.weight'].shape) for i in (1, 2, 3)] == [[64, 3, 3, 3], [64, 64, 3, 3], [128, 64, 3, 3]]
    assert list(state['layer1.0.conv1.weight'].shape) == [64, 128, 1, 1]
    assert list(state['layer1.0.downsample.0.weight'].shape) == [256, 128, 1, 1]


def test_stage_2_trains_novel_prototypes_and_their_mlp_only_and_leaves_batch_norm_alone():
    net = build_model('resnet18', 15, 5, 16)
    assert all(
        torch.equal(a, b) for a, b in zip(net.classifier.parameters(), net.classifier_n.parameters(), strict=True)
    )
    net.freeze_base()
    before = copy.deepcopy(net.state_dict())
    net.train()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {'novel_emb', *(f'classifier_n.{i}.weight' for i in (0, 2, 4))}
    pop_losses(net(torch.randn(2, 3, 65, 65)), torch.zeros(2, 65, 65, dtype=torch.long), net.novel_emb, net.base_emb)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize('name', BACKBONES)
def test_fused_networks_have_no_batch_norm_and_the_same_logits(name):
    torch.manual_seed(0)
    net = build_model(name, 3, 2, output_stride=16)
    net.train()
    with torch.no_grad():
        net(torch.randn(4, 3, 65, 65))  # statistics that are not 0 and 1
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = copy.deepcopy(net.state_dict())
    fast = fuse(net)
    net.eval()
    images = torch.randn(1, 3, 65, 49)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert relative_difference(fast(images), net(images)) < 1e-4
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_a_head_on_maps_of_a_fused_copy_trains_the_network_that_it_belongs_to():
    net = head(3, 2, torch.float32)
    net.freeze_base()
    frozen, trained = fuse(net), Head(net)
    before = net.novel_emb.detach().clone()
    x = torch.randn(2, 32, 9, 9)
    assert relative_difference(trained(frozen.maps(x)), net.eval()(x)) < 1e-4
    trained(frozen.maps(x)).square().sum().backward()
    torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(net.novel_emb, before)
    assert relative_difference(trained(frozen.maps(x)), net(x)) < 1e-4


def test_accelerated_networks_can_be_copied_and_converted():
    torch.manual_seed(0)
    net = build_model('resnet18', 3).eval()
    keys = list(net.state_dict())
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(copy.deepcopy(net)(images), expected)
        frozen = fuse(net)
        assert torch.equal(copy.deepcopy(frozen)(images), frozen(images))
        assert net.to(torch.float64)(images.double()).dtype == torch.float64
    accelerate(net)  # changes nothing the second time
    assert list(net.state_dict()) == keys


def test_orthogonality_is_0_for_orthogonal_1_for_equal_and_defined_for_one_prototype():
    assert orthogonality(torch.eye(4, 8)) == 0
    assert orthogonality(torch.ones(4, 8)).item() == pytest.approx(1)
    assert orthogonality(torch.ones(1, 8)) == 0
    assert orthogonality(torch.eye(1, 8), fixed=-torch.eye(1, 8)).item() == pytest.approx(1)


def depthwise_gradients(conv, dtype, size, autocast):
    """Gradients by input and weight of a fixed loss, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weighting = torch.randn(2, 4, 64, *size, generator=generator).to(torch.bfloat16).to(dtype)
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = conv(leaf)
    (y.to(dtype) * weighting).sum().backward()
    return [gradient.double() for gradient in (leaf.grad, conv.weight.grad)]


@pytest.mark.parametrize('autocast', (False, True))
@pytest.mark.parametrize('size', ((17, 17), (33, 33), (5, 1)))
def test_dilated_depthwise_convolutions_have_right_gradients_in_bfloat16(size, autocast):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=4, dilation=4, groups=64, bias=False).bfloat16()
    assert DilatedDepthwiseConv2d.fits(plain)
    ours = DilatedDepthwiseConv2d(copy.deepcopy(plain))
    expected = depthwise_gradients(copy.deepcopy(plain).double(), torch.float64, size, False)
    found = depthwise_gradients(
        ours.float() if autocast else ours, torch.float32 if autocast else torch.bfloat16, size, autocast
    )
    for right, mine in zip(expected, found, strict=True):
        assert relative_difference(mine, right) < 2e-2


def test_cross_entropy_of_a_fully_ignored_mask_is_zero():
    net = head(2, 0, torch.float32)
    losses = pop_losses(torch.randn(1, 3, 4, 4), torch.full((1, 9, 9), 255), net.base_emb)
    assert losses['ce'] == 0


def test_losses_of_micro_batches_add_up_to_those_of_the_batch():
    net = head(4, 0, torch.float64)
    logits = torch.randn(4, 5, 4, 4, dtype=torch.float64)
    mask = torch.randint(0, 5, (4, 9, 9))
    mask[0, :8] = 255
    whole = pop_losses(logits, mask, net.base_emb)
    share = {'pixel_weight': 1 / int((mask != 255).sum()), 'micro_batches': 2}
    micro_batches = [pop_losses(logits[i : i + 2], mask[i : i + 2], net.base_emb, **share) for i in (0, 2)]
    for name, value in whole.items():
        assert sum(losses[name] for losses in micro_batches).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize('first_label', (0, 1))
def test_pseudo_labels_change_background_only_and_only_to_novel_classes(first_label):
    torch.manual_seed(0)
    logits = torch.randn(2, 1 + 3 + 2, 5, 5)
    mask = torch.randint(0, 4, (2, 17, 17))
    mask[0, :3] = 255
    result = pseudo_label(mask, logits, 3, first_label)
    assert torch.equal(result[mask != 0], mask[mask != 0])
    full = F.interpolate(logits, (17, 17), mode='bilinear', align_corners=True)
    for y, x in (mask[1] == 0).nonzero().tolist():
        scores = {label: full[1, label, y, x] for label in (0, 4, 5)[first_label:]}  # without background: of no 0
        assert result[1, y, x] == max(scores, key=scores.get)
    assert {0, 4, 5} & set(result.unique().tolist()) == {0, 4, 5} - set(range(first_label))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    (
        ({'backbone': 'resnet5', 'num_base': 15}, 'resnet5.*choose one of'),
        ({'backbone': 'resnet18', 'num_base': 15, 'output_stride': 4}, 'output stride 4.*8, 16, 32'),
        ({'backbone': 'resnet18', 'num_base': 0}, '0 base'),
    ),
)
def test_unknown_names_fail_loudly(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_model(**arguments)
