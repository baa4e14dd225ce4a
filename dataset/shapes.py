"""Embedded data set: drawn scenes in VOC's folder layout, made from a seed within seconds.

Each of the twenty classes is an outline (disc, star) with a fill (plain, striped, ...). Colours are random and do not
depend on the class; backgrounds are textured. The demo and the tests use this data, so they need no download. Objects
are dark and light on backgrounds of medium brightness, so that a network without pretrained weights learns the patterns
within minutes.

    python -m dataset.shapes --data-dir data/shapes
    python -m dataset.shapes --support photographs --class-name "plain disc"     # for utils.teach
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from core import IGNORE_INDEX
from core.errors import exits_cleanly
from dataset.classes import DATASETS
from dataset.lists import write_ids

TRAIN_IMAGES, VAL_IMAGES = 800, 100
# (outline, fill) of classes 1, 2, ..., which their names say
SHAPES = tuple(tuple(name.split()[::-1]) for name in DATASETS['shapes'].class_names)


def make_shapes(data_dir: str | Path, seed: int = 0, train_images: int = TRAIN_IMAGES, val_images: int = VAL_IMAGES):
    """Write images, masks and the two id lists.

    Args:
        data_dir: folder in which JPEGImages, SegmentationClassAug and list are made.
        seed: the same seed gives the same files.
        train_images, val_images: number of images.
    """
    spec = DATASETS['shapes']
    names = [f'train_{i:04d}' for i in range(train_images)] + [f'val_{i:04d}' for i in range(val_images)]
    folders = [Path(data_dir) / folder for folder in spec.folders('train')]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        # the first classes take turns, so that every class has enough images with any seed
        image, mask = draw_scene(np.random.default_rng((seed, i)), first_class=i % len(SHAPES) + 1)
        cv2.imwrite(str(folders[0] / f'{name}.jpg'), image[:, :, ::-1])
        cv2.imwrite(str(folders[1] / f'{name}.png'), mask)
    write_ids(spec.list_path('val', data_dir), names[train_images:])
    write_ids(spec.list_path('train', data_dir), names[:train_images])  # last: if it exists, the data are complete


def ensure_shapes(data_dir: str | Path):
    """Make the data set with its default settings if it is missing."""
    if not DATASETS['shapes'].list_path('train', data_dir).is_file():
        print(f'making the embedded data set in {data_dir}', flush=True)
        make_shapes(data_dir)


def make_support(folder: Path, class_name: str, count: int = 5, seed: int = 1):
    """Write photographs of one class with masks, as for `own_classes.find_support`.

    Args:
        folder: gets a folder with the name of the class.
        class_name: one of the data set's.
        count: number of photographs.
        seed: the same seed gives the same files.
    """
    class_id = DATASETS['shapes'].class_names.index(class_name) + 1
    (folder / class_name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, mask = draw_scene(np.random.default_rng((seed, i)), class_id)
        cv2.imwrite(str(folder / class_name / f'{i}.jpg'), image[:, :, ::-1])
        cv2.imwrite(str(folder / class_name / f'{i}.png'), (mask == class_id) * np.uint8(255))


def draw_scene(rng: np.random.Generator, first_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one to three objects on a textured background.

    Args:
        rng: source of all random choices.
        first_class: class id of the object in front; the other classes are random.

    Returns:
        RGB uint8 [H, W, 3], class ids uint8 [H, W] with 255 along the outlines.
    """
    height, width = (int(side) for side in rng.integers(80, 97, 2))
    image = _background(rng, height, width)
    mask = np.zeros((height, width), np.uint8)
    class_ids = [*rng.integers(1, len(SHAPES) + 1, rng.integers(3)).tolist(), first_class]
    for class_id in class_ids:
        outline, fill = SHAPES[class_id - 1]
        radius = rng.uniform(0.28, 0.45) * min(height, width)
        center = rng.uniform(0.75 * radius, (width - 0.75 * radius, height - 0.75 * radius))
        polygon = _outline(outline, rng.uniform(0, 2 * np.pi), radius) + center
        polygon = np.round(polygon).astype(np.int32)
        region = np.zeros_like(mask)
        cv2.fillPoly(region, [polygon], 1)
        texture = _texture(rng, fill, height, width)
        image[region == 1] = texture[region == 1]
        mask[region == 1] = class_id
        cv2.polylines(mask, [polygon], True, IGNORE_INDEX, 2)
    noise = rng.normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def _background(rng, height, width):
    """Two random colours blended by smooth noise of several scales, float [H, W, 3]."""
    blend = np.zeros((height, width))
    for cells in (3, 8, 20):
        blend += cv2.resize(rng.normal(size=(cells, cells)), (width, height), interpolation=cv2.INTER_CUBIC)
    blend = (blend - blend.min()) / np.ptp(blend)
    first, second = _tints(rng, 100, 150)
    return first + blend[:, :, None] * (second - first)


def _texture(rng, fill, height, width):
    """A fill of two random colours of different brightness for the whole scene, float [H, W, 3]."""
    first, second = rng.permutation(_tints(rng, 60, 200))
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width] + rng.uniform(0, 50, (2, 1, 1))
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    wave = lambda t, period: np.sin(t * (2 * np.pi / period))  # noqa: E731
    pattern = {
        'plain': lambda: np.zeros((height, width), bool),
        'pinstriped': lambda: wave(u, 6) > 0,
        'striped': lambda: wave(u, 18) > 0,
        'checked': lambda: wave(u, 9) * wave(v, 9) > 0,
        'tiled': lambda: wave(u, 26) * wave(v, 26) > 0,
        'dotted': lambda: wave(u, 9) + wave(v, 9) > 0.9,
        'spotted': lambda: wave(u, 20) + wave(v, 20) > 0.9,
        'netted': lambda: np.minimum(np.abs(wave(u, 20)), np.abs(wave(v, 20))) < 0.25,
        'speckled': lambda: rng.random((height, width)) < 0.5,
        'waved': lambda: wave(u + 4 * wave(v, 16), 12) > 0,
    }[fill]()
    return np.where(pattern[:, :, None], second, first)


def _tints(rng, *brightness):
    """One random colour for each mean brightness, float [N, 3] in 0..255."""
    tints = rng.uniform(-50, 50, (len(brightness), 3))
    return np.array(brightness)[:, None] + tints - tints.mean(1, keepdims=True)


def _outline(name, angle, radius):
    """Vertices of an outline around the origin, float [N, 2]."""
    corners = {'disc': 48, 'star': 10}[name]
    turn = angle + 2 * np.pi * np.arange(corners) / corners
    reach = np.full(corners, float(radius))
    if name == 'star':
        reach[1::2] *= 0.5
    return np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None]


@exits_cleanly
def main():
    parser = argparse.ArgumentParser(description='Make the embedded data set.')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--data-dir', type=Path, help='folder to make')
    what.add_argument('--support', type=Path, help='folder to make for utils.teach')
    names = DATASETS['shapes'].class_names
    parser.add_argument('--class-name', choices=names, default=names[0], help='with --support: the class')
    parser.add_argument('--seed', type=int, default=0, help='seed of all random choices (default: 0)')
    args = parser.parse_args()
    if args.support:
        make_support(args.support, args.class_name, seed=args.seed + 1)  # other scenes than the data set has
        print(f'photographs of {args.class_name} with masks in {args.support}')
    else:
        make_shapes(args.data_dir, args.seed)
        print(f'{TRAIN_IMAGES} training and {VAL_IMAGES} validation images in {args.data_dir}')


if __name__ == '__main__':
    main()
