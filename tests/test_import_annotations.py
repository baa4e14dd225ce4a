"""Annotations of other tools: the embedded data written out as each of them does, imported, and compared."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from exports import (
    NAMES,
    SPLITS,
    SUFFIXES,
    WRITERS,
    coco_content,
    rectangle,
    small_coco,
    small_labelme,
    write_json,
    write_photograph,
)
from PIL import Image

from dataset.cards import read_card
from dataset.classes import DATASETS
from dataset.images import read_image
from dataset.masks import read_mask
from dataset.shapes import draw_scene
from report.annotations import CocoWriter


@pytest.fixture(scope='module')
def scenes():
    """Six scenes of the embedded data: photographs, RGB, and masks."""
    return [draw_scene(np.random.default_rng((3, i)), first_class=1 + i % 3) for i in range(len(SUFFIXES))]


@pytest.mark.parametrize('kind', WRITERS)
def test_masks_are_those_of_the_data(imported, scenes, tmp_path, run_script, kind):
    WRITERS[kind](tmp_path / 'export', scenes)
    novel = NAMES[1]
    code, output = imported(kind, '--ignore', 'edge', '--novel', novel)
    assert code == 0, output
    data, spec = tmp_path / 'data', read_card(tmp_path / 'data/dataset.yaml')
    shown = {int(value) for _, mask in scenes for value in np.unique(mask)} - {0, 255}
    order = (lambda c: NAMES[c]) if kind == 'labelme' else (lambda c: c)
    assert spec.class_names == tuple(NAMES[c] for c in sorted(shown, key=order)), output
    value_of = {name: value for value, name in spec.classes.items()} | {'background': 0, 'edge': 255}
    assert [spec.classes[c] for c in spec.folds[0]] == [novel] and spec.ignore == (255,) and spec.background == 0
    for i, (image, mask) in enumerate(scenes):
        expected = np.zeros(256, np.uint8)
        for value in np.unique(mask):
            expected[value] = value_of[NAMES[value]]
        assert np.array_equal(read_mask(data / f'masks/scene {i}.png', spec.class_colors), expected[mask])
        photograph = data / f'images/scene {i}{SUFFIXES[i]}'
        assert np.array_equal(read_image(photograph), image)
        assert photograph.is_symlink() != (kind == 'labelme' and i % 2)
    lists = {split: (data / f'list/{split}.txt').read_text().split('\n')[:-1] for split in ('train', 'val')}
    if kind == 'labelme':
        assert sorted(lists['train'] + lists['val']) == [f'scene {i}' for i in range(6)]
        assert '6 shapes without area' in output and 'shape 0 (star) of 0.json' in output and 'settings.json' in output
    else:
        assert lists['val'] == [f'scene {i}' for i in range(6) if SPLITS[i] == 'valid']
    table = [re.split(' {2,}', line.strip()) for line in output.splitlines() if NAMES[1] in line]
    pixels, images = (sum(count(mask == 1) for _, mask in scenes) for count in (np.count_nonzero, np.any))
    objects = '-' if kind == 'colors' else str(images)
    assert table[0][:6] == [str(value_of[novel]), novel, 'novel', str(images), objects, str(pixels)], output
    code, output = run_script('utils/check_data.py', '--dataset', data, '--workers', 1)
    assert 'training and 2 evaluation' in output if kind != 'labelme' else 'evaluation images' in output, output
    assert not [line for line in output.splitlines() if line.startswith('error') and 'no image shows' not in line], (
        output
    )


def test_outlines_are_drawn_in_order_and_exactly(imported, tmp_path):
    """Polygons with whole coordinates are exact; a circle covers the pixels whose centres are in it."""
    expected = np.zeros((30, 40), np.uint8)
    expected[5:20, 5:25], expected[10:15, 20:30], expected[11:13, 24:27] = 1, 2, 0
    objects = (
        ('car', rectangle(5, 5, 25, 20)),
        ('tree', rectangle(20, 10, 30, 15)),
        ('Background', rectangle(24, 11, 27, 13)),
    )
    names = [*(name for name, _ in objects)]
    small_coco(tmp_path / 'export', *((name, [points]) for name, points in objects), names=names)
    code, output = imported('coco', '--val-fraction', 0)
    assert code == 0 and np.array_equal(read_mask(tmp_path / 'data/masks/a.png'), expected), output
    assert read_card(tmp_path / 'data/dataset.yaml').val_list is None
    labelme = tmp_path / 'labelme'
    pairs = [(name, 'rectangle', [points[4:6], points[:2]]) for name, points in objects[:2]]
    polygon = ('_background_', None, np.reshape(objects[2][1], (4, 2)).tolist())
    small_labelme(labelme, *pairs, (*polygon[:1], 'polygon', polygon[2]), ('tree', 'circle', [[10, 10], [13, 10]]))
    y, x = np.mgrid[:30, :40] + 0.5
    expected[np.hypot(x - 10, y - 10) <= 3] = 2
    code, output = imported('labelme', '--annotations', labelme, '--out', tmp_path / 'other', '--val-fraction', 0)
    assert code == 0 and np.array_equal(read_mask(tmp_path / 'other/masks/a.png'), expected), output


@pytest.mark.parametrize('mode', ('RGB', 'RGBA', 'P', 'L'))
def test_colours_without_background(imported, tmp_path, mode):
    """Masks of any kind of PNG; without a background in the table, every pixel is of a class or ignored."""
    mask = Image.fromarray(np.tile(np.uint8([[30, 60, 90, 90]]), (30, 10))).convert('RGB')
    mask = mask.quantize(4) if mode == 'P' else mask.convert(mode)
    write_photograph(tmp_path / 'photographs/sub/a.tif', np.zeros((30, 40, 3), np.uint8))
    (tmp_path / 'export').mkdir()
    mask.save(tmp_path / 'export/a.PNG')
    (tmp_path / 'export/labelmap.txt').write_text('\ufeffa:b: 30, 30, 30:x,y:act\n\nroad:60,60,60\nsky:90,90,90::\n')
    flags = ('--images', tmp_path / 'photographs', '--val-fraction', 0)
    for classes, values in (((), (1, 2, 3)), (('--classes', 'sky', 'a:b'), (2, 255, 1))):
        out = tmp_path / f'data{len(classes)}'
        code, output = imported('colors', *flags, *classes, '--out', out)
        expected = np.tile(np.uint8([[*values, values[2]]]), (30, 10))
        spec = read_card(out / 'dataset.yaml')
        assert code == 0 and np.array_equal(read_mask(out / 'masks/a.png', spec.class_colors), expected), output
        assert spec.background is None and spec.class_colors[bytes([90] * 3)] == values[2]


def test_tolerance_of_polygons(imported, scenes, tmp_path):
    """Polygons through the outermost pixels of a region: OpenCV fills it, the exact rule may miss its border."""
    images, annotations, regions = [], [], []
    for i, (image, mask) in enumerate(scenes):
        write_photograph(tmp_path / f'export/{i}.png', image)
        images.append((f'{i}.png', *mask.shape))
        contours = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        annotations.append((i, 'thing', [contour.ravel().tolist() for contour in contours]))
        regions.append(cv2.drawContours(np.zeros_like(mask), contours, -1, 1, -1))
    write_json(tmp_path / 'export/result.json', coco_content(images, annotations, ['thing']))
    for rasterizer in ('opencv', 'coco'):
        code, output = imported('coco', '--rasterizer', rasterizer, '--out', tmp_path / rasterizer)
        assert code == 0, output
    for i, region in enumerate(regions):
        assert np.array_equal(read_mask(tmp_path / f'opencv/masks/{i}.png'), region)
        exact = read_mask(tmp_path / f'coco/masks/{i}.png')
        square = np.ones((3, 3), np.uint8)
        assert (cv2.erode(region, square, borderValue=0) <= exact).all() and (exact <= cv2.dilate(region, square)).all()
        assert 0 < (exact != region).sum() < 0.1 * region.sum()


@pytest.mark.parametrize('polygons', (False, True))
def test_predictions_written_for_labelling_tools_come_back(imported, scenes, tmp_path, polygons):
    """Polygons along the borders of pixels are exact too."""
    legend = DATASETS['shapes'].legend(-1)
    writer = CocoWriter(legend, {f'{i}': f'{i}.png' for i in range(len(scenes))}, polygons)
    labels = [np.where(mask == 255, 0, mask) for _, mask in scenes]
    for i, (image, _) in enumerate(scenes):
        write_photograph(tmp_path / f'export/images/{i}.png', image)
        writer(f'{i}', torch.from_numpy(labels[i]), None)
    writer.write(tmp_path / 'export/instances.json')
    code, output = imported('coco', '--copy')
    spec = read_card(tmp_path / 'data/dataset.yaml')
    value_of = {name: value for value, name in spec.classes.items()}
    for i, truth in enumerate(labels):
        values = np.array([0, *(value_of.get(name, 99) for name in legend.names[1:])], np.uint8)
        assert code == 0 and np.array_equal(read_mask(tmp_path / f'data/masks/{i}.png'), values[truth]), output


def state(folder):
    return {path: (path.lstat().st_mtime_ns, path.read_bytes()) for path in folder.rglob('*') if path.is_file()}


def test_a_second_run_changes_nothing_and_a_changed_source_is_noticed(imported, scenes, tmp_path):
    WRITERS['labelme'](tmp_path / 'export', scenes)
    data, flags = tmp_path / 'data', ('--ignore', 'edge')
    assert imported('labelme', *flags)[0] == 0
    before = state(data)
    code, output = imported('labelme', *flags)
    assert code == 0 and state(data) == before and '0 masks written, 6 existed' in output
    (data / 'masks/scene 3.png').unlink()  # as after an interruption
    (data / 'images/scene 2.png').unlink(missing_ok=True)
    (data / 'dataset.yaml').unlink()
    code, output = imported('labelme', *flags)
    assert code == 0 and {p: c for p, (_, c) in state(data).items()} == {p: c for p, (_, c) in before.items()}
    assert '1 masks written, 5 existed' in output
    path = tmp_path / 'export/json/2.json'
    content = json.loads(path.read_text())
    del content['shapes'][-1]
    content['shapes'].append(
        {'label': content['shapes'][-1]['label'], 'points': [[0, 0], [9, 9]], 'shape_type': 'rectangle'}
    )
    write_json(path, content)
    before = state(data)
    code, output = imported('labelme', *flags)
    assert code == 1 and '1 of 6 files in' in output and 'now: scene 2.' in output and state(data) == before, output
    code, output = imported('labelme', *flags, '--overwrite')
    assert code == 0 and read_mask(data / 'masks/scene 2.png')[3, 3] not in (0, 255), output
    content['shapes'][0] |= {'label': 'aardvark', 'points': [[0, 0], [9, 9]], 'shape_type': 'rectangle'}
    write_json(path, content)
    code, output = imported('labelme', *flags)
    assert (
        code == 1
        and 'dataset.yaml has other classes than the annotations: 1 is ' in output
        and 'now aardvark' in output
    ), output
    photograph = tmp_path / 'export/photographs/scene 0.png'
    write_photograph(photograph, np.zeros((30, 40, 3), np.uint8))
    code, output = imported('labelme', *flags)
    assert code == 1 and f'photograph of {tmp_path / "export/json/0.json"} is' in output and 'is 40x30' in output, (
        output
    )


def test_photographs_of_one_name_and_copies(imported, tmp_path):
    folder = tmp_path / 'export'
    small_coco(folder, ('car', [rectangle(1, 1, 9, 9)]))
    content = coco_content(
        [('cam1/a.png', 30, 40), ('cam2/a.png', 30, 40), ('b.png', 30, 40), ('c.png', 30, 40)],
        [(0, 'car', [rectangle(1, 1, 9, 9)]), (1, 'car', [rectangle(2, 2, 9, 9)]), (2, 'car', None)], ['car'],
    )  # fmt: skip
    write_json(folder / 'annotations/instances_default.json', content)
    (folder / 'images/a.png').unlink()
    for name in ('cam1/a.png', 'cam2/a.png', 'b.png'):
        write_photograph(folder / 'images' / name, np.full((30, 40, 3), len(name), np.uint8))
    code, output = imported('coco', '--copy', '--val-fraction', 0.5)
    assert code == 0 and '1 annotations without outline' in output, output
    assert (
        '1 photographs without a class' in output and '1 images without objects, whose photographs are miss' in output
    )
    data = tmp_path / 'data'
    assert sorted(path.name for path in (data / 'images').iterdir()) == ['cam1_a.png', 'cam2_a.png']
    assert not (data / 'images/cam1_a.png').is_symlink()
    assert [int((read_mask(data / f'masks/cam{i}_a.png') == 1).sum()) for i in (1, 2)] == [64, 49]
    assert sorted((data / f'list/{split}.txt').read_text() for split in ('train', 'val')) == ['cam1_a\n', 'cam2_a\n']
    for _ in range(2):  # again, and into the folder of the export itself
        assert imported('coco', '--copy', '--val-fraction', 0.5)[0] == 0
        code, output = imported('coco', '--out', folder)
        assert code == 0 and (folder / 'images/cam1_a.png').is_symlink(), output
    code, output = imported('coco', '--keep-empty', '--out', tmp_path / 'all')
    assert code == 0 and not read_mask(tmp_path / 'all/masks/b.png').any(), output
    content['annotations'][0]['image_id'] = 2
    content['images'][0]['file_name'] = 'a.png'
    content['annotations'].append({**content['annotations'][1], 'id': 1, 'image_id': 0})
    write_json(folder / 'annotations/instances_default.json', content)
    code, output = imported('coco', '--out', tmp_path / 'third')
    assert code == 1 and 'several photographs that' in output and 'cam2/a.png' in output, output


def test_crowd_regions(imported, tmp_path):
    objects = [('car', [rectangle(1, 1, 9, 9)]), ('car', [rectangle(5, 5, 11, 11)])]  # the second is a crowd region
    small_coco(tmp_path / 'export', *objects)
    for crowd, *counts in (('draw', 84, 0), ('leave-out', 64, 0), ('ignore', 48, 36)):
        code, output = imported('coco', '--crowd', crowd, '--out', tmp_path / crowd)
        mask = read_mask(tmp_path / crowd / 'masks/a.png')
        assert code == 0 and [(mask == 1).sum(), (mask == 255).sum()] == counts, output
        assert ('1 crowd regions' in output) == (crowd != 'draw'), output


def test_hard_links_where_symbolic_ones_are_not_possible(imported, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, 'Operation not permitted')

    small_coco(tmp_path / 'export', ('car', [rectangle(1, 1, 9, 9)]))
    monkeypatch.setattr(Path, 'symlink_to', refuse)
    code, output = imported('coco')
    photograph = tmp_path / 'data/images/a.png'
    assert code == 0 and not photograph.is_symlink() and photograph.samefile(tmp_path / 'export/images/a.png'), output
    monkeypatch.setattr(os, 'link', refuse)
    code, output = imported('coco', '--out', tmp_path / 'other')
    assert code == 1 and 'cannot link' in output and '--copy' in output, output


def test_names_that_yaml_takes_for_other_things(imported, tmp_path, run_script):
    """Names reach the card as they are; a large photograph, and a mask of an earlier import, are noted."""
    names = ['no', '1', 'none', 'a: b', '#x', 'Größe, 大', '~', '1e3', '[car]', '- y', "it's", 'null', ' blank ']
    folder, size = tmp_path / 'export', (30, 1000, 3)
    write_photograph(folder / 'a.png', np.zeros(size, np.uint8))
    objects = [(0, name, [rectangle(9 * i, 2, 9 * i + 5, 9)]) for i, name in enumerate(names)]
    write_json(folder / 'instances.json', coco_content([('a.png', *size[:2])], objects, names))
    code, output = imported('coco', '--novel', '1', 'null')
    spec = read_card(tmp_path / 'data/dataset.yaml')
    assert code == 0 and spec.classes == {i: name.strip() for i, name in enumerate(names, 1)}, output
    assert spec.folds == ((2, 12),) and spec.min_pixels == 600 and 'scale_range: [0.43, 0.52]' in output
    (tmp_path / 'data/masks/b.png').write_bytes((tmp_path / 'data/masks/a.png').read_bytes())
    code, output = imported('coco', '--novel', '1', '2')
    assert code == 1 and "--novel '2'" in output
    code, output = imported('coco', '--novel', '1')
    assert code == 0 and 'has other novel classes: 1, null' in output and 'no photograph here: b' in output
