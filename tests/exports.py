"""Exports of annotation tools that tests share."""

import base64
import json

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from dataset import DATASETS
from dataset.legend import spread_palette

NAMES = {0: 'background', 255: 'edge'} | DATASETS['shapes'].classes
SUFFIXES = ('.png', '.tif', '.PNG', '.tiff', '.png', '.TIF')  # of lossless photographs
SPLITS = ('train', 'valid', 'train', 'train', 'valid', 'train')


def write_photograph(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix.lower(), image[:, :, ::-1])[1].tobytes())


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_content(images, annotations, names):
    """An instances file: images are (file name, height, width), annotations (image number, name, segmentation)."""
    category = {name: 10 + 7 * i for i, name in enumerate(names)}
    return {
        'categories': [{'id': 0, 'name': names[0]}, *({'id': i, 'name': name} for name, i in category.items())],
        'images': [{'id': i, 'file_name': n, 'height': h, 'width': w} for i, (n, h, w) in enumerate(images)],
        'annotations': [
            {'id': 90 + k, 'image_id': image, 'category_id': category[name], 'segmentation': outline, 'iscrowd': k % 2}
            for k, (image, name, outline) in enumerate(annotations)
        ],
    }  # fmt: skip


def write_coco(folder, scenes):
    """As Roboflow: a folder for each split, and a category without annotations that has the name of another."""
    for split in set(SPLITS):
        images, annotations = [], []
        for i, (image, mask) in enumerate(scenes):
            if SPLITS[i] == split:
                write_photograph(folder / split / f'scene {i}{SUFFIXES[i]}', image)
                for value in np.unique(mask[mask > 0]):
                    runs = coco_mask.encode(np.asfortranarray(mask == value).astype(np.uint8))
                    outline = {'size': list(mask.shape), 'counts': runs['counts'].decode()}
                    annotations.append((len(images), NAMES[value], outline))
                images.append((f'upload\\1/scene {i}{SUFFIXES[i]}', *mask.shape))
        write_json(folder / split / '_annotations.coco.json', coco_content(images, annotations, list(NAMES.values())))


def labelme_mask(region):
    y, x = np.argwhere(region).min(0).tolist(), np.argwhere(region).max(0).tolist()
    crop = region[y[0] : x[0] + 1, y[1] : x[1] + 1].astype(np.uint8)
    return [[y[1], y[0]], [x[1], x[0]]], base64.b64encode(cv2.imencode('.png', crop)[1]).decode()


def write_labelme(folder, scenes):
    """A mask shape for each class, with a point and a line that have no area; some photographs are embedded."""
    for i, (image, mask) in enumerate(scenes):
        shapes = [{'label': 'star', 'points': [[3, 4]], 'shape_type': 'point', 'group_id': 1}]
        for value in np.unique(mask[mask > 0]):
            points, picture = labelme_mask(mask == value)
            shapes.append({'label': NAMES[value], 'points': points, 'shape_type': 'mask', 'mask': picture})
        photograph = folder / 'photographs' / f'scene {i}{SUFFIXES[i]}'
        write_photograph(photograph, image)
        content = {'version': '5', 'shapes': shapes, 'imagePath': f'..\\photographs\\{photograph.name}'}
        content |= {'imageHeight': mask.shape[0], 'imageWidth': mask.shape[1], 'imageData': None}
        if i % 2:
            content['imageData'] = base64.b64encode(photograph.read_bytes()).decode()
            photograph.unlink()
        if i == 1:
            content |= {'imageHeight': None, 'imageWidth': None}
        write_json(folder / 'json' / f'{i}.json', content)
    write_json(folder / 'json' / 'settings.json', {'theme': 'dark'})


def write_colors(folder, scenes):
    """As CVAT, with lists of its subsets; every other mask is a palette PNG."""
    palette, inside = spread_palette(), set(SPLITS)
    table = [
        f'{name}:{",".join(map(str, [0] * 3 if value == 0 else palette[value]))}::' for value, name in NAMES.items()
    ]
    folder.mkdir()
    (folder / 'labelmap.txt').write_text('\n'.join(['# label:color_rgb:parts:actions', *table]))
    palette = np.where(np.arange(256)[:, None] == 0, 0, palette).astype(np.uint8)
    for i, (image, mask) in enumerate(scenes):
        write_photograph(folder / 'JPEGImages' / f'scene {i}{SUFFIXES[i]}', image)
        write_photograph(folder / 'SegmentationClass' / f'scene {i}.png', palette[mask])
    for split in inside:
        path = folder / 'ImageSets' / 'Segmentation' / f'{split}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(f'scene {i}\n' for i in range(len(scenes)) if SPLITS[i] == split))


WRITERS = {'coco': write_coco, 'labelme': write_labelme, 'colors': write_colors}


def small_coco(folder, *outlines, names=('car', 'tree'), file_name='a.png', **image):
    """An export of one photograph, 40x30, with (name, segmentation) of its objects."""
    write_photograph(folder / 'images/a.png', np.zeros((30, 40, 3), np.uint8))
    content = coco_content([(file_name, 30, 40)], [(0, *outline) for outline in outlines], list(names))
    content['images'][0] |= image
    write_json(folder / 'annotations/instances_default.json', content)
    return content


def small_labelme(folder, *shapes, **fields):
    """The same for labelme, with (label, type, points) of the shapes."""
    write_photograph(folder / 'a.png', np.zeros((30, 40, 3), np.uint8))
    shapes = [{'label': label, 'shape_type': kind, 'points': points} for label, kind, points in shapes]
    content = {'shapes': shapes, 'imagePath': 'a.png', 'imageHeight': 30, 'imageWidth': 40, 'imageData': None} | fields
    write_json(folder / 'a.json', content)
    return content


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]
