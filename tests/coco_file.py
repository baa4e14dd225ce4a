"""A small COCO instances file that tests share."""

import copy

from dataset import DATASETS

NAMES = DATASETS['coco'].class_names
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]
CROWD = {'size': [30, 40], 'counts': [0, 1200]}


def small_file():
    """Content of a file with all kinds of annotations; the categories are in another order than the class ids."""
    images = [{'id': i, 'file_name': f'{i}.jpg', 'height': 30, 'width': 40} for i in (12, 3, 7, 9)]
    categories = [{'id': 1000 - i, 'name': name} for i, name in reversed(list(enumerate(NAMES)))]
    dog, toothbrush = 1000 - NAMES.index('dog'), 1000 - NAMES.index('toothbrush')
    annotations = [
        {'id': 501, 'image_id': 12, 'category_id': toothbrush, 'segmentation': SQUARE, 'iscrowd': 0},
        {'id': 502, 'image_id': 3, 'category_id': dog, 'segmentation': CROWD, 'iscrowd': 1},  # crowd only: no mask
        {'id': 503, 'image_id': 7, 'category_id': dog, 'segmentation': CROWD, 'iscrowd': 1},
        {'id': 504, 'image_id': 7, 'category_id': dog, 'segmentation': SQUARE, 'iscrowd': 0},
    ]
    return copy.deepcopy({'images': images, 'annotations': annotations, 'categories': categories})
