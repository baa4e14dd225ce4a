"""Time the class lists of all four folds of PASCAL-5i: one parallel pass, against a pass per fold on one core.

    python benchmarks/class_index.py --data-dir VOC2012          # or without --data-dir, on 600 made masks

The plain way reads every mask with OpenCV for every fold, and calls np.unique and a sum per class found. Both sides are
timed in turn, `--rounds` times; medians are printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DATASETS
from dataset.images import Samples
from dataset.labels import label_table
from dataset.lists import FoldLists, ensure_class_lists, write_ids
from dataset.shapes import draw_scene

SPEC = DATASETS['voc']


def plain_pass(samples: Samples, ids: list[str], fold: int) -> tuple[list[str], dict[int, list[str]]]:
    """A fold's training list and lists by class id, made the plain way."""
    lists = {class_id: [] for class_id in range(1, 21)}
    training = []
    base = set(SPEC.base_ids(fold))
    for image_id in ids:
        mask = cv2.imread(str(samples.mask_path(image_id)), cv2.IMREAD_UNCHANGED)
        found = [int(value) for value in np.unique(mask) if value not in (0, 255)]
        if base.intersection(found):
            training.append(image_id)
        for class_id in found:
            if np.sum(mask == class_id) >= SPEC.min_pixels and class_id in lists:
                lists[class_id].append(image_id)
    return training, lists


def our_pass(samples: Samples, ids: list[str]) -> list[str]:
    """Write the same lists of all four folds; returns the training list of the last fold."""
    with tempfile.TemporaryDirectory() as folder:
        train_list = Path(folder) / 'trainaug.txt'
        write_ids(train_list, ids)
        for fold in range(4):
            lists = FoldLists(train_list.parent, fold)
            ensure_class_lists(SPEC, samples, train_list, lists)
        return lists.train.read_text().split()


def make_samples(folder: Path, count: int) -> tuple[Path, Path]:
    """Write scenes of VOC's size; returns the folders of images and masks."""
    for i in range(count):
        image, mask = draw_scene(np.random.default_rng(i), i % 20 + 1)
        cv2.imwrite(str(folder / f'{i:04d}.jpg'), cv2.resize(image, (500, 375)))
        cv2.imwrite(str(folder / f'{i:04d}.png'), cv2.resize(mask, (500, 375), interpolation=cv2.INTER_NEAREST))
    return folder, folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, help='VOC layout')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if args.data_dir:
            folders = [args.data_dir / folder for folder in SPEC.folders('train')]
        else:
            folders = make_samples(Path(made), 600)
        samples = Samples(*folders, label_table(SPEC.base_ids(-1), (), True))
        ids = sorted(path.stem for path in folders[1].glob('*.png'))
        plain, ours = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            for fold in range(4):
                training, _ = plain_pass(samples, ids, fold)
            plain.append(time.perf_counter() - start)
            start = time.perf_counter()
            made_list = our_pass(samples, ids)
            ours.append(time.perf_counter() - start)
    same = 'the same' if made_list == training else 'different (OpenCV reads palettes as colours, so ids are lost)'
    plain_s, ours_s = statistics.median(plain), statistics.median(ours)
    print(f'{len(ids)} masks, four folds: plain {plain_s:.2f} s, ours {ours_s:.2f} s, ratio {plain_s / ours_s:.1f}')
    print(f'training list of fold 3: {same}')


if __name__ == '__main__':
    main()
