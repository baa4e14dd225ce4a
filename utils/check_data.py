"""Find what a training run would trip over, in one pass over all images, masks and lists.

    python -m utils.check_data --dataset voc --data-dir VOC2012
    python -m utils.check_data --dataset coco --data-dir COCO --fold 0 --shot 1 5

Prints one table of findings. Exit code 0 only if training can start: a finding marked `note` does not stand in its way,
one marked `error` does.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from core.errors import InputError, exits_cleanly, some
from core.parallel import parallel_map
from dataset import DATASETS, FoldData
from dataset.images import read_header
from dataset.lists import read_ids
from utils.cli import check_folds, fill_lists, make_parser, not_negative, positive


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('--dataset', choices=list(DATASETS), default='voc')
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--train-list', '--list', type=Path, help='training ids; the other lists are beside it')
    parser.add_argument('--val-list', type=Path, help='evaluation ids (default: val.txt beside the train list)')
    parser.add_argument('--fold', type=not_negative, nargs='+', help='folds whose lists are checked (default: all)')
    parser.add_argument('--shot', type=positive, nargs='+', default=[1, 5, 10])
    parser.add_argument('--workers', type=positive, help='processes (default: one per core)')
    args = parser.parse_args(argv)
    spec = DATASETS[args.dataset]
    args.fold = args.fold or list(range(len(spec.folds)))
    check_folds(parser, spec, args.fold)
    fill_lists(args, spec)
    return args


def examine(image_id, samples):
    """Read one image and its mask as training would.

    Returns:
        tuple: what is wrong (None where nothing is); the pixels of each class id, int64 [256]; whether the image is
        displayed otherwise than it is stored.
    """
    try:
        _, mask = samples.read(image_id)
        turned = read_header(samples.image_path(image_id))[1] != 1
    except InputError as error:
        return str(error), np.zeros(256, np.int64), False
    return None, np.bincount(mask.ravel(), minlength=256), turned


def check_split(split, data, workers):
    """Examine every image of a split's list.

    Args:
        split (str): 'train' or 'val'.
        data (FoldData): of fold -1, whose labels are the class ids.
        workers (int, optional): processes.

    Returns:
        tuple: findings as (severity, subject, text), ids, pixel counts int64 [N, 256].
    """
    ids = read_ids(getattr(data, f'{split}_list'), data.spec.mend)
    samples = data.samples(split, novel_as_background=True)
    results = parallel_map(partial(examine, samples=samples), ids, f'examining {split} images', workers)
    findings = [('error', f'{split} {i}', what) for i, (what, *_) in zip(ids, results, strict=True) if what]
    pixels = np.array([counts for _, counts, _ in results])
    readable = np.array([what is None for what, *_ in results])
    if turned := [i for i, (*_, is_turned) in zip(ids, results, strict=True) if is_turned]:
        text = (
            f'{len(turned)} have an EXIF orientation, so that their masks must fit them as displayed: {some(turned)}; '
            'sizes do not show a turn by 180 degrees'
        )
        findings.append(('note', f'{split} images', text))
    empty = [i for i, shown in zip(ids, pixels[:, 1:255].any(axis=1) | ~readable, strict=True) if not shown]
    if empty:
        findings.append(('note', f'{split} masks', f'{len(empty)} show background only: {some(empty)}'))
    return findings, ids, pixels


def check_classes(spec, pixels, shots):
    """Classes with too few images for a shot count, or none, which stage 2 refuses."""
    usable = (pixels >= spec.min_pixels).sum(axis=0)
    findings = []
    if none := [name for c, name in enumerate(spec.class_names, 1) if not usable[c]]:
        text = f'no image shows >= {spec.min_pixels} pixels of {some(none, 8)}; add images, or lower min_pixels'
        findings.append(('error', 'classes', text))
    for shot in shots:
        few = [f'{name} ({usable[c]})' for c, name in enumerate(spec.class_names, 1) if 0 < usable[c] < shot]
        if few:
            text = f'{len(few)} classes have fewer than {shot} images with >= {spec.min_pixels} pixels: {some(few, 8)}'
            findings.append(('note', f'{shot}-shot', text))
    return findings


def check_lists(data, shots):
    """Lists of one fold that exist: do they fit the data? Missing ones are made by training and gen_fs_list."""
    findings = []

    def attempt(subject, check):
        try:
            return check()
        except InputError as error:
            findings.append(('error', subject, str(error)))

    subject = f'fold {data.fold} lists'
    if data.lists.train.is_file():
        findings += [('note', subject, note) for note in attempt(subject, data.ensure_lists) or ()]
    for shot in shots:
        for path in sorted(data.lists.support(shot, 0).parent.glob(f'fold{data.fold}_{shot}shot_seed*.txt')):
            seed = path.stem.rpartition('seed')[2]
            attempt(path.name, partial(data.support_ids, shot, seed))
    return findings


@exits_cleanly
def main(args):
    spec = DATASETS[args.dataset]
    everything = FoldData(spec, args.data_dir, -1, args.train_list, args.val_list)
    findings, train_ids, pixels = check_split('train', everything, args.workers)
    more, val_ids, _ = check_split('val', everything, args.workers)
    findings += more
    if shared := sorted(set(train_ids) & set(val_ids)):
        findings.append(
            ('error', 'lists', f'{len(shared)} ids are in both lists, training on test images: {some(shared)}')
        )
    readable = not any(severity == 'error' for severity, *_ in findings)
    findings += check_classes(spec, pixels, args.shot)
    if readable:  # lists are checked against masks that can be read
        for fold in args.fold:
            findings += check_lists(FoldData(spec, args.data_dir, fold, args.train_list, args.val_list), args.shot)
    errors = sum(severity == 'error' for severity, *_ in findings)
    width = max((len(subject) for _, subject, _ in findings), default=0)
    for severity, subject, text in findings:
        print(f'{severity:<5}  {subject:<{width}}  {text}')
    counted = f'{len(train_ids)} training and {len(val_ids)} evaluation images'
    print(f'{counted}: {errors} errors, {len(findings) - errors} notes')
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    main(parse_args())
