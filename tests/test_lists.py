"""Lists of images and classes: read, made from masks, kept and checked."""

import dataclasses
import os
import subprocess

import cv2
import numpy as np
import pytest

from core.errors import InputError
from core.names import files_by_id, find_spelling
from dataset import DATASETS
from dataset.class_index import ClassIndex
from dataset.images import Samples
from dataset.labels import label_table
from dataset.lists import FoldLists, ensure_class_lists, read_ids, write_ids
from dataset.masks import read_mask

FOLDERS = ('JPEGImages', 'SegmentationClassAug')


def test_lists_are_read_by_line(tmp_path):
    path = tmp_path / 'ids.txt'
    for content, ids in (
        (b'a\r\n\r\nb.2\r\n', ['a', 'b.2']),
        ('\ufeffa\n'.encode(), ['a']),
        ('a\nb.2\n'.encode('utf-16'), ['a', 'b.2']),  # as PowerShell writes
        (b'IMG 1 \n\tIMG  2\n', ['IMG 1', 'IMG  2']),
        ('a\u2028b\n\u3000c\n'.encode(), ['a\u2028b', '\u3000c']),  # other blanks of Unicode belong to names
        ('cafe\u0301\n'.encode(), ['caf\u00e9']),
        (b'caf\xe9\n', ['caf\udce9']),
    ):
        path.write_bytes(content)
        assert read_ids(path) == ids
        write_ids(path, ids)
        assert read_ids(path) == ids
    for content in (None, b'a\0b\0', b'\xff\xfea'):
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match='cannot be read'):
            read_ids(path if content else tmp_path)


PAIRS = (
    b'JPEGImages/a.jpg SegmentationClassAug/a.png\n',
    b'/JPEGImages/a.jpg\t/SegmentationClassAug/a.png\r\n',
    b'/data/VOC2012/JPEGImages/a.jpg   /data/VOC2012/SegmentationClassAug/a.png\n',
    b'JPEGImages\\a.jpg SegmentationClassAug\\a.png\n',
    b'JPEGImages/a.jpg\n',
    b'a.jpg a.png\n',
)


@pytest.mark.parametrize('content', PAIRS)
def test_lists_of_images_and_masks_are_read_where_they_name_the_files_of_an_id(tmp_path, content):
    path = tmp_path / 'its list.txt'
    path.write_bytes(content + content.replace(b'a.', b'IMG 1.2.'))
    assert read_ids(path, folders=FOLDERS) == ['a', 'IMG 1.2']
    with pytest.raises(InputError, match=r'has lines like .*one image id a line') as error:
        read_ids(path, folders=('images', 'masks') if b'/' in content or b'\\' in content else None)
    run_command(error)
    assert read_ids(path) == ['a', 'IMG 1.2']


def test_lists_of_files_elsewhere_are_matched_by_what_exists(tmp_path):
    """Where the data has the files of an id, a list may name them as they are in another place."""
    for name in (
        'photos/a.TIF',
        'photos/IMG 1.2.webp',
        'photos/b.jpg',
        'masks/a.png',
        'masks/IMG 1.2.png',
        'old/b.png',
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    samples = Samples(tmp_path / 'photos', tmp_path / 'masks', label_table([1], (), True))
    path = tmp_path / 'list.txt'
    for line in (
        'a.tif',
        './images/train/a.JPG',
        '../x/a.png y/a.png',
        'C:\\data\\a.jpg,C:\\data\\a.png',
        'photos/a.TIF',
        'a',
    ):
        path.write_text(f'{line}\n{line.replace("a.", "IMG 1.2.") if "." in line else "IMG 1.2"}\n')
        assert read_ids(path, samples=samples) == ['a', 'IMG 1.2'], line
    (tmp_path / 'old/a.png').touch()
    (tmp_path / 'masks/b.png').touch()
    for line in (
        'a.tif old/a.png',
        'c.jpg',
        'a.tif masks/b.png',
        'photos/a.jpg old/a.png',
        f'b.jpg {tmp_path}/old/b.png',
    ):
        path.write_text(f'{line}\n')
        with pytest.raises(InputError, match='has lines like'):  # other masks than those of the data set, or none
            read_ids(path, samples=samples)


def run_command(error):
    """Run the command at the end of a message."""
    subprocess.run(str(error.value)[str(error.value).index('sed ') :], shell=True, check=True)


def test_lists_of_something_else_come_with_the_command_that_mends_them(tmp_path):
    path = tmp_path / "x's ids.txt"
    for content, ids in (
        (b'a.JPG\r\nb.2.jpeg\r\n', ['a', 'b.2']),
        (b'JPEGImages/a.jpg SegmentationClass/a.png\n', ['a']),  # other masks than those of the data set
        (b'JPEGImages/a.jpg SegmentationClassAug/b.png\n', ['a']),
        (b'JPEGImages/a.jpg,SegmentationClassAug/a.png,1\n', ['a']),
        (b'JPEGImages/a\n', ['a']),
        (b'a\n._a\n', ['a']),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match='companions' if b'._' in content else 'lines like') as error:
            read_ids(path, folders=FOLDERS)
        run_command(error)
        assert read_ids(path, folders=FOLDERS) == ids


def test_ids_that_a_list_cannot_hold_are_not_written(tmp_path):
    for image_id in ('a\nb', 'a ', ' a', 'a/b', 'a.jpg', '._a'):
        with pytest.raises(InputError, match=r'cannot hold .*Rename the files'):
            write_ids(tmp_path / 'ids.txt', ['x', image_id])
    assert not (tmp_path / 'ids.txt').exists()


def test_files_are_found_by_id_whatever_form_their_names_have(tmp_path):
    composed, decomposed, latin = 'caf\u00e9', 'cafe\u0301', 'caf\udce9'
    compatible = '\uf900'  # a character that its canonical form replaces
    for name in (f'{decomposed}.png', f'{compatible}.png', f'{latin}.png', 'a b.png', '._a b.png', '~$x.png', 'c.txt'):
        (tmp_path / name).touch()
    files = files_by_id(tmp_path, '.png')
    assert list(files) == sorted(files) == ['a b', composed, latin, '\u8c48']
    assert [path.name for path in files.values()] == ['a b.png', f'{decomposed}.png', f'{latin}.png', '\uf900.png']
    for image_id, path in files.items():
        assert find_spelling(tmp_path / f'{image_id}.png') == path
    assert find_spelling(tmp_path / f'{composed}.jpg') == tmp_path / f'{composed}.jpg'
    assert files_by_id(tmp_path / 'none', '.png') == {}
    (tmp_path / f'{composed}.png').touch()
    with pytest.raises(InputError, match='twice'):
        files_by_id(tmp_path, '.png')


def hand_made(tmp_path, masks):
    """Masks of 200x200 pixels from {id: {class id: pixels}}, with images."""
    folder = tmp_path / 'data'
    folder.mkdir()
    for image_id, classes in masks.items():
        mask = np.zeros(40_000, np.uint8)
        start = 0
        for class_id, count in classes.items():
            mask[start : start + count] = class_id
            start += count
        cv2.imwrite(str(folder / f'{image_id}.png'), mask.reshape(200, 200))
        cv2.imwrite(str(folder / f'{image_id}.jpg'), np.zeros((200, 200, 3), np.uint8))
    write_ids(tmp_path / 'list' / 'trainaug.txt', masks)
    return Samples(folder, folder, label_table(range(1, 21), (), True))


MASKS = {
    'd': {6: 16384, 1: 1},
    'a': {6: 16383, 255: 20000},
    'c': {1: 20000, 2: 16384},
    'b': {20: 16384, 7: 16384},
    'e': {},
    'f': {3: 10},
}


def test_class_lists_of_a_hand_made_case(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    lists = FoldLists(tmp_path / 'list', 0)
    ensure_class_lists(DATASETS['voc'], samples, tmp_path / 'list' / 'trainaug.txt', lists)
    read = lambda path: path.read_text().split()  # noqa: E731
    assert read(lists.train) == ['d', 'a', 'b']
    assert {c: read(lists.base_class(c)) for c in (6, 7, 8, 20)} == {6: ['d'], 7: ['b'], 8: [], 20: ['b']}
    assert {c: read(lists.novel_class(c)) for c in (1, 2, 3)} == {1: ['c'], 2: ['c'], 3: []}
    assert len(list(lists.train.parent.iterdir())) == 21

    filtered = FoldLists(tmp_path / 'list', 0, filter_novel=True)
    ensure_class_lists(DATASETS['voc'], samples, tmp_path / 'list' / 'trainaug.txt', filtered)
    assert filtered.train == tmp_path / 'list' / 'fold0_filter' / 'train_fold0.txt'
    assert read(filtered.train) == ['a', 'b'] and read(filtered.base_class(6)) == []
    assert read(filtered.novel_class(1)) == ['c']  # support comes from images with novel classes, filtered or not


def test_class_index_does_not_depend_on_workers_and_reads_a_mask_once(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    cache = tmp_path / 'counts.npz'
    one = ClassIndex.from_masks(samples, list(MASKS), workers=1)
    two = ClassIndex.from_masks(samples, list(MASKS), cache, workers=2)
    assert np.array_equal(one.pixels, two.pixels)
    # counts come from the cache even if a mask cannot be decoded any more, as long as its file looks unchanged
    path = samples.mask_path('a')
    stamp, size = path.stat().st_mtime_ns, path.stat().st_size
    path.write_bytes(b'x' * size)
    os.utime(path, ns=(stamp, stamp))
    cached = ClassIndex.from_masks(samples, [*reversed(MASKS)], cache)
    assert np.array_equal(cached.pixels[::-1], one.pixels)
    os.utime(path, ns=(stamp + 1, stamp + 1))
    with pytest.raises(InputError, match=r'a\.png cannot be decoded'):
        ClassIndex.from_masks(samples, list(MASKS), cache)


def test_existing_lists_are_kept_but_checked(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    train = tmp_path / 'list' / 'trainaug.txt'
    lists = FoldLists(tmp_path / 'list', 0)
    write_ids(lists.train, ['b', 'd'])
    ensure_class_lists(DATASETS['voc'], samples, train, lists)
    assert lists.train.read_text() == 'b\nd\n'
    assert lists.base_class(6).read_text() == 'd\n'  # the others are made
    assert ensure_class_lists(DATASETS['voc'], samples, train, lists) == [lists.train]  # this data gives d, a, b
    few = dataclasses.replace(DATASETS['voc'], min_pixels=16383)
    assert ensure_class_lists(few, samples, train, lists) == [lists.base_class(6), lists.train]
    write_ids(lists.train, ['b', 'c'])  # c shows novel classes of fold 0 only: a list of another fold
    lists.base_class(6).unlink()
    with pytest.raises(InputError, match='names c, which do not belong there with this data: it is a list of another'):
        ensure_class_lists(DATASETS['voc'], samples, train, lists)
    assert not lists.base_class(6).exists()  # nothing is written before all lists have been checked
    write_ids(lists.train, ['b', 'd'])
    # an unfiltered list in the filtered folder is found (d shows novel class 1); filtering rewrites no list
    filtered = FoldLists(tmp_path / 'list', 0, filter_novel=True)
    write_ids(lists.novel_class(1), ['d', 'c'])
    write_ids(filtered.train, ['b', 'd'])
    with pytest.raises(InputError, match='names d'):
        ensure_class_lists(DATASETS['voc'], samples, train, filtered)
    assert lists.novel_class(1).read_text() == 'd\nc\n'
    write_ids(lists.base_class(20), [])  # the result of a min_pixels that was too high
    ensure_class_lists(DATASETS['voc'], samples, train, lists)
    assert lists.base_class(20).read_text() == 'b\n'
    ensure_class_lists(DATASETS['voc'], samples, train, lists, overwrite=True)
    assert lists.novel_class(1).read_text() == 'c\n'


def test_a_damaged_cache_is_not_used(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    cache = tmp_path / 'counts.npz'
    ClassIndex.from_masks(samples, list(MASKS), cache)
    content = cache.read_bytes()
    local, central = content.index(b'pixels.npy'), content.rindex(b'pixels.npy')
    for damaged in (
        b'PK nothing', content[:-60], content[: local + 40] + b'\xff' * 9 + content[local + 49 :],  # no zlib data
        content[: central - 36] + b'c' + content[central - 35 :],  # an unknown compression
        content[: central - 38] + b'\1' + content[central - 37 :],  # encrypted
    ):  # fmt: skip
        cache.write_bytes(damaged)
        index = ClassIndex.from_masks(samples, list(MASKS), cache)
        assert index.covering(6, 16384) == ['d']
        with np.load(cache) as saved:
            assert saved['ids'].tolist() == list(MASKS)
            assert np.array_equal(saved['pixels'], index.pixels)


def test_class_lists_of_real_data_agree_with_np_unique(voc_mini, tmp_path):
    ids = (voc_mini / 'ImageSets/Segmentation/trainaug.txt').read_text().split()[:60]
    samples = Samples(voc_mini / 'JPEGImages', voc_mini / 'SegmentationClassAug', label_table(range(1, 21), (), True))
    index = ClassIndex.from_masks(samples, ids)
    for image_id, row in zip(ids, index.pixels, strict=True):
        values, counts = np.unique(read_mask(voc_mini / f'SegmentationClassAug/{image_id}.png'), return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {v: row[v] for v in np.flatnonzero(row)}
