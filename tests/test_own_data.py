"""A data set of one's own, from its card to segmented photographs: any values in masks, photographs of any kind."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.lists import read_ids
from tests.conftest import TINY, TINY_TRAINING

NETWORK, SMALL = TINY[2:], (*TINY_TRAINING, '--batch-size', 4, '--num-epoch', 1)
COLORS = {0: (90, 90, 90), 7: (200, 60, 40), 11: (30, 160, 50)}
SUFFIXES = ('.png', '.TIF', '.tiff', '.JPG', '.bmp', '.webp')
CARD = """\
name: street
names: {0: road, 7: car, 11: tree}
background: none
ignore: [254, 255]
novel: [tree]
images: photos
masks: masks
train: train.txt
val: val.txt
min_pixels: 100
palette: {car: [9, 8, 7]}
"""


@pytest.fixture(scope='module')
def street(tmp_path_factory):
    """24 small photographs of six kinds in one folder; every pixel of a mask is of a class or ignored."""
    folder = tmp_path_factory.mktemp('own') / 'street'
    for name in ('photos', 'masks'):
        (folder / name).mkdir(parents=True)
    for i in range(24):
        mask = np.zeros((50, 60), np.uint8)
        cv2.circle(mask, (15 + i, 20), 12, 7, -1)
        cv2.rectangle(mask, (30, 25 + i % 9), (50, 40 + i % 9), 11, -1)
        image = np.array([COLORS[value] for value in mask.flat], np.uint8).reshape(50, 60, 3)
        mask[0], mask[-1] = 254, 255
        Image.fromarray(image).save(folder / f'photos/IMG {i:02}{SUFFIXES[i % 6]}')
        Image.fromarray(mask).save(folder / f'masks/IMG {i:02}.png')
    ids = [f'IMG {i:02}' for i in range(24)]
    (folder / 'train.txt').write_text(''.join(f'{i}\n' for i in ids[:18]))
    # files as another tool names them, from another folder
    lines = [f'./data/all/{i}{SUFFIXES[k % 6]},data/labels/{i}.png\n' for k, i in enumerate(ids)]
    (folder / 'val.txt').write_text(''.join(lines[18:]))
    (folder / 'dataset.yaml').write_text(CARD)
    return folder


@pytest.fixture
def run(run_script):
    def succeed(script, *flags):
        code, output = run_script(script, *flags)
        assert code == 0, output
        return output

    return succeed


def test_from_a_card_to_segmented_photographs(street, run, run_script, tmp_path):
    output = run('utils/check_data.py', '--dataset', street, '--shot', 2)
    assert '18 training and 6 evaluation images: 0 errors, 0 notes' in output
    for row in (
        'names        0 road, 7 car, 11 tree', 'background   none: every pixel', 'ignore       254..255',
        'novel        fold 0: tree', r'min_pixels   100 of a class .* line 10', r'batch_size   8 .* default',
    ):  # fmt: skip
        assert re.search(row, output), output
    data = ('--dataset', street, *NETWORK)
    base = run('train_base.py', *data, *SMALL, '--restore-from', 'none', '--snapshot-dir', tmp_path / 'base')
    assert '18 training and 6 validation images, base classes (0, 7)' in base
    assert read_ids(street / 'fold0/train_base_class0.txt') == read_ids(street / 'train.txt')  # beside the train list
    run('utils/gen_fs_list.py', '--dataset', street / 'dataset.yaml', '--shot', 2)
    run('ft_pop.py', *data, *SMALL, '--shot', 2, '--restore-from', tmp_path / 'base', '--snapshot-dir', tmp_path / '2')
    run('test.py', *data, '--shot', 2, '--restore-from', tmp_path / '2', '--save')
    confusion = np.load(tmp_path / '2/confusion_123.npy')
    assert not confusion[0].any() and not confusion[:, 0].any()  # neither a truth nor a prediction
    pixels = sum(
        np.isin(np.array(Image.open(street / f'masks/IMG {i}.png')), list(COLORS)).sum() for i in range(18, 24)
    )
    assert confusion.sum() == pixels
    results = json.loads((tmp_path / '2/results.json').read_text())
    seed = results['seeds']['123']
    assert results['dataset'] == 'street' and seed['base'] == seed['base_without_background']
    assert seed['total'] == pytest.approx(np.mean([seed['iou'][name] for name in ('road', 'car', 'tree')]))
    assert seed['classes_without_pixels'] == []

    # the checkpoint knows values, names and colours without the card
    moved = street.with_name('elsewhere')
    shutil.copytree(street / 'photos', moved)
    run('utils/predict.py', '--restore-from', tmp_path / '2', '--images', moved, '--save-path', tmp_path / 'out')
    written = [Image.open(path) for path in sorted((tmp_path / 'out').glob('*.png'))]
    assert len(written) == 24 and {value for mask in written for value in np.unique(mask)} <= {0, 7, 11}
    assert written[0].getpalette()[21:24] == [9, 8, 7]
    for i in range(18, 24):
        saved, predicted = (Image.open(tmp_path / f'{folder}/IMG {i}.png') for folder in ('2/predictions_123', 'out'))
        assert np.array_equal(saved, predicted)
    # stage 1 has label 0, of novel pixels, but predicts none of it either
    run('utils/predict.py', '--restore-from', tmp_path / 'base', '--images', moved, '--save-path', tmp_path / 'out1')
    assert {value for path in (tmp_path / 'out1').glob('*.png') for value in np.unique(Image.open(path))} <= {0, 7}

    # a class that is taught gets a value of its own, the data set's classes have theirs
    support = tmp_path / 'support'
    for name, i in (('tree', 1), ('lamp', 2)):
        (support / name).mkdir(parents=True)
        shutil.copy(next(street.glob(f'photos/IMG 0{i}.*')), support / name)
        Image.fromarray(np.eye(50, 60, dtype=np.uint8)).save(support / name / f'IMG 0{i}.png')
    run('utils/teach.py', '--restore-from', tmp_path / 'base', '--support', support, '--out', tmp_path / 'taught',
        '--steps', 2, '--views', 2, '--no-leave-out')  # fmt: skip
    config = torch.load(tmp_path / 'taught/best.pth', weights_only=True)['config']
    assert dict(config['classes']) == {0: 'road', 7: 'car', 12: 'lamp', 11: 'tree'}

    # another data set in the folder that the network was not trained on
    (moved / 'dataset.yaml').write_text(CARD.replace('car', 'van'))
    code, output = run_script('utils/memory.py', '--restore-from', tmp_path / 'base', '--data-dir', moved)
    assert code == 1 and 'Give the --data-dir that it was trained on' in output


def test_without_evaluation_images(street, run, run_script, tmp_path):
    card = tmp_path / 'card.yaml'
    card.write_text(CARD.replace('background: none\n', '').replace('val: val.txt', 'val: none'))
    for name in ('photos', 'masks', 'train.txt'):
        (tmp_path / name).symlink_to(street / name)
    data = ('--dataset', card, *NETWORK)
    output = run('utils/check_data.py', '--dataset', card, '--shot', 2)
    assert '18 training and 0 evaluation images: 0 errors, 0 notes' in output and 'val          none' in output
    output = run('train_base.py', *data, *SMALL, '--restore-from', 'none', '--snapshot-dir', tmp_path / 'base')
    assert f'no validation list, so only the last checkpoint is kept: {tmp_path}/base/last.pth' in output
    run('utils/gen_fs_list.py', '--dataset', card, '--shot', 2)
    few_shot = (*data, '--shot', 2)
    flags = ('ft_pop.py', *few_shot, *SMALL, '--restore-from', tmp_path / 'base', '--snapshot-dir', tmp_path / '1')
    output = run(*flags)
    assert 'no validation list' in output and f'{tmp_path}/1/last_123.pth' in output and 'mIoU' not in output
    assert 'finished earlier' in run(*flags)
    assert not list(tmp_path.glob('*/best*.pth')) and (tmp_path / 'base/memory.pt').is_file()
    code, output = run_script('test.py', *few_shot, '--restore-from', tmp_path / '1')
    assert code == 2 and 'has no images to evaluate (val: none in' in output and 'python -m utils.predict' in output
    run(
        'utils/predict.py',
        '--restore-from',
        tmp_path / '1',
        '--images',
        street / 'photos',
        '--save-path',
        tmp_path / 'o',
    )
    run('test.py', *few_shot, '--restore-from', tmp_path / '1', '--val-list', street / 'val.txt')
