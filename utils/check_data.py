"""Find everything that would stop a training run, in one pass over all images, masks and lists.

    python -m utils.check_data --dataset voc --data-dir VOC2012
    python -m utils.check_data --dataset coco --data-dir COCO --fold 0 --shot 1 5

Prints what the card of the data set says, with the defaults that it leaves, then one table of findings. The exit code
is 0 only if there is no `error`, which prevents training or makes its results wrong. A `note` tells what may be
intended.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from core.errors import InputError, exits_cleanly, some
from core.parallel import parallel_map
from dataset import DatasetSpec, FoldData
from dataset.cards import read_entries
from dataset.fewshot import base_shortage, support_shortage
from dataset.formats import jpeg_damage, palette_colors, read_file, read_picture
from dataset.images import Samples, read_header
from dataset.labels import ranges
from dataset.masks import wrong_values
from dataset.transforms import fit_factor
from utils.cli import BASE_SIZE, make_parser, not_negative, positive
from utils.data_flags import add_dataset_flags, check_data_flags

DEFAULT_SHOTS = (1, 5, 10)
TOLERATED = 0.7  # how much smaller than in training objects may be in evaluation without a note
FEW_LEFT_OVER = re.compile('Corrupt JPEG data: [0-9] extraneous bytes before marker 0xd9')  # some cameras write them


class Finding(NamedTuple):
    """One row of the table; `severity` is 'error' or 'note'."""

    severity: str
    subject: str
    text: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_dataset_flags(parser)
    parser.add_argument('--val-list', type=Path, help='evaluation ids (default: those of the card)')
    parser.add_argument('--fold', type=not_negative, nargs='+', help='folds whose lists are checked (default: all)')
    parser.add_argument(
        '--shot', type=positive, nargs='+',
        help='shots that training will use; default: 1 5 10, of which too few images are only noted',
    )  # fmt: skip
    parser.add_argument('--support-list', type=Path, metavar='FILE', help='support images that were chosen by hand')
    parser.add_argument('--workers', type=positive, help='processes (default: one per core)')
    args = parser.parse_args(argv)
    args.fold = args.fold or list(range(len(args.dataset.folds)))
    if args.support_list and len(args.fold) != 1:
        parser.error('--support-list names the support images of one fold; give one --fold')
    check_data_flags(parser, args, args.fold)
    args.test_list = args.dataset.tested().list_path('val', args.data_dir) if args.dataset.test_list else None
    return args


def explained(spec: DatasetSpec, args: argparse.Namespace) -> str:
    """Table of what a card says of a data set, with the defaults that it leaves, and where it says so."""
    lines = {key: f'line {entry.line}' for key, entry in read_entries(spec.card).items()}
    folders = [dict.fromkeys(str(args.data_dir / f) for f in kind.values()) for kind in (spec.images, spec.masks)]
    novel = [f'fold {fold}: {some((spec.classes[c] for c in ids), 6)}' for fold, ids in enumerate(spec.folds)]
    rows = {
        'name': spec.name,
        'names': some((f'{class_id} {name}' for class_id, name in spec.classes.items()), 8),
        'background': 'none: every pixel is of a class or ignored' if spec.background is None else spec.background,
        'ignore': ranges(spec.ignore) or 'nothing',
        'folds' if 'folds' in lines else 'novel': '\n'.join(novel) or 'none: only --fold -1 can be used',
        'images': '\n'.join(folders[0]),
        'masks': '\n'.join(folders[1]),
        'train': args.train_list,
        'val': args.val_list or 'none: nothing is validated, and the last checkpoint is kept',
        'test': args.test_list or 'test.py evaluates val',
        'scale_range': '{} to {} times the original size, in training'.format(*spec.scale_range),
        'min_pixels': f'{spec.min_pixels} of a class make an image one of its support images',
        'batch_size': f'{spec.batch_size} in stage 1',
        'lists_in_data': 'paths of lists start from ' + ('--data-dir' if spec.lists_in_data else 'the card'),
        'hint': spec.hint,
        'palette': spec.palette if isinstance(spec.palette, str) else f'{len(spec.palette)} own colours, else spread',
    }
    table = [[key, value, lines.get(key, 'default')] for key, value in rows.items()]
    return f'{spec.card}:\n\n' + tabulate(table, ['key', 'value', 'from'], 'simple', disable_numparse=True)


class Examined(NamedTuple):
    """What was found in an image and its mask.

    Attributes:
        error: message, or ''.
        pixels: of each mask value, int64 [256]; zeros if the image or its mask cannot be read.
        size: (width, height) of the image; zeros if it cannot be read.
        rotated: it has an EXIF orientation.
        leftover: a few bytes are left over at the end of a JPEG.
        palette: RGB bytes of the mask's palette; b'' if it is greyscale.
    """

    error: str
    pixels: np.ndarray
    size: tuple[int, int] = (0, 0)
    rotated: bool = False
    leftover: bool = False
    palette: bytes = b''


def examine(image_id: str, samples: Samples) -> Examined:
    """Read one image and its mask as training does, and look for damage that decoders pass over."""
    try:
        image_path = samples.image_path(image_id)
        _, values = samples.read_values(image_id)
        if error := wrong_values(samples.mask_path(image_id), values, samples.table):
            raise error
        rotated = read_header(image_path)[1] != 1
        damage = jpeg_damage(read_file(image_path, 'image'))
        palette = read_picture(read_file(samples.mask_path(image_id), 'mask')).palette
    except InputError as error:
        return Examined(str(error), np.zeros(256, np.int64))
    leftover = bool(FEW_LEFT_OVER.fullmatch(damage))
    error = ''
    if damage and not leftover:
        error = f'image {image_path} is damaged ({damage}), so that a part of it shows something else. Copy it again.'
    return Examined(error, np.bincount(values.ravel(), minlength=256), values.shape[::-1], rotated, leftover, palette)


def check_split(split: str, data: FoldData, workers: int | None) -> tuple[list[Finding], list[str], list[Examined]]:
    """Examine every image of a split's list.

    Args:
        split: 'train', 'val', or 'test', for which `data` has the test split in place of 'val'.
        data: any fold.
        workers: number of processes; None: one per usable core.

    Returns:
        Findings, image ids, and what was found in each of them.
    """
    of_data = 'train' if split == 'train' else 'val'
    ids = data.ids(of_data)
    if not ids:  # there is no validation list
        return [], [], []
    samples = data.samples(of_data, novel_as_background=True)
    results = parallel_map(partial(examine, samples=samples), ids, f'examining {split} images', workers)
    findings = [Finding('error', f'{split} {i}', r.error) for i, r in zip(ids, results, strict=True) if r.error]
    pixels = np.array([result.pixels for result in results])
    spec = data.spec
    nothing = [] if spec.background is None else [spec.background]
    background, classes, ignored = (pixels[:, v].any(axis=1) for v in (nothing, list(spec.classes), list(spec.ignore)))
    values = ranges(spec.ignore)
    for subject, which, text in (
        ('images', [r.rotated for r in results],
         'have an EXIF orientation, so their masks must match them as displayed: {}; the size of a mask does not show '
         'a rotation by 180 degrees'),
        ('images', [r.leftover for r in results],
         'have a few bytes too many at their end, as some cameras write them, or after slight damage: {}'),
        ('masks', background & ~classes & ~ignored, 'show background only: {}'),
        ('masks', background & ~classes & ignored,
         f'hold no class, only {spec.background} and {values}, which are background and ignored pixels: {{}}. If '
         f'{values} marks objects, store their class ids instead'),
        ('masks', ~background & ~classes & ignored,
         f'hold {values} only, so that all of their pixels are ignored and none is counted: {{}}'),
    ):  # fmt: skip
        if chosen := [image_id for image_id, chosen in zip(ids, which, strict=True) if chosen]:
            findings.append(Finding('note', f'{split} {subject}', f'{len(chosen)} {text.format(some(chosen))}'))
    return findings, ids, results


def check_scales(spec: DatasetSpec, results: Sequence[Examined]) -> list[Finding]:
    """Find photographs that evaluation shrinks much more than training does."""
    factors = [fit_factor(result.size[::-1], BASE_SIZE) for result in results if min(result.size)]
    factor, (low, high) = float(np.median(factors or [1.0])), spec.scale_range
    if not factors or factor >= low * TOLERATED:
        return []
    text = (
        f'evaluation shrinks by {factor:.2g} (median, to {BASE_SIZE[0]}x{BASE_SIZE[1]}), training resizes by {low:g} '
        f'to {high:g}, so objects differ in scale; scale_range: [{0.9 * factor:.2g}, {1.1 * factor:.2g}] makes them '
        'alike, and --slide evaluates in windows'
    )
    return [Finding('note', 'scale_range', text)]


def check_palettes(ids: Sequence[str], results: Sequence[Examined]) -> list[Finding]:
    """Find palettes that a tool has reordered: a colour then has one value in some masks, and another in others."""
    first, differing = {}, {}
    for image_id, result in zip(ids, results, strict=True):
        colors = palette_colors(result.palette)
        for value in np.flatnonzero(result.pixels[: len(colors)]).tolist():
            if colors.count(colors[value]) == 1:  # other colours tell nothing
                earlier = first.setdefault(colors[value], (value, image_id))
                if earlier[0] != value:
                    differing.setdefault(image_id, (colors[value], value, *earlier))
    if not differing:
        return []
    color, value, other, other_id = next(iter(differing.values()))
    text = (
        f'{len(differing)} have palettes in another order: {some(differing)}. The colour {tuple(color)} is the value '
        f'{other} in {other_id}, but {value} there. If a tool has reordered palettes, the values are no class ids: '
        'export the masks again. Otherwise save them as greyscale PNG.'
    )
    return [Finding('error', 'masks', text)]


def check_classes(
    spec: DatasetSpec, pixels: np.ndarray, shots: Sequence[int], chosen: Collection[int] = ()
) -> list[Finding]:
    """Find classes without an image, which stage 2 refuses, and classes with fewer images than a shot count.

    Args:
        spec: the dataset.
        pixels: number of pixels of each mask value in the training images, int64 [N, 256].
        shots: numbers of support images per class.
        chosen: class ids whose support images are chosen by hand.
    """
    usable, areas = (pixels >= spec.min_pixels).sum(axis=0), pixels.sum(axis=1)
    read = areas[areas > 0]
    share = f' ({spec.min_pixels / np.median(read):.1%} of the median image)' if len(read) else ''
    least = f'{spec.min_pixels} pixels{share}'
    unread = f'; {len(areas) - len(read)} images cannot be read and are not counted' if len(read) < len(areas) else ''
    findings, drawn = [], {c: name for c, name in spec.classes.items() if c not in chosen}
    if none := [name for c, name in drawn.items() if not usable[c]]:
        text = f'no image shows >= {least} of {some(none, 8)}; add images, or lower min_pixels{unread}'
        findings.append(Finding('error', 'classes', text))
    for shot in shots:
        few = [f'{name} ({usable[c]})' for c, name in drawn.items() if 0 < usable[c] < shot]
        if few:
            text = f'{len(few)} classes have fewer than {shot} images with >= {least}: {some(few, 8)}{unread}'
            findings.append(Finding('note', f'{shot}-shot', text))
    return findings


def check_draws(
    spec: DatasetSpec,
    fold: int,
    ids: Sequence[str],
    pixels: np.ndarray,
    shots: Sequence[int],
    severity: str,
    draws_support: bool = True,
) -> list[Finding]:
    """Draw base images as stage 2 does, and support images as gen_fs_list does, which refuse classes with too few.

    Args:
        spec: the dataset.
        fold: of the classes.
        ids: training images.
        pixels: number of pixels of each mask value in them, int64 [N, 256].
        shots: images per class.
        severity: of a failed draw.
        draws_support: whether support images are drawn; otherwise they were chosen by hand.
    """

    def usable(classes):  # by name, for the messages: a draw of base images does not depend on the keys
        return {spec.classes[c]: [ids[i] for i in np.flatnonzero(pixels[:, c] >= spec.min_pixels)] for c in classes}

    base, novel = usable(spec.base_ids(fold)), usable(spec.novel_ids(fold) if draws_support else ())
    findings = []
    for shot in shots if all([*base.values(), *novel.values()]) else ():  # `check_classes` finds empty classes
        for shortage in (base_shortage(base, shot), support_shortage(novel, shot)):
            if shortage:
                text = shortage if severity == 'error' else f'{shortage} (An error with --shot {shot}.)'
                findings.append(Finding(severity, f'fold {fold}, {shot}-shot', text))
    return findings


def check_lists(data: FoldData, shots: Sequence[int]) -> list[Finding]:
    """Check that the existing lists of a fold fit the data. Training and gen_fs_list make the missing ones."""
    findings = []
    subject = f'fold {data.fold} lists'
    if data.lists.train.is_file():
        try:
            findings += [Finding('note', subject, note) for note in data.ensure_lists()]
        except InputError as error:
            findings.append(Finding('error', subject, str(error)))
    if data.support_list:
        try:
            data.checked_supports(shots[0], 0)
        except InputError as error:
            findings.append(Finding('error', 'supports', str(error)))
    for shot in shots:
        for path in sorted(data.lists.support(shot, 0).parent.glob(f'fold{data.fold}_{shot}shot_seed*.txt')):
            drawn = re.fullmatch(r'.*_seed(\d+)(_nested)?', path.stem)
            if not drawn:
                continue
            of_draw, seed = replace(data, nested=bool(drawn[2]), support_list=None), int(drawn[1])
            try:
                of_draw.checked_supports(shot, seed)
                old = of_draw.outdated_supports(shot, seed)
            except InputError as error:
                findings.append(Finding('error', path.name, str(error)))
                continue
            if old:
                text = f'{some(old)} are not in the class lists any more; to draw again: gen_fs_list --overwrite'
                findings.append(Finding('note', path.name, text))
    return findings


@exits_cleanly
def main(args: argparse.Namespace):
    spec = args.dataset
    print(f'{explained(spec, args)}\n')
    all_classes = FoldData(spec, args.data_dir, -1, args.train_list, args.val_list)
    findings, train_ids, train = check_split('train', all_classes, args.workers)
    val_ids, val = [], []
    splits = {'val': all_classes}
    if spec.test_list:
        splits['test'] = FoldData(spec.tested(), args.data_dir, -1, args.train_list, args.test_list)
    for split, data in splits.items():
        split_findings, ids, results = check_split(split, data, args.workers)
        findings, val_ids, val = findings + split_findings, val_ids + ids, val + results
    findings += check_palettes(train_ids + val_ids, train + val) + check_scales(spec, val)
    pixels = np.array([result.pixels for result in train])
    if shared := sorted(set(train_ids) & set(val_ids)):
        text = f'{len(shared)} ids are in both lists, so training would use evaluation images: {some(shared)}'
        findings.append(Finding('error', 'lists', text))
    readable = not any(severity == 'error' for severity, *_ in findings)
    shots, of_shots = args.shot or DEFAULT_SHOTS, 'error' if args.shot else 'note'
    findings += check_classes(spec, pixels, shots, spec.novel_ids(args.fold[0]) if args.support_list else ())
    seen = sum(result.pixels for result in val)  # 0 without a validation list
    if unseen := val and [name for c, name in spec.classes.items() if not seen[c]]:
        text = f'no evaluation image shows {some(unseen, 8)}: the IoU of such a class is undefined, or 0 if predicted'
        findings.append(Finding('note', 'classes', text))
    if not spec.folds:
        text = 'none is novel, so there is only stage 1, with --fold -1; to name some: novel: [...]'
        findings.append(Finding(of_shots, 'classes', text))
    for fold in args.fold:
        findings += check_draws(spec, fold, train_ids, pixels, shots, of_shots, not args.support_list)
    if readable:  # the check of the lists reads the masks
        for fold in args.fold:
            lists = (args.data_dir, fold, args.train_list, args.val_list)
            findings += check_lists(FoldData(spec, *lists, support_list=args.support_list), shots)
    errors = sum(severity == 'error' for severity, *_ in findings)
    width = max((len(subject) for _, subject, _ in findings), default=0)
    for severity, subject, text in findings:
        print(f'{severity:<5}  {subject:<{width}}  {text}')
    counted = f'{len(train_ids)} training and {len(val_ids)} evaluation images'
    notes = len(findings) - errors
    print(f'{counted}: {errors} error{"s" * (errors != 1)}, {notes} note{"s" * (notes != 1)}')
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    main(parse_args())
