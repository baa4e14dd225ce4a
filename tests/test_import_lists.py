"""Imports again and again: which list an image is in, and which file a photograph is."""

import shutil
from pathlib import PurePosixPath

import numpy as np
import pytest
from exports import coco_content, rectangle, small_coco, small_labelme, write_json, write_photograph

from dataset.annotations.photographs import unique_ids
from dataset.annotations.sources import split_of
from dataset.lists import read_ids

CAR = ('car', [rectangle(1, 1, 9, 9)])
PHOTOGRAPH = np.zeros((30, 40, 3), np.uint8)


def export(folder, count, names=('car', 'tree')):
    """A COCO export of photographs that show a car, every third one also a tree."""
    annotations = [(i, 'car', [rectangle(1, 1, 9, 9)]) for i in range(count)]
    annotations += [(i, 'tree', [rectangle(11, 11, 19, 19)]) for i in range(0, count, 3)]
    for i in range(count):
        write_photograph(folder / f'images/{i:03}.png', PHOTOGRAPH)
    images = [(f'{i:03}.png', 30, 40) for i in range(count)]
    write_json(folder / 'annotations/instances_default.json', coco_content(images, annotations, list(names)))


def lists(data):
    return {path.stem: set(read_ids(path)) for path in (data / 'list').glob('*.txt')}


def test_only_whole_names_are_those_of_splits():
    assert [split_of(name) for name in ('train', 'Training', 'valid', 'val2017', 'validation', 'TEST', 'test-dev')] == [
        'train', 'train', 'val', 'val', 'val', 'test', 'test',
    ]  # fmt: skip
    assert not [name for name in ('valley', 'testers', 'train_station', 'valencia', 'trainee', 'test_photos', '')
                if split_of(name)]  # fmt: skip


def test_folders_that_begin_like_splits_are_none(imported, tmp_path):
    for folder in ('bridge', 'train_station', 'valley', 'testers'):
        for name in 'ab':
            small_labelme(tmp_path / 'export' / folder / name, ('car', 'rectangle', [[1, 1], [9, 9]]))
    code, output = imported('labelme', '--val-fraction', 0.25)
    assert code == 0 and {name: len(ids) for name, ids in lists(tmp_path / 'data').items()} == {'train': 6, 'val': 2}
    assert 'names splits' not in output
    export(tmp_path / 'roboflow', 2)
    shutil.move(tmp_path / 'roboflow/annotations/instances_default.json', tmp_path / 'roboflow/instances_valley.json')
    code, output = imported('coco', '--annotations', tmp_path / 'roboflow', '--out', tmp_path / 'other')
    assert code == 0 and len(read_ids(tmp_path / 'other/list/train.txt')) + 1 >= 2, output


def test_photographs_in_folders_keep_the_split_of_the_tool(imported, tmp_path):
    folder = tmp_path / 'export'
    for name in ('sub/a', 'sub/b', 'other/a'):
        write_photograph(folder / f'JPEGImages/{name}.png', PHOTOGRAPH)
        write_photograph(folder / f'SegmentationClass/{name}.png', PHOTOGRAPH + np.uint8(9))
    (folder / 'labelmap.txt').write_text('background:0,0,0::\ncar:9,9,9::\n')
    (folder / 'ImageSets/Segmentation').mkdir(parents=True)
    (folder / 'ImageSets/Segmentation/Train.txt').write_text('sub/a\nother/a\n')
    (folder / 'ImageSets/Segmentation/Validation.txt').write_text('sub/b\n')
    code, output = imported('colors')
    assert code == 0 and lists(tmp_path / 'data') == {'train': {'sub_a', 'other_a'}, 'val': {'b'}}, output
    assert 'the export names splits, which the lists have: 2 train, 1 val' in output


def test_an_export_without_training_images_leaves_nothing_behind(imported, tmp_path):
    export(tmp_path / 'export', 1)
    path = tmp_path / 'export/annotations/instances_default.json'
    path.rename(path.with_name('instances_val2017.json'))
    code, output = imported('coco')
    assert code == 1 and 'no training images' in output, output
    assert not [each for each in (tmp_path / 'data').rglob('*') if each.is_file()]


@pytest.mark.parametrize('inside', ('', 'photographs'))
def test_a_colour_mask_is_no_photograph(imported, tmp_path, inside):
    folder = tmp_path / 'export'
    write_photograph(folder / inside / 'a.jpg', PHOTOGRAPH)
    write_photograph(folder / 'a.png', PHOTOGRAPH + np.uint8(9))
    (folder / 'labelmap.txt').write_text('background:0,0,0::\ncar:9,9,9::\n')
    code, output = imported('colors', '--images', folder)
    assert code == 0 and (tmp_path / 'data/images/a.jpg').samefile(folder / inside / 'a.jpg'), output
    (folder / inside / 'a.jpg').unlink()
    code, output = imported('colors', '--images', folder, '--out', tmp_path / 'second')
    assert code == 1 and '1 annotated photographs are missing' in output, output


def test_a_data_set_that_grows_keeps_its_evaluation_images(imported, tmp_path):
    export(tmp_path / 'export', 30)
    assert imported('coco')[0] == 0
    before = lists(tmp_path / 'data')
    export(tmp_path / 'export', 50)
    code, output = imported('coco', '--overwrite', '--seed', 5)
    after = lists(tmp_path / 'data')
    assert code == 0 and '30 images stay in the lists that they were in' in output, output
    assert all(before[split] < after[split] for split in ('train', 'val')) and len(after['val']) == 10
    assert sum(map(len, after.values())) == 50
    shutil.rmtree(tmp_path / 'data/list')
    code, output = imported('coco', '--seed', 5)
    assert code == 0 and 'stay in the lists' not in output and lists(tmp_path / 'data')['val'] != after['val']


def test_few_images_are_all_for_training_and_the_command_says_so(imported, tmp_path):
    small_coco(tmp_path / 'export', CAR, ('tree', [rectangle(11, 11, 19, 19)]))
    code, output = imported('coco')
    assert code == 0 and 'too few images for evaluation, so the card has val: none' in output, output
    code, output = imported('coco', '--classes', 'tree', '--out', tmp_path / 'other')
    assert code == 0 and 'left out: 1 names, whose annotations are not drawn: car (1)' in output, output
    code, output = imported('coco', '--val-fraction', 0, '--out', tmp_path / 'third')
    assert code == 0 and 'too few' not in output, output


def test_names_without_objects_are_not_those_of_left_out_photographs(imported, tmp_path):
    export(tmp_path / 'export', 4)
    content = coco_content([(f'{i:03}.png', 30, 40) for i in range(2)], [(0, *CAR), (1, 'dog', CAR[1])], ['car', 'dog'])
    write_json(tmp_path / 'export/annotations/instances_default.json', content)
    code, output = imported('coco', '--classes', 'car')
    assert code == 0 and 'are not drawn: dog (1)' in output and 'names without annotations' not in output, output


def test_copies_take_the_place_of_links_and_an_export_may_move(imported, tmp_path):
    export(tmp_path / 'export', 3)
    data, links = tmp_path / 'data', [tmp_path / f'data/images/{i:03}.png' for i in range(3)]
    assert imported('coco')[0] == 0 and all(path.is_symlink() for path in links)
    (tmp_path / 'export').rename(tmp_path / 'moved')
    (data / 'list/train.txt').write_text('000\n')  # edited
    code, output = imported('coco', '--annotations', tmp_path / 'moved')
    assert code == 0 and all(path.samefile(tmp_path / 'moved/images' / path.name) for path in links), output
    assert (data / 'list/train.txt').read_text() == '000\n'
    code, output = imported('coco', '--annotations', tmp_path / 'moved', '--copy')
    assert code == 0 and not any(path.is_symlink() for path in links), output
    shutil.rmtree(tmp_path / 'moved/images')
    assert all(path.stat().st_size for path in links)


def test_ids_have_no_folder_of_the_root():
    assert unique_ids([PurePosixPath('/data/x.jpg'), PurePosixPath('/mnt/data/x.jpg')]) == ['data_x', 'mnt_data_x']


@pytest.mark.parametrize('kind', ('coco', 'labelme', 'colors'))
def test_photographs_without_annotations_are_reported(imported, tmp_path, kind):
    folder = tmp_path / 'export'
    if kind == 'coco':
        small_coco(folder, CAR)
    elif kind == 'labelme':
        small_labelme(folder, ('car', 'rectangle', [[1, 1], [9, 9]]))
    else:
        write_photograph(folder / 'SegmentationClass/a.png', PHOTOGRAPH + np.uint8(9))
        write_photograph(folder / 'JPEGImages/a.png', PHOTOGRAPH)
        (folder / 'labelmap.txt').write_text('background:0,0,0::\ncar:9,9,9::\n')
    photographs = {'coco': 'images', 'labelme': '.', 'colors': 'JPEGImages'}[kind]
    code, output = imported(kind)
    assert code == 0 and 'that no annotation names' not in output, output
    write_photograph(folder / photographs / 'forgotten.png', PHOTOGRAPH)
    code, output = imported(kind)
    assert code == 0 and 'left out: 1 photographs that no annotation names: forgotten.png' in output, output
