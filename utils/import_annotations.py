"""Make a data set of one's own, with its card, from what annotation tools export.

    python -m utils.import_annotations --format coco --annotations export --out street --novel scooter
    python -m utils.import_annotations --format labelme --annotations folder --out street
    python -m utils.import_annotations --format colors --annotations export --out street

coco: COCO instances files, or folders of an export with them (CVAT, Label Studio, Roboflow, Supervisely).
labelme: labelme's JSON files. colors: a folder with labelmap.txt and colour masks in SegmentationClass, as CVAT's
"Segmentation mask" export.

Writes OUT/images (links), OUT/masks (8-bit palette PNG), OUT/list and OUT/dataset.yaml, which --dataset OUT then names.
Later objects cover earlier ones. All annotations are checked before anything is written. Existing files are kept, so
you can run the same command again after an interruption, or with more annotations; files that differ from what the
annotations give are reported.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from tabulate import tabulate

from core import IGNORE_INDEX
from core.errors import InputError, exits_cleanly, some
from core.files import atomic_write, check_writable
from core.names import files_by_id
from core.parallel import parallel_map
from dataset.annotations.imported import Classes, apply_crowd, choose_classes, draw
from dataset.annotations.labelme import embedded_photograph
from dataset.annotations.outlines import RASTERIZERS
from dataset.annotations.photographs import unique_ids
from dataset.annotations.sources import READERS, Export, Source, check_photographs
from dataset.annotations.splitting import choose_evaluation, on_one_side
from dataset.cards import FILE_NAME, read_card
from dataset.classes import DATASETS
from dataset.formats import SUFFIXES
from dataset.lists import check_ids, keep_or_write_ids, read_ids
from dataset.masks import read_mask, save_palette_png
from utils.cli import BASE_SIZE, make_parser, not_negative, positive
from utils.preparation import place_photograph

SHRUNK = 0.7  # by which evaluation shrinks photographs, and less, is worth a note
PART_OF_IMAGE = 0.02  # that a class covers in its support images, by default


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--format', choices=READERS, required=True, help='of the annotations')
    parser.add_argument('--annotations', type=Path, nargs='+', required=True, help='files, or the folder of an export')
    parser.add_argument('--images', type=Path, help='folder of the photographs, if they are not with the annotations')
    parser.add_argument('--out', type=Path, required=True, help='folder to make, or to complete')
    group = parser.add_argument_group('classes')
    group.add_argument('--classes', nargs='+', metavar='NAME', help='in the order of their mask values (default: all)')
    group.add_argument('--novel', nargs='+', metavar='NAME', default=[], help='novel classes; you can name them later')
    group.add_argument('--ignore', nargs='+', metavar='NAME', default=[],
                       help='annotations to ignore, 255 in masks, besides __ignore__ of labelme')  # fmt: skip
    group.add_argument('--crowd', choices=('draw', 'ignore', 'leave-out'), default='draw',
                       help='regions of "iscrowd": 1, as CVAT also marks brushed masks (default: draw)')  # fmt: skip
    group.add_argument('--keep-empty', action='store_true', help='keep photographs that show no class, as background')
    group = parser.add_argument_group('lists')
    group.add_argument('--val-fraction', type=fraction, default=0.2,
                       help='of the images for evaluation, unless the export has a split (default: 0.2)')  # fmt: skip
    group.add_argument('--seed', type=not_negative, default=123, help='of the choice of these (default: 123)')
    parser.add_argument('--rasterizer', choices=RASTERIZERS, default='coco',
                        help='coco: as pycocotools (default); opencv: as utils.coco_parse_script draws')  # fmt: skip
    parser.add_argument('--copy', action='store_true', help='copy the photographs instead of linking to them')
    parser.add_argument('--workers', type=positive, help='processes (default: one per core)')
    parser.add_argument('--overwrite', action='store_true', help='replace files that differ from the annotations')
    return parser.parse_args(argv)


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'got {text!r}; expected a number of 0..1, below 1')
    return value


class Made(NamedTuple):
    """What became of a photograph and its mask: 'made', 'same' or 'differs'; pixels of each value, int64 [256]; and
    numbers of objects of which no pixel is visible."""

    photograph: str
    mask: str
    pixels: np.ndarray
    hidden: list[int]


def make_image(job: tuple[str, Source], classes: Classes, args: argparse.Namespace, colors: dict | None) -> Made:
    """Place a photograph and write its mask; `job` is its id and the photograph."""
    image_id, source = job
    mask, hidden = draw(source, classes, args.rasterizer, colors)
    pixels = np.bincount(mask.ravel(), minlength=256)
    target = args.out / 'images' / f'{image_id}{source.photograph.suffix}'
    if source.embedded:
        placed = _write_embedded(source, target, args.overwrite)
    else:
        placed = place_photograph(source.photograph, target, args.copy, args.overwrite)
    path = args.out / 'masks' / f'{image_id}.png'
    if path.exists():
        if _holds(path, mask):
            return Made(placed, 'same', pixels, hidden)
        if not args.overwrite:
            return Made(placed, 'differs', pixels, hidden)
    save_palette_png(path, mask, classes.colors)
    return Made(placed, 'made', pixels, hidden)


def _write_embedded(source, target, overwrite):
    content = embedded_photograph(source.embedded)
    if target.exists():
        if target.read_bytes() == content:
            return 'same'
        if not overwrite:
            return 'differs'
    with atomic_write(target, 'wb', sync=False) as file:
        file.write(content)
    return 'made'


def _holds(path, mask):
    try:
        return np.array_equal(read_mask(path), mask)
    except InputError:
        return False


def write_card(path: Path, classes: Classes, sizes: Sequence[tuple[int, int]], lists: dict, overwrite: bool) -> str:
    """Write the card, with the lists of these splits, unless it exists; returns what was done."""
    if path.is_file() and not overwrite:
        spec = read_card(path)
        novel = [spec.classes[c] for fold in spec.folds[:1] for c in fold]
        same = sorted(novel) == sorted(classes.novel) or not classes.novel
        return f'kept {path}' + ('' if same else f', which has other novel classes: {some(novel) or "none"}')
    name = path.resolve().parent.name
    content = {'name': f'my_{name}' if name in DATASETS else name, 'names': classes.names}
    content |= {} if classes.background == 0 else {'background': 'none'}
    content |= {'ignore': [IGNORE_INDEX]} | ({'novel': classes.novel} if classes.novel else {})
    content |= {'images': 'images', 'masks': 'masks', 'train': '', 'val': 'none'} | {
        split: f'list/{split}.txt' for split in lists
    }
    content['min_pixels'] = max(1, round(PART_OF_IMAGE * float(np.median([w * h for w, h in sizes]))))
    if not isinstance(classes.palette, str):
        of_value = {0: 'background'} | dict(enumerate(classes.names, 1))
        content['palette'] = {of_value[value]: list(color) for value, color in classes.palette}
    with atomic_write(path, keep=path.with_suffix('.yaml.old')) as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    read_card(path)  # a card that would be refused later is refused now
    return f'wrote {path}'


def check_card(path: Path, classes: Classes):
    """Raise InputError where an existing card gives other values to the classes."""
    if path.is_file():
        spec = read_card(path)
        names = dict(enumerate(classes.names, 1))
        if (dict(spec.classes), spec.background) != (names, classes.background):
            differing = [
                f'{value} is {spec.classes.get(value, "no class")}, now {names.get(value, "no class")}'
                for value in sorted({*spec.classes, *names}) if spec.classes.get(value) != names.get(value)
            ]  # fmt: skip
            raise InputError(
                f'{path} has other classes than the annotations: {some(differing or ["another background"])}. They '
                'have changed, or --classes has. Choose another --out, or --overwrite the masks, lists and card.'
            )


def known_splits(ids: list[str], sources: list[Source], folder: Path) -> list[str | None]:
    """Split of each image: as the export has it or, where it has no evaluation images, as the lists there have it.

    So a data set that grows evaluates on no image that a network was trained on before. None: to be chosen.

    Raises:
        InputError: the export has splits, but no training images.
    """
    splits = [source.split for source in sources]
    if splits and not {None, 'train'} & set(splits):
        raise InputError('the export has no training images; expected a split "train", or none')
    if 'val' in splits:
        return [split or 'train' for split in splits]
    listed = {}
    for split in ('train', 'val'):
        path = folder / f'{split}.txt'
        listed |= dict.fromkeys(read_ids(path, allow_empty=True) if path.is_file() else (), split)
    return [listed.get(i) if split in (None, 'train') else split for i, split in zip(ids, splits, strict=True)]


def split_ids(ids: list[str], splits: list[str | None], shows: np.ndarray, args: argparse.Namespace) -> dict:
    """Split, where it has images, -> its image ids; those that have no split yet are divided at random."""
    free = [i for i, split in enumerate(splits) if split is None]
    chosen = choose_evaluation(shows[free], args.val_fraction, args.seed)
    splits = list(splits)
    for i, is_val in zip(free, chosen, strict=True):
        splits[i] = 'val' if is_val else 'train'
    of_split = {
        split: [i for i, s in zip(ids, splits, strict=True) if s == split] for split in ('train', 'val', 'test')
    }
    return {split: chosen for split, chosen in of_split.items() if chosen}


def report(classes: Classes, export: Export, objects: Counter, ids: list[str], made: list[Made], lists: dict) -> str:
    """The table of the classes, and what was left out and why; `objects` are all that are annotated, by name."""
    pixels = np.array([each.pixels for each in made])
    rows = []
    for value, name in enumerate(classes.names, 1):
        shows = pixels[:, value] > 0
        of_split = {split: int(shows[np.isin(ids, listed)].sum()) for split, listed in lists.items()}
        count = '-' if export.colors else objects[name]
        novel = 'novel' if name in classes.novel else 'base'
        rows.append([value, name, novel, int(shows.sum()), count, int(pixels[:, value].sum()), *of_split.values()])
    columns = ['value', 'class', 'is', 'images', 'objects', 'pixels', *(f'in {split}' for split in lists)]
    alignment = ('right', 'left', 'left', *['right'] * (len(columns) - 3))
    lines = [tabulate(rows, columns, 'simple', disable_numparse=True, colalign=alignment), '']
    others = {name: objects[name] for name in export.class_names if name not in classes.values}
    left_out = {
        'names, whose annotations are not drawn': [f'{name} ({count})' for name, count in others.items() if count],
        'names without annotations': [name for name, count in others.items() if not count],
        **export.left_out,
        'objects of which no pixel is visible, too small or covered by later ones': [
            f'{number} of {image_id}' for image_id, each in zip(ids, made, strict=True) for number in each.hidden
        ],
    }
    lines += [f'left out: {len(which)} {why}: {some(which)}' for why, which in left_out.items() if which]
    return '\n'.join(lines)


def chosen_sources(export: Export, classes: Classes, keep_empty: bool) -> Export:
    """The export without the photographs that show no class. Raises InputError for photographs annotated twice."""
    kept, absent, first = [], [], {}
    for source in export.sources:
        if not keep_empty and not any(source.names[name] for name in classes.names):
            absent.append(source.photograph.name)
            continue
        kept.append(source)
        if source.photograph.suffix.lower() not in SUFFIXES:
            raise InputError(f'{source.photograph} of {source.where} is no {" ".join(SUFFIXES)}; convert such files')
        other = first.setdefault(source.embedded or source.photograph.resolve(), source)
        if other is not source:
            raise InputError(f'{source.photograph} is annotated twice: {other.where}, and {source.where}; remove one')
    left_out = {**export.left_out, 'photographs without a class (--keep-empty keeps them)': absent}
    return replace(export, sources=kept, left_out=left_out)


def raise_differing(ids: list[str], made: list[Made], args: argparse.Namespace):
    """InputError where existing files differ from what the annotations give."""
    for folder, states in (('images', [each.photograph for each in made]), ('masks', [each.mask for each in made])):
        if differing := [i for i, state in zip(ids, states, strict=True) if state == 'differs']:
            raise InputError(
                f'{len(differing)} of {len(ids)} files in {args.out / folder} differ from what the annotations give '
                f'now: {some(differing)}. Either has been changed since; they are kept, and so are the lists and the '
                'card. --overwrite replaces them.'
            )


@exits_cleanly
def main(args: argparse.Namespace):
    export = READERS[args.format](args.annotations, args.images, args.out, args.workers)
    export = apply_crowd(export, args.crowd)
    classes = choose_classes(export, args.classes, args.novel, args.ignore)
    objects = sum((source.names for source in export.sources), Counter())
    export = chosen_sources(export, classes, args.keep_empty)
    sources, card = export.sources, args.out / FILE_NAME
    ids = unique_ids([source.photograph for source in sources])
    check_ids(args.out / 'list', ids)
    splits = known_splits(ids, sources, args.out / 'list')
    check_photographs(sources, args.workers)
    if not args.overwrite:
        check_card(card, classes)
    for folder in ('images', 'masks', 'list'):
        check_writable(args.out / folder)
    make = partial(make_image, classes=classes, args=args, colors=export.colors)
    made = parallel_map(make, list(zip(ids, sources, strict=True)), 'making masks', args.workers)
    raise_differing(ids, made, args)
    shows = np.array([each.pixels[1 : len(classes.names) + 1] > 0 for each in made])
    lists = split_ids(ids, splits, shows, args)
    done = [keep_or_write_ids(args.out / 'list' / f'{split}.txt', of, args.overwrite) for split, of in lists.items()]
    sizes = [source.size for source in sources]
    done.append(write_card(card, classes, sizes, lists, args.overwrite))
    written = sum(each.mask == 'made' for each in made)
    print(f'{len(made)} photographs; {written} masks written, {len(made) - written} existed')
    print(f'\n{report(classes, export, objects, ids, made, lists)}')
    of_split = [np.isin(ids, lists.get(split, [])) for split in ('train', 'val')]
    alone = on_one_side(of_split[1][of_split[0] | of_split[1]], shows[of_split[0] | of_split[1]])
    if 'val' in lists and alone.any():
        names = [name for name, one_side in zip(classes.names, alone, strict=True) if one_side]
        print(f'not in both training and evaluation images: {some(names)}')
    if args.crowd == 'draw' and any(instance.crowd for source in sources for instance in source.instances):
        print('regions of "iscrowd": 1 are drawn as objects; --crowd ignore or leave-out changes that')
    told = split_notes(sources, splits, lists, args.val_fraction) + notes(args.out, ids, sizes)
    print(*done, *(f'note: {note}' for note in told), sep='\n')


def split_notes(sources: list[Source], splits: list[str | None], lists: dict, val_fraction: float) -> list[str]:
    """Where the lists come from, if not from chance alone."""
    if any(source.split for source in sources):
        counts = ', '.join(f'{len(ids)} {split}' for split, ids in lists.items())
        return [f'the export names splits, which the lists have: {counts}']
    if known := sum(split is not None for split in splits):
        return [f'{known} images stay in the lists that they were in; delete the folder list to divide all anew']
    if 'val' not in lists and val_fraction:
        return ['too few images for evaluation, so the card has val: none; add some, or raise --val-fraction']
    return []


def notes(out: Path, ids: list[str], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What the user should know: masks of earlier imports, and photographs that evaluation shrinks much."""
    found = []
    if others := sorted(set(files_by_id(out / 'masks', '.png')) - set(ids)):
        found.append(f'{len(others)} masks in {out / "masks"} are of no photograph here: {some(others)}')
    longest = float(np.median([max(size) for size in sizes]))
    factor = max(BASE_SIZE) / longest
    if factor < SHRUNK:
        found.append(
            f'the photographs are {longest:.0f} pixels long (median), of which evaluation makes {max(BASE_SIZE)}. '
            f'For objects of the same scale in training, write scale_range: [{0.9 * factor:.2g}, {1.1 * factor:.2g}] '
            'into the card; or evaluate with --slide (docs/own_data.md#image-sizes)'
        )
    return found


if __name__ == '__main__':
    main(parse_args())
