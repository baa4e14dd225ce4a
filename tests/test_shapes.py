"""The embedded data set."""

import cv2
import numpy as np

from dataset.masks import read_mask
from dataset.shapes import make_shapes


def test_shapes_are_a_function_of_the_seed(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        make_shapes(tmp_path / name, seed, train_images=4, val_images=2)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob('*.*')) for n in 'abc']
    assert files[0] == files[1] == files[2] and len(files[0]) == 14
    same = [(tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files[0]]
    other = [
        (tmp_path / 'a' / f).read_bytes() == (tmp_path / 'c' / f).read_bytes() for f in files[0] if f.suffix != '.txt'
    ]
    assert all(same) and not any(other)


def test_shapes_have_every_class_ignored_outlines_and_colours_independent_of_the_class(shapes):
    ids = (shapes / 'list' / 'trainaug.txt').read_text().split()
    colours = {}
    for image_id in ids:
        mask = read_mask(shapes / f'SegmentationClassAug/{image_id}.png')
        image = cv2.imread(str(shapes / f'JPEGImages/{image_id}.jpg')).astype(float)
        assert 255 in mask and 0 in mask
        for class_id in set(np.unique(mask)) - {0, 255}:
            colours.setdefault(int(class_id), []).append(image[mask == class_id].mean(0))
    assert sorted(colours) == list(range(1, 21))
    assert min(len(means) for means in colours.values()) >= 6
    # a nearest-mean classifier of the objects' mean colours is hardly better than chance (5 %)
    right = 0
    for class_id, means in colours.items():
        for i, colour in enumerate(means):
            centers = {
                other: np.mean([m for j, m in enumerate(theirs) if (other, j) != (class_id, i)], axis=0)
                for other, theirs in colours.items()
            }
            right += min(centers, key=lambda c: np.linalg.norm(colour - centers[c])) == class_id
    assert right / sum(map(len, colours.values())) < 0.15
