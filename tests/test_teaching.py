"""What utils.teach does with kept features: the training, and labels of what masks do not show."""

import numpy as np
import pytest
import torch
from torch import nn

from dataset.own_classes import SupportImage, SupportSamples
from engine import teaching
from engine.features import KeptFeatures
from engine.teaching import TrainingSettings, label_rest, turns
from model import POP


def kept(net, labels, directions):
    """Views of 8x8 features whose right halves show a class: all labels have directions of their own."""
    generator = torch.Generator().manual_seed(0)
    count = len(labels)
    features = 0.1 * torch.randn(count, 16, 8, 8, generator=generator)
    masks = torch.zeros(count, 8, 8, dtype=torch.uint8)
    for i, label in enumerate(labels):
        features[i, :, :, :4] += directions[0][:, None, None]
        features[i, :, :, 4:] += directions[label][:, None, None]
        masks[i, :, 4:] = label
    with torch.no_grad():
        maps = net.decompose(features)
    arrays = {name: array.permute(0, 2, 3, 1).half().contiguous() for name, array in maps.items()} | {'mask': masks}
    rows = {i: {'id': str(i), 'shape': (8, 8), 'canvas': (8, 8)} for i in range(count)}
    return KeptFeatures(arrays, rows, range(count), torch.device('cpu'))


def test_learns_a_direction_and_leaves_the_base_as_it_is():
    torch.manual_seed(0)
    decoder = nn.Identity()
    decoder.out_channels = 16
    net = POP(nn.Identity(), decoder, num_base=2, num_novel=1)
    directions = dict(enumerate(nn.init.orthogonal_(torch.empty(4, 16))))
    with torch.no_grad():
        net.base_emb.copy_(torch.stack([directions[1], directions[2]]))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    support, base = kept(net, [3] * 4, directions), kept(net, [1, 1, 2, 2], directions)
    teaching.learn(net, support, base, TrainingSettings(steps=150, batch_size=2, learning_rate=0.03), torch.float32, '')
    after = net.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {'novel_emb', *(name for name in after if name.startswith('classifier_n.'))}
    with torch.no_grad():
        logits = net.classify(kept(net, [3, 3], directions).take(slice(0, 2)))
    assert (logits.argmax(dim=1)[:, :, 4:] == 3).float().mean() > 0.95
    assert (logits.argmax(dim=1)[:, :, :4] == 3).float().mean() < 0.05


def test_a_photograph_is_left_out_with_all_classes_that_it_shows_and_each_class_keeps_one():
    rng = np.random.default_rng(0)
    photographs = {name: rng.integers(0, 255, (4, 5, 3), np.uint8) for name in 'ABCDEFGHI'}

    def left_out(**shown):
        support = {name: [SupportImage(each, photographs[each], np.ones((4, 5), np.uint8)) for each in names]
                   for name, names in shown.items()}  # fmt: skip
        samples = SupportSamples(support, {name: label for label, name in enumerate(support, 1)})
        parts = turns(samples)
        for ids in parts:
            for name, names in shown.items():
                assert len(names) == 1 or {f'{name}/{each}' for each in names} - ids
            # what a training leaves out, it sees in no class
            out = {image_id[-1] for image_id in ids}
            assert ids == {image_id for image_id in samples.ids if image_id[-1] in out}
        return parts

    assert left_out(a='AB', b='CDE') == [{'a/A', 'b/C'}, {'a/B', 'b/D'}, {'b/E'}]
    assert left_out(a='ABC', b='BC') == [{'a/A'}, {'a/B', 'b/B'}, {'a/C', 'b/C'}]
    assert left_out(a='A', b='AB') == [{'b/B'}]  # nothing would be left of a without A
    assert left_out(a='A') == []
    many = left_out(a='ABCDEFGHI', b='HI')
    assert len(many) == 5
    assert set().union(*many) == {*(f'a/{each}' for each in 'ABCDEFGHI'), 'b/H', 'b/I'}


@pytest.mark.parametrize('background', (True, False))
def test_what_a_mask_does_not_show_is_what_the_base_network_says(background):
    torch.manual_seed(1)
    decoder = nn.Identity()
    decoder.out_channels = 16
    base = POP(nn.Identity(), decoder, num_base=2)
    base.background = background
    views = kept(base, [0, 3], {0: torch.zeros(16), 3: torch.ones(16)})  # the background is noise
    views.masks[0, 0] = 255
    before = views.masks.clone()
    with torch.no_grad():
        said = base.classify(views.take(slice(0, 2)))[:, base.first_label :].argmax(dim=1) + base.first_label
    label_rest(views, base)
    assert torch.equal(views.masks.long(), torch.where(before == 0, said, before.long()))
    assert len(said[before == 0].unique()) > 1
