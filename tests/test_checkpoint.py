"""Published checkpoints load unchanged; wrong ones fail with a message that names the keys."""

import re

import pytest
import torch
from conftest import ROOT
from torchvision import models

from core.errors import InputError
from engine.checkpoint import read_checkpoint, resolve_checkpoint, save_checkpoint
from model import build_model


def published(net, path, prefix=''):
    """Write a network's weights as the published code does: a flat state dict in torch's older file format."""
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def perturbed(*arguments):
    """A network whose every value differs from a fresh one's."""
    torch.manual_seed(1)
    net = build_model(*arguments)
    for value in net.state_dict().values():
        value.add_(1)
    return net


def equal_states(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize('prefix', ('', 'module.'))
@pytest.mark.parametrize('num_novel', (0, 5))
@pytest.mark.parametrize('backbone', ('resnet50v2', 'resnet50', 'resnet18', 'mobilenet_v2'))
def test_published_files_load_unchanged(tmp_path, backbone, num_novel, prefix):
    theirs = perturbed(backbone, 15, num_novel)
    published(theirs, tmp_path / 'their.pth', prefix)
    ours = build_model(backbone, 15, num_novel)
    assert read_checkpoint(tmp_path / 'their.pth').load_into(ours) == []
    assert equal_states(ours, theirs)


def test_the_published_keys_are_the_documented_ones():
    keys = build_model('resnet50v2', 15, 5).state_dict().keys()
    outside = {key for key in keys if not key.startswith('backbone.')}
    batch_norm = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    expected = {f'decoder.stages.{s}.1.weight' for s in range(4)}
    expected |= {f'decoder.stages.{s}.2.{name}' for s in range(4) for name in batch_norm}
    expected |= {f'decoder.bottleneck.1.{name}' for name in batch_norm}
    expected |= {'decoder.bottleneck.0.weight', 'decoder.bottleneck.3.weight', 'decoder.bottleneck.3.bias'}
    expected |= {f'classifier{n}.{i}.weight' for n in ('', '_n') for i in (0, 2, 4)} | {'base_emb', 'novel_emb'}
    assert outside == expected
    stems = {key.split('.')[1] for key in keys if key.startswith('backbone.')}
    assert stems == {'conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3', 'layer1', 'layer2', 'layer3', 'layer4'}


def test_a_stage_1_file_starts_stage_2_with_phi_n_from_phi(tmp_path):
    theirs = perturbed('resnet18', 15, 0)
    published(theirs, tmp_path / 'base.pth')
    net = build_model('resnet18', 15, 5)
    novel = net.novel_emb.clone()
    kept = read_checkpoint(tmp_path / 'base.pth').load_into(net)
    assert sorted(kept) == [f'classifier_n.{i}.weight' for i in (0, 2, 4)] + ['novel_emb']
    assert torch.equal(net.novel_emb, novel)
    assert torch.equal(net.classifier_n[2].weight, theirs.classifier[2].weight)
    assert torch.equal(net.base_emb, theirs.base_emb)


WRONG = {
    'another backbone': (('resnet50', 15, 0), r'missing: backbone\.\S+.*unexpected: backbone\.\S+|of another shape'),
    'another class count': (('resnet18', 60, 0), r'base_emb \[60, 512\], expected \[15, 512\]'),
    'stage 2 where stage 1 is expected': (('resnet18', 15, 5), r'unexpected: .*(novel_emb|classifier_n)'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_files_for_another_network_fail_by_key(tmp_path, kind):
    arguments, words = WRONG[kind]
    published(build_model(*arguments), tmp_path / 'wrong.pth')
    net = build_model('resnet18', 15, 0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InputError, match=words):
        read_checkpoint(tmp_path / 'wrong.pth').load_into(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize('num_novel', (0, 5))
@pytest.mark.parametrize('key', ('base_emb', 'decoder.bottleneck.0.weight', 'backbone.layer4.1.bn2.running_var'))
def test_missing_and_strange_keys_are_named(tmp_path, key, num_novel):
    net = build_model('resnet18', 15, num_novel)
    state = net.state_dict()
    strange = {**{k: v for k, v in state.items() if k != key}, 'aux.weight': torch.zeros(1)}
    torch.save(strange, tmp_path / 'strange.pth')
    with pytest.raises(InputError) as error:
        read_checkpoint(tmp_path / 'strange.pth').load_into(net)
    assert f'missing: {key}' in str(error.value) and 'unexpected: aux.weight' in str(error.value)


def test_half_of_the_parts_that_stage_2_adds_is_a_damaged_file(tmp_path):
    net = build_model('resnet18', 15, 5)
    torch.save({k: v for k, v in net.state_dict().items() if k != 'novel_emb'}, tmp_path / 'half.pth')
    with pytest.raises(InputError, match='missing: novel_emb'):
        read_checkpoint(tmp_path / 'half.pth').load_into(net)


@pytest.mark.parametrize('damage', ('truncated', 'zeros', 'text', 'empty'))
@pytest.mark.parametrize('zipped', (True, False))
def test_damaged_files_are_recognised(tmp_path, damage, zipped):
    path = tmp_path / 'file.pth'
    torch.save(build_model('mobilenet_v2', 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    size = len(content)
    path.write_bytes({
        'truncated': content[: size // 2], 'zeros': bytes(size), 'text': b'hello\n' * 100, 'empty': b''
    }[damage])  # fmt: skip
    with pytest.raises(InputError, match=r'file\.pth'):
        read_checkpoint(path).load_into(build_model('mobilenet_v2', 2))


def test_loading_never_runs_code_from_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / 'sprung'), 'w'))

    torch.save({'base_emb': Trap()}, tmp_path / 'trap.pth')
    with pytest.raises(InputError, match=r'holds Python objects \(_?io\.open\)'):
        read_checkpoint(tmp_path / 'trap.pth')
    with pytest.raises(InputError, match='holds no state dict'):
        read_checkpoint(tmp_path / 'trap.pth', placeholders=True)
    assert not (tmp_path / 'sprung').exists()


def test_our_checkpoints_say_what_they_are_for(tmp_path):
    net = build_model('resnet18', 15)
    save_checkpoint(tmp_path / 'c.pth', net, {'fold': 0, 'dataset': 'voc'}, 3, {'base': 50.0})
    assert read_checkpoint(tmp_path / 'c.pth').load_into(build_model('resnet18', 15), {'fold': 0, 'shot': 5}) == []
    with pytest.raises(InputError, match='fold is 0, expected 1'):
        read_checkpoint(tmp_path / 'c.pth').load_into(build_model('resnet18', 15), {'fold': 1})


def test_options_are_compared_one_by_one_and_unfinished_runs_are_known(tmp_path):
    net = build_model('resnet18', 3, 2, 32, 'pspnet_joint', {'prototypes': 'last'})
    older = {'model': 'pspnet_joint', 'options': {'prototypes': 'last'}}  # from before there were other options
    for finished in (False, True):
        training = {'progress': {'finished': finished}}
        save_checkpoint(tmp_path / 'last.pth', net, older, 1, {}, training)
        checkpoint = read_checkpoint(tmp_path / 'last.pth')
        assert checkpoint.unfinished is not finished
        assert ('after epoch 1, before its run had finished' in checkpoint.unfinished_note) is not finished
    checkpoint.load_into(net, {'model': 'pspnet_joint', 'options': net.options})
    with pytest.raises(InputError, match=r'background is base, expected novel.*[(]--background base[)]'):
        checkpoint.load_into(net, {'model': 'pspnet_joint', 'options': net.options | {'background': 'novel'}})


@pytest.mark.parametrize('backbone', ('resnet18', 'resnet50', 'mobilenet_v2'))
@pytest.mark.parametrize('prefix', ('', 'module.'))
def test_backbone_files_with_their_classifier_load(tmp_path, backbone, prefix):
    theirs = getattr(models, backbone)()
    published(theirs, tmp_path / 'imagenet.pth', prefix)
    net = build_model(backbone, 2)
    read_checkpoint(tmp_path / 'imagenet.pth').load_backbone_into(net)
    loaded = net.backbone.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in theirs.state_dict().items() if key in loaded)


def test_deep_stem_files_of_old_pytorch_load(tmp_path):
    """resnet50_v2.pth as PSPNet's users have it: `fc.*` at the end, no step counters."""
    theirs = build_model('resnet50v2', 2).backbone
    state = {k: v + 1 for k, v in theirs.state_dict().items() if 'num_batches' not in k}
    torch.save({**state, 'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)}, tmp_path / 'v2.pth')
    net = build_model('resnet50v2', 2)
    read_checkpoint(tmp_path / 'v2.pth').load_backbone_into(net)
    assert torch.equal(net.backbone.conv3.weight, state['conv3.weight'])
    with pytest.raises(InputError, match=r'holds resnet50v2: give --backbone resnet50v2'):
        read_checkpoint(tmp_path / 'v2.pth').load_backbone_into(build_model('resnet50', 2))


def test_the_real_imagenet_weights_load():
    path = ROOT.parent / 'shared' / 'weights' / 'mobilenet_v2-imagenet.pth'
    if not path.is_file():
        pytest.skip(f'{path} is not there: weights are not part of the project')
    read_checkpoint(path).load_backbone_into(build_model('mobilenet_v2', 15))


def test_resolving_a_restore_from(tmp_path):
    for name in ('best.pth', 'best_123.pth', 'last_123.pth', 'last_234.pth'):
        (tmp_path / name).touch()
    assert resolve_checkpoint(tmp_path).name == 'best.pth'
    assert resolve_checkpoint(tmp_path, seed=123).name == 'best_123.pth'
    assert resolve_checkpoint(tmp_path / 'best.pth', seed=123).name == 'best_123.pth'
    assert resolve_checkpoint(tmp_path, 'last', 234).name == 'last_234.pth'
    assert resolve_checkpoint(tmp_path / 'last_234.pth', seed=234).name == 'last_234.pth'
    for name in ('z[1].safetensors', 'z[1]_123.safetensors'):
        (tmp_path / name).touch()
    assert resolve_checkpoint(tmp_path / 'z[1].safetensors', seed=123).name == 'z[1]_123.safetensors'
    with pytest.raises(InputError, match=r'no .*z\[1\]_234\.safetensors'):  # another seed's file does not stand in
        resolve_checkpoint(tmp_path / 'z[1].safetensors', seed=234)
    with pytest.raises(InputError, match=r'no .*first_234\.pth and no .*first\.pth; .* holds best\.pth, best_123\.pth'):
        resolve_checkpoint(tmp_path / 'first.pth', seed=234)


def test_the_snippet_of_the_documentation_runs(tmp_path, monkeypatch):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'checkpoints.md').read_text(), re.DOTALL)
    (code,) = (block for block in blocks if 'import' in block)
    torch.save(build_model('resnet50v2', 15, 5).state_dict(), tmp_path / 'best_123.pth')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace('473', '65'), names)
    assert names['logits'].shape == (1, 21, 9, 9)
