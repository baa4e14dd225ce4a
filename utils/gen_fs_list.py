"""Make the few-shot lists of one or several folds, shots and seeds, and the class lists that are missing.

    python -m utils.gen_fs_list --dataset voc --data-dir VOC2012 --fold 0 1 2 3 --shot 1 5 10 --seed 123 234 345

From the same class lists, a seed gives the images that the published code draws. Existing lists are kept; an existing
list with images that are not in the train list is an error.
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from dataset import FoldData
from dataset.fewshot import base_shortage, draw_nested_support, draw_support
from dataset.lists import read_ids, write_ids
from utils.cli import add_seeds, make_parser, not_negative, positive
from utils.data_flags import add_dataset_flags, check_data_flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_dataset_flags(parser)  # --data-dir is not needed if the class lists exist already
    parser.add_argument('--fold', type=not_negative, nargs='+', default=[0], help='default: 0')
    parser.add_argument(
        '--shot', type=positive, nargs='+', default=[1, 5, 10], help='images per novel class (default: 1 5 10)'
    )
    add_seeds(parser, '--seed', 'seeds of the draws, e.g. 123,234 or 123 234 (default: 123)')
    parser.add_argument(
        '--filter-novel', action='store_true', help='also make the filtered training lists (fold{F}_filter)'
    )
    parser.add_argument(
        '--nested', action='store_true',
        help='draws whose images of fewer shots are among those of more, for ft_pop.py --nested; they have files of '
        'their own (..._nested.txt)',
    )  # fmt: skip
    parser.add_argument('--overwrite', action='store_true', help='make existing lists again')
    args = parser.parse_args(argv)
    check_data_flags(parser, args, args.fold, needed=False)
    return args


@exits_cleanly
def main(args: argparse.Namespace):
    spec = args.dataset
    for fold in args.fold:
        for filtered in (False, True) if args.filter_novel else (False,):
            data = FoldData(spec, args.data_dir, fold, args.train_list, args.val_list, filtered)
            for note in data.ensure_lists(args.overwrite) if args.data_dir else ():
                print(f'note: {note}')
        class_lists = {
            c: data.read_list(data.lists.novel_class(c), 'use --data-dir to make it', allow_empty=True)
            for c in spec.novel_ids(fold)
        }
        paths = {spec.classes[c]: data.lists.base_class(c) for c in spec.base_ids(fold)}
        base_lists = {name: data.read_list(path, allow_empty=True) for name, path in paths.items() if path.is_file()}
        for shot in args.shot:
            if few := [f'{spec.classes[c]} ({len(ids)})' for c, ids in class_lists.items() if 0 < len(ids) < shot]:
                print(f'note: fold {fold} has fewer than {shot} images of {some(few)}; the support lists repeat them')
            for seed in args.seed:
                path = data.lists.support(shot, seed, args.nested)
                if path.is_file() and not args.overwrite:
                    check_subset(path, args.train_list, data.ids('train'))
                    print(f'kept {path}')
                    if old := replace(data, nested=args.nested).outdated_supports(shot, seed):
                        print(f'note: {some(old)} are not in the class lists any more; --overwrite draws again')
                else:
                    draw = draw_nested_support if args.nested else draw_support
                    write_ids(path, draw(class_lists, shot, seed))
                    print(f'wrote {path}')
                if reason := base_shortage(base_lists, shot, read_ids(path, allow_repeats=True), seed):
                    print(f'note: ft_pop.py refuses this draw, unless it draws no base images: {reason}')


def check_subset(path: Path, train_list: Path, train_ids: Collection[str]):
    """Raise InputError if a support list names images that are not in the train list."""
    foreign = sorted(set(read_ids(path, allow_repeats=True)) - set(train_ids))
    if foreign:
        raise InputError(
            f'list {path} names {some(foreign)}, which {train_list} does not: it belongs to other data. '
            'Remove it, or use --overwrite.'
        )


if __name__ == '__main__':
    main(parse_args())
