"""Support images that were chosen by hand, supports that label novel classes only, and base images that repeat."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAINING

from core.errors import InputError
from dataset import DATASETS, Augmentation, FoldData, SegmentationDataset
from dataset.fewshot import draw_base
from dataset.support_list import read_supports
from engine.supports import Supports
from model import build_model

CLASSES = {1: 'lamp', 2: 'lamp post', 7: '1'}


def test_lines_name_a_class_and_an_image(tmp_path):
    path = tmp_path / 'supports.txt'
    path.write_text('# mine\nlamp post,a b\nlamp  a b.JPG\n\n1\tIMG_1\n2 c\nlamp post, d\n  lamp x,y  \n')
    assert read_supports(path, CLASSES) == {1: ['a b', 'x,y'], 2: ['a b', 'c', 'd'], 7: ['IMG_1']}


@pytest.mark.parametrize('encoding', ('utf-8-sig', 'utf-16'))
def test_lists_of_other_systems_are_read(tmp_path, encoding):
    """Of Windows, with a mark and other ends of lines; and names as macOS writes them, in another Unicode form."""
    path = tmp_path / 'supports.csv'
    path.write_bytes('Stühle,Café 1\r\nlamp,b\r\n'.encode(encoding))
    assert read_supports(path, {1: 'lamp', 2: 'Stu\u0308hle'}) == {1: ['b'], 2: ['Café 1']}
    path.write_text('Stu\u0308hle,Cafe\u0301 1\nlamp,b')
    assert read_supports(path, {1: 'lamp', 2: 'Stühle'}) == {1: ['b'], 2: ['Café 1']}


@pytest.mark.parametrize(('text', 'message'), (
    ('lamp b/a', "line 1: 'lamp b/a'; expected a class.* without its folder"),
    ('lanp,a', 'did you mean the class lamp[?] Expected'),
    ('lamp a\nbin b', r"line 2: 'bin b'; expected a class.*lamp \(1\), lamp post \(2\)"),
    ('lamp', "line 1: 'lamp'; expected a class"),
    ('lamppost a', "line 1: 'lamppost a'"),
    ('lamp a\n2 a\nlamp  a', 'line 3: lamp has the image a already'),
    ('lamp a\n1 b', 'has no image of lamp post'),
    (None, 'cannot be read: No such file'),
))  # fmt: skip
def test_what_is_wrong_in_a_list_is_named(tmp_path, text, message):
    path = tmp_path / 'supports.txt'
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_supports(path, CLASSES)


@pytest.fixture
def data(shapes, few_shot_run):
    spec = DATASETS['shapes']
    return FoldData(spec, shapes, 0, *(spec.list_path(split, shapes) for split in ('train', 'val')))


def test_supports_can_label_novel_classes_only(data):
    augmentation = Augmentation((65, 65), (1.0, 1.0))
    whole, only = (replace(data, novel_only=flag).few_shot_training(augmentation, 2, 123) for flag in (False, True))
    assert only.support.fingerprint() != whole.support.fingerprint()
    for index in range(len(whole.support)):
        mask, labelled = (part.support.view(index, np.random.default_rng(0))['mask'] for part in (whole, only))
        assert torch.equal(labelled, torch.where(mask > len(data.base_ids), mask, 255)) and (labelled < 255).any()
    assert torch.equal(only.base.view(0, np.random.default_rng(0))['mask'],
                       whole.base.view(0, np.random.default_rng(0))['mask'])  # fmt: skip


def test_base_images_repeat_in_whole_rounds_where_that_is_asked_for():
    lists = {1: ['a', 'b', 'c', 's'], 2: ['d', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l']}
    with pytest.raises(InputError, match='--repeat-base-images'):
        draw_base(lists, 8, {'s'}, 0, 0)
    drawn = Counter(draw_base(lists, 8, {'s'}, 0, 0, repeats=True))
    assert sorted(drawn[name] for name in 'abc') == [2, 3, 3]
    assert sorted(drawn[name] for name in lists[2]) == [0] + [1] * 8
    assert draw_base(lists, 3, {'s'}, 5, 1, repeats=True) == draw_base(lists, 3, {'s'}, 5, 1)
    with pytest.raises(InputError, match='base class 1'):
        draw_base({1: ['s']}, 2, {'s'}, 0, 0, repeats=True)


def test_only_what_draws_base_images_needs_enough_of_them(run_script, shapes, base_run, tmp_path):
    shot = 15  # more than images of some base classes
    assert run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', shapes, '--shot', shot)[0] == 0
    flags = ('ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--num-epoch', 1,
             '--shot', shot, '--base-views', 3)  # fmt: skip
    code, output = run_script(*flags, '--snapshot-dir', tmp_path / 'pop')
    assert code == 1 and f'needs {shot} of its images' in output and '--views' in output, output
    large = ('--batch-size', 75)
    for name, *more in (('repeated', '--repeat-base-images', *large), ('kept', '--views', 1, *large),
                        ('lda', '--model', 'pspnet_lda')):  # fmt: skip
        code, output = run_script(*flags, '--snapshot-dir', tmp_path / name, *more)
        assert code == 0 and (f'repeat: there are fewer than {shot}' in output) is (name == 'repeated'), output


def test_stage_2_learns_from_chosen_supports(run_script, data, shapes, base_run, tmp_path):
    drawn = data.supports(2, 123)
    names = [data.spec.classes[c] for c in data.novel_ids]
    chosen = {c: ids[: 1 + i % 2] for i, (c, ids) in enumerate(drawn.items())}  # one or two of each class
    path, run = tmp_path / 'mine.csv', tmp_path / 'run'
    path.write_text(''.join(f'{names[i]},{image}\n' for i, ids in enumerate(chosen.values()) for image in ids))
    flags = (
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir', run,
        '--num-epoch', 1, '--batch-size', 5, '--shot', 12, '--support-list', path, '--support-labels', 'novel-only',
        '--views', 2, '--base-views', 2, '--features', 'memory',
    )  # fmt: skip
    code, output = run_script(*flags)
    assert code == 0, output
    assert f'support view features: {2 * sum(map(len, chosen.values()))} images' in output
    config = torch.load(run / 'last_123.pth', weights_only=True)['config']
    assert config['supports'] == [list(pair) for pair in chosen.items()]

    code, output = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', run, '--shot', 12, '--plots')
    assert code == 0 and (run / 'plots/support_123.png').is_file(), output
    assert json.loads((run / 'results.json').read_text())['shot'] is None and 'chosen by hand' in output

    path.rename(tmp_path / 'moved.csv')
    flags = [tmp_path / 'moved.csv' if flag == path else flag for flag in flags]
    code, output = run_script(*flags)
    assert code == 0 and 'finished' in output, output  # the same list, somewhere else
    fewer = '\n'.join(f'{names[i]},{ids[0]}' for i, ids in enumerate(chosen.values()))
    (tmp_path / 'moved.csv').write_text(fewer)
    code, output = run_script(*flags)
    assert code == 1 and 'content of support list was' in output, output
    code, output = run_script(*flags, '--random-seed', '1,2')
    assert code == 2 and 'give one --random-seed' in output


def test_objects_that_vanish_when_images_are_shrunk_are_an_error(data):
    """A mean of no pixel would be no number, or would win everywhere."""
    supports, samples = data.supports(1, 123), data.samples('train', novel_as_background=False)
    names = [data.spec.classes[c] for c in data.novel_ids]
    ids = [image_id for found in supports.values() for image_id in found]
    frozen = build_model('resnet18', len(data.base_ids), 0, 32).eval()

    def pass_over(ids):
        images = SegmentationDataset(ids, samples, fit_size=(65, 65), resize_mask=True)
        return list(Supports(images, dict.fromkeys(names, 1), frozen, torch.device('cpu'), torch.float32))

    whole = pass_over(ids)
    assert [(len(each.masks), (each.masks == label).any().item()) for label, each in enumerate(whole, 16)] == [
        (1, True)
    ] * len(names)
    other = next(i for i in data.ids('train') if (samples.read(i)[1] != 17).all())  # does not show the second class
    with pytest.raises(InputError, match=f'no support image shows {names[1]} when it is shrunk to 65x65 .{other}'):
        pass_over([ids[0], other, *ids[2:]])


def test_check_data_reads_nested_draws_and_lists_of_supports(run_script, data, shapes, tmp_path):
    flags = ('--dataset', 'shapes', '--data-dir', shapes, '--shot', 2)
    assert run_script('utils/gen_fs_list.py', *flags, '--nested')[0] == 0
    path, ids = data.lists.support(2, 123, nested=True), data.ids('train')
    supports = [f'{c} {i}' for c, ids in replace(data, nested=True).supports(2, 123).items() for i in ids]
    try:
        code, output = run_script('utils/check_data.py', *flags, '--fold', 0, '--workers', 1)
        assert code == 0 and 'Traceback' not in output, output
        path.write_text('\n'.join(ids[:10]))
        code, output = run_script('utils/check_data.py', *flags, '--fold', 0, '--workers', 1)
        assert code == 1 and f'error  {path.name}' in output and 'does not show novel class' in output, output
    finally:
        path.unlink()
    own = tmp_path / 'own.txt'
    for lines, expected in ((supports, 0), ([*supports[1:], f'1 {ids[1]}'], 1)):
        own.write_text('\n'.join(lines))
        code, output = run_script('utils/check_data.py', *flags, '--fold', 0, '--workers', 1, '--support-list', own)
        assert code == expected and ('does not show novel class 1' in output) is bool(expected), output
    assert run_script('utils/check_data.py', *flags, '--support-list', own)[0] == 2  # of all folds
