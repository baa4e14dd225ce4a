"""check_data finds what is wrong with a data set and its lists."""

import dataclasses
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import DATASETS
from dataset.fewshot import support_shortage
from dataset.formats import ORIENTATION_TAG
from dataset.masks import read_mask, save_palette_png
from utils.check_data import Examined, check_draws, check_scales


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


def test_damage_inside_photographs_is_found(checked, tmp_path):
    """Decoders show something else behind it, mostly without a word."""
    folder, check = checked
    content = {}
    for number in range(1, 9):
        path = folder / f'JPEGImages/train_{number:04}.jpg'
        content[number] = path.read_bytes()
    rng = np.random.default_rng(0)
    middle = {number: len(content[number]) // 2 for number in content}
    changed = {
        1: content[1][: middle[1]] + bytes(512) + content[1][middle[1] + 512 :],  # a sector of zeros
        2: content[2][: middle[2]] + content[2][middle[2] + 1024 :],  # two sectors are missing
        3: content[3][: middle[3]] + b'\xff\xd9',  # cut, and ended by a tool
        4: content[4][: middle[4]] + rng.integers(0, 255, 700, np.uint8).tobytes() + content[4][middle[4] + 700 :],
        5: content[5][:-2] + content[5][500:504] * 2 + b'\xff\xd9',  # as some cameras write them
        6: content[6] + bytes(3000),  # behind the picture
        7: content[7][: middle[7]] + bytes(len(content[7]) - middle[7]),  # as after a crash
    }
    for number, changed_content in changed.items():
        (folder / f'JPEGImages/train_{number:04}.jpg').write_bytes(changed_content)
    code, output = check('--shot', 1)
    named = set(re.findall(r'^error  train train_000(\d)', output, re.MULTILINE))
    assert code == 1 and named == {'1', '2', '3', '4', '7'}, output
    assert re.search(r'train_0001.jpg is damaged \(Corrupt JPEG data: .*\), so that a part of it shows', output), output
    assert re.search('note   train images +1 have a few bytes too many at their end.*: train_0005', output), output


def test_masks_without_a_class_that_counts_are_told_apart(checked):
    folder, check = checked
    masks = folder / 'SegmentationClassAug'
    shutil.rmtree(folder / 'list/fold0', ignore_errors=True)
    for number, values in ((1, (0, 0)), (2, (0, 255)), (3, (255, 255)), (4, (0, 7))):
        path = masks / f'train_{number:04}.png'
        mask = np.full(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape, values[0], np.uint8)
        mask[20:40, 20:40] = values[1]
        cv2.imwrite(str(path), mask)
    for path in masks.glob('val_*.png'):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask[np.isin(mask, (3, 9))] = 0
        cv2.imwrite(str(path), mask)
    code, output = check('--shot', 1)
    assert code == 0, output
    for text in (
        'train masks  1 show background only: train_0001',
        'train masks  1 hold no class, only 0 and 255, which are background and ignored pixels: train_0002. If 255',
        'train masks  1 hold 255 only, so that all of their pixels are ignored and none is counted: train_0003',
    ):
        assert text in output, output
    seen = {int(v) for path in masks.glob('val_*.png') for v in np.unique(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))}
    unseen = [name for c, name in enumerate(DATASETS['shapes'].class_names, 1) if c not in seen]
    assert {'striped disc', 'speckled disc'} <= set(unseen)
    assert f'classes      no evaluation image shows {", ".join(unseen[:8])}' in output, output


def test_palettes_that_tools_have_reordered_are_found(checked):
    """They are shown by a colour that has several values, whatever the colours are."""
    folder, check = checked
    shutil.rmtree(folder / 'list/fold0', ignore_errors=True)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    palette[0] = 0
    masks = folder / 'SegmentationClassAug'
    for path in sorted(masks.glob('train_000?.png')):
        save_palette_png(path, cv2.imread(str(path), cv2.IMREAD_UNCHANGED), palette)
    code, output = check('--shot', 1)
    assert code == 0 and 'palettes in another order' not in output, output
    mask = read_mask(masks / 'train_0003.png')
    values, places = np.unique(mask, return_inverse=True)  # compacted, in the opposite order
    picture = Image.fromarray((len(values) - 1 - places).reshape(mask.shape).astype(np.uint8))
    picture.putpalette(palette[values[::-1]].tobytes())
    picture.save(masks / 'train_0003.png')
    code, output = check('--shot', 1)
    assert code == 1 and 'error  masks' in output and '1 have palettes in another order: train_0003' in output, output
    assert 'export the masks again' in output


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
    assert code == 1 and 'error  fold 0, 20-shot' in output and 'needs 20 of its images' in output, output
    code, output = check('--fold', 0)
    assert code == 0 and 'note   fold 0, 10-shot' in output and '0 errors' in output, output


def test_draws_that_would_be_refused_are_found(shapes, run_script, tmp_path):
    folder = tmp_path / 'data'
    shutil.copytree(shapes, folder)
    flags = ('--dataset', 'shapes', '--data-dir', folder, '--shot', 2)
    assert run_script('utils/gen_fs_list.py', *flags)[0] == 0
    lists = folder / 'list/fold0'
    ids = {c: (lists / f'train_novel_class{c}.txt').read_text().split() for c in (1, 2)}
    path = lists / 'train_novel_class1.txt'
    drawn = (lists / 'fold0_2shot_seed123.txt').read_text().split()[0]
    path.write_text('\n'.join(i for i in ids[1] if i != drawn))  # as after a change of min_pixels
    for script, more in (('utils/gen_fs_list.py', ()), ('utils/check_data.py', ('--fold', 0, '--workers', 1))):
        code, output = run_script(script, *flags, *more)
        assert code == 0 and f'{drawn} are not in the class lists any more' in output, output
    path.unlink()
    code, output = run_script('utils/check_data.py', *flags, '--fold', 0, '--workers', 1)
    assert code == 0, output
    assert not support_shortage({1: list('abc'), 2: list('def')}, 3)
    assert 'class 2: 2 support images asked for' in support_shortage({1: list('ab'), 2: list('ab')}, 2)
    spec, pixels = DATASETS['shapes'], np.full((2, 256), 10**6)
    for draws_support in (True, False):  # two images that show all classes
        findings = check_draws(spec, 0, ['a', 'b'], pixels, [2], 'error', draws_support)
        assert any('novel class' in finding.text for finding in findings) is draws_support


def test_photographs_that_evaluation_shrinks_much_are_noted():
    large, small = (Examined('', np.zeros(256), size) for size in ((2000, 1500), (500, 375)))
    (finding,) = check_scales(DATASETS['voc'], [large, large, small])
    assert 'shrinks by 0.24' in finding.text and 'scale_range: [0.21, 0.26]' in finding.text
    assert not check_scales(DATASETS['voc'], [small, large, small]) and not check_scales(DATASETS['voc'], [])


def test_a_folder_with_a_card_is_no_built_in_data_set(run_script, tmp_path):
    (tmp_path / 'dataset.yaml').write_text('names: [car, tree]\n')
    code, output = run_script('utils/check_data.py', '--data-dir', tmp_path)
    assert code == 2 and f'has a card of its own: give --dataset {tmp_path}' in output
