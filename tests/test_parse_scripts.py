"""Preparation of downloads: small hand-made VOC with SBD, real masks, and interruptions."""

import json
import multiprocessing
import os
import signal
import time

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from core.errors import exits_cleanly
from core.parallel import parallel_map
from dataset.legend import voc_palette
from dataset.masks import read_mask, save_palette_png
from utils.coco_parse_script import main, parse_args

SIDE = 160  # 25,600 pixels


def voc_mask(class_id, pixels):
    mask = np.zeros(SIDE * SIDE, np.uint8)
    mask[:pixels] = class_id
    mask[-5:] = 255
    return mask.reshape(SIDE, SIDE)


@pytest.fixture
def miniature(tmp_path):
    """VOC with three masks, one of them in val; SBD with four annotations, one of them of an image with a VOC mask."""
    voc, sbd = tmp_path / 'VOC2012', tmp_path / 'sbd'
    for folder in (voc / 'JPEGImages', voc / 'SegmentationClass', voc / 'ImageSets/Segmentation', sbd / 'cls'):
        folder.mkdir(parents=True)
    for image_id in ('a', 'b', 'v', 's', 't', 'w'):
        cv2.imwrite(str(voc / f'JPEGImages/{image_id}.jpg'), np.zeros((SIDE, SIDE, 3), np.uint8))
    save_palette_png(voc / 'SegmentationClass/a.png', voc_mask(1, 20000), voc_palette())
    save_palette_png(voc / 'SegmentationClass/v.png', voc_mask(2, 20000), voc_palette())
    colours = voc_palette()[voc_mask(7, 17000)]  # as after a tool that expands palettes
    cv2.imwrite(str(voc / 'SegmentationClass/b.png'), colours[:, :, ::-1])
    (voc / 'ImageSets/Segmentation/val.txt').write_text('v\n')
    for image_id, class_id in (('s', 3), ('t', 6), ('v', 9), ('lost', 1)):
        segmentation = np.where(voc_mask(class_id, 18000) == 255, 0, voc_mask(class_id, 18000))
        content = {'Segmentation': segmentation, 'Boundaries': np.zeros((20, 1), object), 'CategoriesPresent': class_id}
        savemat(sbd / f'cls/{image_id}.mat', {'GTcls': content}, do_compression=True)
    return voc, sbd, tmp_path / 'list'


def test_voc_with_sbd(miniature, run_script):
    voc, sbd, lists = miniature
    code, output = run_script(
        'utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', sbd, '--list-dir', lists, '--workers', 2
    )
    assert code == 0, output
    masks = {path.stem: read_mask(path) for path in (voc / 'SegmentationClassAug').glob('*.png')}
    assert sorted(masks) == ['a', 'b', 's', 't', 'v']
    for image_id, class_id, pixels in (('a', 1, 20000), ('b', 7, 17000), ('v', 2, 20000)):  # v: VOC's own wins
        assert np.array_equal(masks[image_id], voc_mask(class_id, pixels))
    assert np.unique(masks['s']).tolist() == [0, 3] and (masks['s'] == 3).sum() == 18000
    assert (lists / 'trainaug.txt').read_text() == 'a\nb\ns\nt\n'
    assert (lists / 'val.txt').read_text() == 'v\n'
    assert 'masks: 3 from VOC, 2 from SBD' in output and 'lost' in output
    assert 'trainaug.txt: 4 images, expected 10582' in output
    # again: nothing is written a second time
    stamps = {path: path.stat().st_mtime_ns for path in (voc / 'SegmentationClassAug').iterdir()}
    code, output = run_script(
        'utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', sbd, '--list-dir', lists, '--workers', 1
    )
    assert code == 0 and f'kept {lists / "val.txt"}' in output
    assert stamps == {path: path.stat().st_mtime_ns for path in (voc / 'SegmentationClassAug').iterdir()}

    # the class lists of fold 0, by hand: novel 1..5 are in a and s (v is not for training)
    train = lists / 'trainaug.txt'
    code, output = run_script(
        'utils/gen_fs_list.py', '--data-dir', voc, '--train-list', train, '--shot', 1, '--filter-novel'
    )
    assert code == 1 and 'novel class 2 has no image' in output
    read = lambda name: (lists / name).read_text().split()  # noqa: E731
    assert read('fold0/train_fold0.txt') == read('fold0_filter/train_fold0.txt') == ['b', 't']
    assert read('fold0/train_novel_class1.txt') == ['a'] and read('fold0/train_novel_class3.txt') == ['s']
    assert read('fold0/train_base_class7.txt') == ['b'] and read('fold0/train_base_class6.txt') == ['t']
    assert read('fold0/train_base_class20.txt') == []


def test_a_ready_made_folder_needs_lists_only(miniature, run_script):
    voc, _, lists = miniature
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--list-dir', lists)
    assert code == 1 and '--sbd-root' in output and 'SegmentationClassAug' in output
    (voc / 'SegmentationClassAug').mkdir()
    for image_id, class_id in (('b', 77), ('a', 1), ('v', 1)):
        cv2.imwrite(str(voc / f'SegmentationClassAug/{image_id}.png'), voc_mask(class_id, 10))
    (voc / 'SegmentationClassAug/._a.png').write_bytes(bytes((0, 5, 22, 7)) + bytes(92))  # as macOS adds
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--list-dir', lists)
    assert code == 1 and 'b.png holds the values 77' in output and not lists.exists()
    cv2.imwrite(str(voc / 'SegmentationClassAug/b.png'), voc_mask(1, 10))
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--list-dir', lists)
    assert code == 0 and (lists / 'trainaug.txt').read_text() == 'a\nb\n'
    assert 'show no class' not in output
    cv2.imwrite(str(voc / 'SegmentationClassAug/b.png'), np.where(voc_mask(1, 10) == 1, 255, 0))
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--list-dir', lists)
    assert code == 0 and 'trainaug.txt: 1 masks show no class: b;' in output, output
    (voc / 'SegmentationClassAug/v.png').unlink()
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--list-dir', lists)
    assert code == 1 and '1 images of' in output and 'have no mask' in output


def test_masks_of_voc_beside_data_that_is_read_only(miniature, run_script):
    voc, sbd, lists = miniature
    before, root = sorted(voc.rglob('*')), voc.parent / 'masks'
    command = ('utils/voc_parse_script.py', '--voc-root', voc, '--mask-root', root, '--list-dir', lists)
    code, output = run_script(*command, '--sbd-root', sbd, '--workers', 1)
    assert code == 0 and sorted(voc.rglob('*')) == before, output
    assert np.array_equal(read_mask(root / 'SegmentationClassAug/a.png'), voc_mask(1, 20000))
    assert (root / 'JPEGImages').samefile(voc / 'JPEGImages') and (lists / 'trainaug.txt').read_text() == 'a\nb\ns\nt\n'
    code, output = run_script(*command, '--workers', 1)  # lists only
    assert code == 0 and f'kept {lists / "val.txt"}' in output, output
    (root / 'SegmentationClassAug/s.png').unlink()
    (root / 'JPEGImages').unlink()
    (root / 'JPEGImages').symlink_to(sbd)
    code, output = run_script(*command, '--sbd-root', sbd)
    assert code == 1 and f'{root / "JPEGImages"} exists and is no link to {voc / "JPEGImages"}' in output, output
    assert not (root / 'SegmentationClassAug/s.png').exists()


def test_damaged_downloads_are_named(miniature, run_script):
    voc, sbd, lists = miniature
    (sbd / 'cls/t.mat').write_bytes(b'nothing')
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', sbd, '--list-dir', lists)
    assert code == 1 and 't.mat cannot be read' in output and 'Traceback' not in output
    assert not list((voc / 'SegmentationClassAug').glob('.*'))
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', voc, '--list-dir', lists)
    assert code == 1 and 'has no cls/*.mat' in output


def in_order(mask, values):
    """A palette PNG of a VOC mask in which value i has the colour of class values[i], as tools leave it."""
    position = np.zeros(256, np.uint8)
    position[values] = range(len(values))
    picture = Image.fromarray(position[mask])
    picture.putpalette(voc_palette()[values].tobytes())
    return picture


def test_colours_give_the_classes_of_voc_whatever_their_order(miniature, run_script):
    voc, sbd, lists = miniature
    folder, command = voc / 'SegmentationClass', ('utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', sbd)
    mask = voc_mask(15, 12000)
    compact, by_use = in_order(mask, [0, 15, 255]), in_order(mask, [255, 15, 0])
    dithered = compact.convert('RGB').quantize(3)
    for name, picture, bits in (('a', compact, 2), ('b', by_use, 8), ('v', dithered, 8)):
        picture.save(folder / f'{name}.png', bits=bits)
    code, output = run_script(*command, '--list-dir', lists, '--workers', 1)
    assert code == 0, output
    for name in ('a', 'b', 'v'):
        assert np.array_equal(read_mask(voc / f'SegmentationClassAug/{name}.png'), mask), name
    # greyscale ids, and ids whose palette has nothing to do with VOC's
    cv2.imwrite(str(folder / 'a.png'), mask)
    save_palette_png(folder / 'b.png', mask, np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 3))
    save_palette_png(folder / 'v.png', mask, np.zeros((256, 3), np.uint8))
    code, output = run_script(*command, '--list-dir', lists, '--workers', 1, '--overwrite')
    assert code == 0, output
    for name in ('a', 'b', 'v'):
        assert np.array_equal(read_mask(voc / f'SegmentationClassAug/{name}.png'), mask), name


def test_wrong_masks_of_voc_are_not_written(miniature, run_script):
    voc, sbd, lists = miniature
    path, written = voc / 'SegmentationClass/a.png', voc / 'SegmentationClassAug/a.png'
    mask = voc_mask(15, 12000)
    grey = in_order(mask, [0, 15, 255]).convert('L')  # luminance of the colours
    two_bits = in_order(mask, [0, 15, 255])
    two_bits.putpalette(bytes((0, 0, 0, 192, 128, 128, 1, 2, 3)))
    half = Image.fromarray(mask[::2, ::2])
    for picture, message in (
        (grey, 'holds the values 147, 220; expected class ids 0..20 and 255'),
        (two_bits, 'colours that are not classes, such as [1, 2, 3]'),
        (half, f'a.png is {SIDE // 2}x{SIDE // 2}, its image'),
    ):
        picture.save(path)
        command = ('utils/voc_parse_script.py', '--voc-root', voc, '--sbd-root', sbd, '--list-dir', lists)
        code, output = run_script(*command, '--workers', 1)
        assert code == 1 and str(path) in output and message in output and not written.exists(), output
    in_order(mask, [0, 15, 255]).convert('RGB').save(path, 'jpeg')
    code, output = run_script(*command, '--workers', 1)
    assert code == 1 and 'is a JPEG file under the name of a PNG' in output and not written.exists(), output
    save_palette_png(path, mask, voc_palette())
    for values, message in ((np.stack([mask, mask]), 'has the shape'), (mask * 3, '45'), (mask + 0.5, '15.5')):
        savemat(sbd / 'cls/s.mat', {'GTcls': {'Segmentation': values}})
        code, output = run_script(*command, '--workers', 1)
        assert code == 1 and 's.mat' in output and message in output, output
        assert not (voc / 'SegmentationClassAug/s.png').exists()


def test_ready_made_masks_of_real_photographs_give_their_lists(voc_mini, tmp_path, run_script):
    code, output = run_script('utils/voc_parse_script.py', '--voc-root', voc_mini, '--list-dir', tmp_path)
    assert code == 0, output
    for name in ('trainaug.txt', 'val.txt'):
        published = (voc_mini / 'ImageSets/Segmentation' / name).read_text().split()
        assert (tmp_path / name).read_text().split() == published


# ---- interruptions


def start_in_own_group(function, *args):
    """Run a function in a forked process, which is the leader of a new process group and imports nothing again."""

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts tested before have replaced it
        function(*args)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    return process


def test_an_interrupted_run_leaves_no_half_file_and_can_be_run_again(tmp_path):
    root = tmp_path / 'coco'
    for folder in ('train2014', 'annotations'):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = [{'id': i, 'file_name': f'{i:04d}.jpg', 'height': 400, 'width': 500} for i in range(300)]
    annotations = [
        {'id': 20 * i + k, 'image_id': i, 'category_id': 1, 'segmentation': [rng.uniform(0, 400, 60).tolist()]}
        for i in range(300) for k in range(20)
    ]  # fmt: skip
    content = {'images': images, 'annotations': annotations, 'categories': [{'id': 1, 'name': 'dog'}]}
    (root / 'annotations/instances_train2014.json').write_text(json.dumps(content))
    photograph = cv2.imencode('.jpg', np.zeros((400, 500, 3), np.uint8))[1].tobytes()
    for image in images:
        (root / 'train2014' / image['file_name']).write_bytes(photograph)
    args = parse_args(['--coco-root', str(root), '--split', 'train', '--list-dir', str(tmp_path / 'list')])
    process = start_in_own_group(main, args)
    folder = root / 'train_no_crowd'
    while process.is_alive() and len(list(folder.glob('*.png'))) < 30:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    early = {path: path.stat().st_mtime_ns for path in folder.glob('*.png')}
    assert 30 <= len(early) < 300 and not (tmp_path / 'list').exists()
    assert all(read_mask(path).shape == (400, 500) for path in early)
    # again, twice at once
    both = [start_in_own_group(main, args) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(folder.glob('*.png'))) == 300
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in early.items())
    assert len((tmp_path / 'list/train.txt').read_text().split()) == 300


def touch_or_wait(item):
    """Make a file, or wait until there is one."""
    path, waits = item
    while waits and not path.exists():
        time.sleep(0.01)
    path.touch()


def test_ctrl_c_ends_a_map_whose_workers_are_partly_idle(tmp_path):
    files, end = [tmp_path / name for name in 'abc'], tmp_path / 'end'
    items = [*((path, False) for path in files), (end, True)]
    process = start_in_own_group(exits_cleanly(parallel_map), touch_or_wait, items, 'waiting', 4)
    while process.is_alive() and not all(path.exists() for path in files):
        time.sleep(0.01)
    time.sleep(0.3)  # the workers that are done become idle
    os.killpg(process.pid, signal.SIGINT)
    end.touch()
    process.join(30)
    assert process.exitcode == 130
