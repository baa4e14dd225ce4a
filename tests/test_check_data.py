"""check_data finds what is wrong with a data set and its lists."""

import dataclasses
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import DATASETS
from dataset.formats import ORIENTATION_TAG


@pytest.fixture
def checked(shapes, tmp_path, run_script):
    folder = tmp_path / 'data'
    shutil.copytree(shapes, folder)

    def check(*flags):
        return run_script('utils/check_data.py', '--dataset', 'shapes', '--data-dir', folder, *flags)

    return folder, check


def test_good_data_passes(checked):
    _, check = checked
    code, output = check('--shot', 1)
    assert code == 0 and '0 errors' in output, output


def test_everything_wrong_is_found_in_one_pass(checked):
    folder, check = checked
    masks, images, lists = folder / 'SegmentationClassAug', folder / 'JPEGImages', folder / 'list'
    (images / 'train_0001.jpg').unlink()
    (images / 'train_0002.jpg').write_bytes(b'x')
    (masks / 'train_0003.png').unlink()
    (masks / 'train_0004.png').write_bytes(b'x')
    cv2.imwrite(str(masks / 'train_0005.png'), np.zeros((5, 5), np.uint8))
    shape = cv2.imread(str(images / 'train_0006.jpg')).shape
    cv2.imwrite(str(masks / 'train_0006.png'), np.full(shape[:2], 77, np.uint8))
    cv2.imwrite(str(masks / 'train_0007.png'), np.zeros(cv2.imread(str(images / 'train_0007.jpg')).shape, np.uint8))
    cv2.imwrite(str(masks / 'train_0008.png'), np.zeros(cv2.imread(str(images / 'train_0008.jpg')).shape[:2], np.uint8))
    with open(lists / 'val.txt', 'a') as file:
        file.write('train_0009\n')
    code, output = check('--shot', 1, 50)
    assert code == 1
    rows = {line.split()[2]: line for line in output.splitlines() if line.startswith('error  train')}
    for number, words in enumerate(
        ('does not exist', 'cannot be decoded', 'does not exist', 'cannot be decoded', 'is 5x5', '77', 'colour-coded'),
        1,
    ):
        assert words in rows[f'train_000{number}'], output
    assert len(rows) == 7
    assert '1 show background only: train_0008' in output
    assert '1 ids are in both lists' in output and 'train_0009' in output
    assert 'classes have fewer than 50 images' in output


def test_rotated_photographs_are_reported(checked):
    folder, check = checked
    shutil.rmtree(folder / 'list/fold0', ignore_errors=True)  # made from other masks
    for image_id, orientation in (('train_0001', 3), ('train_0002', 6)):  # rotated by 180 and by 90 degrees
        path = folder / f'JPEGImages/{image_id}.jpg'
        with Image.open(path) as picture:
            exif = picture.getexif()
            exif[ORIENTATION_TAG] = orientation
            stored = picture.resize((60, 40))
            stored.save(path, exif=exif)
        mask = np.ones((40, 60), np.uint8)
        cv2.imwrite(str(folder / f'SegmentationClassAug/{image_id}.png'), mask)
    code, output = check('--shot', 1)
    assert code == 1 and 'is 60x40, its image' in output, output
    assert 'rotated by 90 degrees (EXIF orientation)' in output, output
    assert '1 have an EXIF orientation, so their masks must match them as displayed: train_0001' in output
    cv2.imwrite(str(folder / 'SegmentationClassAug/train_0002.png'), mask.T)
    code, output = check('--shot', 1)
    assert code == 0 and '2 have an EXIF orientation' in output, output


def test_lists_made_with_another_min_pixels_are_reported(checked, monkeypatch, run_script):
    folder, _ = checked
    lists = ('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', folder, '--shot', 1, '--seed')
    assert run_script(*lists, '1,2', '3')[0] == 0
    assert len(list((folder / 'list/fold0').glob('*seed[123].txt'))) == 3
    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, 'shapes', dataclasses.replace(DATASETS['shapes'], min_pixels=10**6))
        code, output = run_script(*lists, '9', '--overwrite')
        assert code == 1 and 'pixels of plain disc, ' in output and 'lower min_pixels' in output, output
    code, output = run_script(*lists, '9')  # empty lists are made again
    assert code == 0 and 'note' not in output, output
    row = dataclasses.replace(DATASETS['shapes'], min_pixels=2000)
    monkeypatch.setitem(DATASETS, 'shapes', row)
    code, output = run_script(*lists, '123')
    assert code == 0, output
    assert 'existing lists of fold 0 are used, but this data and min_pixels 2000 give others' in output, output


def test_lists_that_do_not_fit_are_found(checked, run_script):
    folder, check = checked
    code, output = run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', folder, '--shot', 1)
    assert code == 0, output
    path = folder / 'list/fold0/fold0_1shot_seed123.txt'
    path.write_text('\n'.join(path.read_text().split()[::-1]))
    code, output = check('--fold', 0, '--shot', 1)
    assert code == 1 and 'fold0_1shot_seed123.txt' in output and 'does not show novel class' in output


def test_base_classes_with_too_few_images_are_errors_for_shots_that_are_named(checked):
    folder, check = checked
    train_list = folder / 'list' / 'trainaug.txt'
    shutil.rmtree(folder / 'list' / 'fold0', ignore_errors=True)  # of all images
    train_list.write_text('\n'.join(train_list.read_text().split()[:60]) + '\n')
    code, output = check('--fold', 0, '--shot', 20)
    assert code == 1 and 'error  fold 0, 20-shot' in output and '20 base images' in output, output
    code, output = check('--fold', 0)
    assert code == 0 and 'note   fold 0, 10-shot' in output and '0 errors' in output, output
