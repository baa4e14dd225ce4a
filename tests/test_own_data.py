"""A data set of one's own, from its card to segmented photographs: any values in masks, photographs of any kind."""

import argparse
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import InputError
from dataset.lists import read_ids
from tests.conftest import TINY, TINY_TRAINING
from utils.from_flags import described_data

NETWORK, SMALL = TINY[2:], (*TINY_TRAINING, '--num-epoch', 1)
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
    (folder / 'unlabelled.yaml').write_text(CARD.replace('val: val.txt', 'val: none'))
    return folder


@pytest.fixture
def run(run_script):
    def succeed(script, *flags):
        code, output = run_script(script, *flags)
        assert code == 0, output
        return output

    return succeed


def test_from_a_card_to_segmented_photographs(street, run, run_script, tmp_path):
    data, unlabelled = (('--dataset', street / name, *NETWORK) for name in ('dataset.yaml', 'unlabelled.yaml'))
    output = run('utils/check_data.py', '--dataset', street, '--shot', 2)
    assert '18 training and 6 evaluation images: 0 errors, 0 notes' in output
    for row in (
        'names +0 road, 7 car, 11 tree', 'background +none: every pixel', r'ignore +254\.\.255', 'novel +fold 0: tree',
        r'min_pixels +100 of a class .* line 10', r'batch_size +8 .* default', 'lists_in_data +.* the card .* default',
    ):  # fmt: skip
        assert re.search(row, output), output
    (street / 'tested.yaml').write_text(CARD.replace('val: val.txt', 'val: none\ntest: train.txt'))
    output = run_script('utils/check_data.py', '--dataset', street / 'tested.yaml', '--shot', 2)[1]
    assert re.search('val +none', output) and '18 ids are in both lists' in output and 'error  test' not in output

    base, few = tmp_path / 'base', tmp_path / '2shot'
    output = run(
        'train_base.py', *unlabelled, *SMALL, '--batch-size', 6, '--restore-from', 'none', '--snapshot-dir', base
    )
    assert 'of 18 training images show a base class; 0 validation images; 2 base classes: ' in output
    assert f'no validation list, so only the last checkpoint is kept: {base}/last.pth' in output
    assert (base / 'memory.pt').is_file() and not list(base.glob('best*'))
    assert read_ids(street / 'fold0/train_base_class0.txt') == read_ids(street / 'train.txt')  # beside the train list

    run('utils/gen_fs_list.py', '--dataset', street, '--shot', 2)
    run('ft_pop.py', *data, *SMALL, '--shot', 2, '--restore-from', base, '--snapshot-dir', few)
    run('test.py', *data, '--shot', 2, '--restore-from', few, '--save')
    check_results(street, few)
    check_predictions(street, run, few, tmp_path)

    # another data set than that of the network, and other folds
    (tmp_path / 'dataset.yaml').write_text(CARD.replace('car', 'van'))
    code, output = run_script('utils/memory.py', '--restore-from', base, '--data-dir', tmp_path)
    assert code == 1 and 'Give the --data-dir that it was trained on' in output
    config = {'dataset': 'street', 'fold': 1, 'classes': []}
    with pytest.raises(InputError, match='was trained on fold 1 of'):
        described_data(argparse.Namespace(data_dir=street), config)
    check_teaching(street, run, base, tmp_path)

    # stage 2 without evaluation images
    output = run(
        'ft_pop.py', *unlabelled, *SMALL, '--shot', 2, '--restore-from', base, '--snapshot-dir', tmp_path / 'u'
    )
    assert f'no validation list, so only the last checkpoint is kept: {tmp_path}/u/last_123.pth' in output
    assert 'mIoU' not in output and not list(tmp_path.glob('u/best*'))
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ('u/last_123.pth', '2shot/last_123.pth'))
    assert all(torch.equal(one['model'][name], value) for name, value in other['model'].items())
    code, output = run_script('test.py', *unlabelled, '--shot', 2, '--restore-from', tmp_path / 'u')
    assert code == 2 and 'has no images to evaluate (val: none in' in output and 'python -m utils.predict' in output


def check_results(street, folder):
    """Only pixels of classes are counted, and the background is in no mean."""
    confusion = np.load(folder / 'confusion_123.npy')
    assert not confusion[0].any() and not confusion[:, 0].any()  # neither a truth nor a prediction
    masks = [np.array(Image.open(street / f'masks/IMG {i}.png')) for i in range(18, 24)]
    assert confusion.sum() == sum(np.isin(mask, list(COLORS)).sum() for mask in masks)
    results = json.loads((folder / 'results.json').read_text())
    seed = results['seeds']['123']
    assert results['dataset'] == 'street' and seed['base'] == seed['base_without_background']
    assert seed['total'] == pytest.approx(np.mean([seed['iou'][name] for name in ('road', 'car', 'tree')]))
    assert seed['classes_without_pixels'] == []


def check_predictions(street, run, few, folder):
    """The checkpoint knows values and colours without the card, and predicts what test.py has evaluated."""
    shutil.copytree(street / 'photos', folder / 'photos')
    run('utils/predict.py', '--restore-from', few, '--images', folder / 'photos', '--save-path', folder / 'out')
    written = [Image.open(path) for path in sorted((folder / 'out').glob('*.png'))]
    assert len(written) == 24 and {value for mask in written for value in np.unique(mask)} <= {0, 7, 11}
    assert written[0].getpalette()[21:24] == [9, 8, 7]
    for i in range(18, 24):
        saved, predicted = (Image.open(path / f'IMG {i}.png') for path in (few / 'predictions_123', folder / 'out'))
        assert np.array_equal(saved, predicted)


def check_teaching(street, run, base, folder):
    """A class that is taught gets a value of its own, the data set's classes have theirs."""
    for name, i in (('tree', 1), ('lamp', 2)):
        (folder / 'support' / name).mkdir(parents=True)
        shutil.copy(next(street.glob(f'photos/IMG 0{i}.*')), folder / 'support' / name)
        Image.fromarray(np.eye(50, 60, dtype=np.uint8)).save(folder / f'support/{name}/IMG 0{i}.png')
    run('utils/teach.py', '--restore-from', base, '--support', folder / 'support', '--out', folder / 'taught',
        '--steps', 2, '--views', 2, '--no-leave-out')  # fmt: skip
    config = torch.load(folder / 'taught/best.pth', weights_only=True)['config']
    assert dict(config['classes']) == {0: 'road', 7: 'car', 12: 'lamp', 11: 'tree'}
