"""Flags that say which data a command uses, and what a data set's card says where they are not given."""

import argparse
from pathlib import Path

from core.errors import InputError
from dataset import DATASETS, DatasetSpec
from dataset.cards import FILE_NAME
from dataset.classes import find_dataset


def dataset(text: str) -> DatasetSpec:
    """A built-in data set by its name, or the one that a card or its folder describes."""
    try:
        return find_dataset(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_dataset_flags(group):
    """--dataset --data-dir --train-list; `group` is a parser or a group of one."""
    group.add_argument(
        '--dataset', type=dataset, default='voc', metavar='NAME|CARD',
        help=f'{", ".join(DATASETS)}, or a dataset.yaml or its folder (default: voc)',
    )  # fmt: skip
    group.add_argument('--data-dir', type=Path, help="folder of the images and masks (default: the card's)")
    group.add_argument(
        '--train-list', '--list', type=Path,
        help="training ids; the fold's lists are kept beside it (default: those of the card)",
    )  # fmt: skip


def check_folds(parser: argparse.ArgumentParser, spec: DatasetSpec, folds: list[int]):
    """End the program with exit code 2 where a DatasetSpec has no such fold."""
    for fold in folds:
        try:
            spec.novel_ids(fold)
        except ValueError as error:
            parser.error(f'--fold: {error}')


def fill_data(args: argparse.Namespace, spec: DatasetSpec):
    """Set --data-dir, --train-list and --val-list to what a DatasetSpec says where they are not given.

    The validation list of a built-in data set is beside the train list; one's own card names it.

    Raises:
        InputError: --data-dir is needed to find the lists.
    """
    args.data_dir = args.data_dir or spec.root
    if args.data_dir is None and args.train_list is None and spec.lists_in_data:
        raise InputError(f'--data-dir is needed: {spec} keeps its lists there')
    val_list = getattr(args, 'val_list', None)
    if val_list is None and spec.val_list:
        beside = args.train_list and spec.root is None
        val_list = args.train_list.parent / spec.val_list.name if beside else spec.list_path('val', args.data_dir)
    args.train_list, args.val_list = args.train_list or spec.list_path('train', args.data_dir), val_list


def check_data_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, folds: list[int], needed: bool = True):
    """`fill_data`, and end the program with exit code 2 where a data set lacks its folder or one of the folds."""
    check_folds(parser, args.dataset, folds)
    if args.dataset.root is None and args.data_dir and (args.data_dir / FILE_NAME).is_file():
        parser.error(f'{args.data_dir} has a card of its own: give --dataset {args.data_dir}')
    if needed and args.data_dir is None and args.dataset.root is None:
        parser.error(
            f'--data-dir is needed: the folder of the images and masks of {args.dataset}. For your own data, give '
            '--dataset FOLDER (docs/own_data.md).'
        )
    try:
        fill_data(args, args.dataset)
    except InputError as error:
        parser.error(str(error))


def add_support_flags(parser: argparse.ArgumentParser):
    """Which images stage 2 learns from, and what of them."""
    group = parser.add_argument_group('support and base images')
    group.add_argument(
        '--support-list', type=Path, metavar='FILE',
        help='support images chosen by hand: lines with a novel class, by name or id, and an image id. A class may '
        'have any number; --shot is the number of base images of a class in an epoch then',
    )  # fmt: skip
    group.add_argument(
        '--nested', action='store_true',
        help='support lists of gen_fs_list --nested: those of fewer shots are part of those of more',
    )  # fmt: skip
    group.add_argument(
        '--support-labels', choices=('all', 'novel-only'), default='all',
        help='novel-only: what a support does not label as a novel class is unknown, not background (default: all)',
    )  # fmt: skip
    group.add_argument(
        '--repeat-base-images', action='store_true',
        help='base classes with fewer images than --shot give them several times; otherwise they are an error',
    )  # fmt: skip
