"""Command line flags that the scripts share, and the checks of their values (exit code 2)."""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.errors import InputError
from core.parallel import usable_cores
from core.ranks import check_ranks, world_size
from utils.data_flags import add_dataset_flags, check_data_flags

BASE_SIZE = (473, 473)
DEFAULT_NETWORK = {'backbone': 'resnet50v2', 'os': 8}


def parse_switch(text: str) -> bool:
    """0/1, false/true, no/yes: the published scripts write `--save 0`."""
    values = {'0': False, 'false': False, 'no': False, '1': True, 'true': True, 'yes': True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f'got {text!r}; expected one of {", ".join(values)}')
    return values[text.lower()]


def parse_size(text: str) -> tuple[int, int]:
    """'H,W' to (H, W)."""
    return _numbers(text, int, 'H,W with positive numbers, e.g. 473,473', 2, lambda h, w: h > 0 and w > 0)


def parse_range(text: str) -> tuple[float, float]:
    """'LO,HI' to (LO, HI)."""
    return _numbers(text, float, 'LO,HI with 0 < LO <= HI, e.g. 0.9,1.1', 2, lambda low, high: 0 < low <= high)


class _Seeds(argparse.Action):
    """'123,234' or '123' '234' to (123, 234)."""

    def __call__(self, parser, args, values, option_string=None):
        text = ','.join(value.strip(',') for value in values)
        try:
            seeds = _numbers(text, int, 'different whole numbers >= 0, e.g. 123,234', None, _are_seeds)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(args, self.dest, seeds)


def _are_seeds(*numbers):
    return len(set(numbers)) == len(numbers) and min(numbers) >= 0


def add_seeds(group, name: str, text: str, default: tuple[int, ...] = (123,)):
    """Add a flag that takes one or more seeds; `group` is a parser or a group of one."""
    group.add_argument(name, action=_Seeds, nargs='+', default=default, metavar='SEED', help=text)


def _numbers(text, kind, expected, count, valid):
    try:
        numbers = tuple(kind(part) for part in text.split(','))
    except ValueError:
        numbers = ()
    if not numbers or (count and len(numbers) != count) or not valid(*numbers):
        raise argparse.ArgumentTypeError(f'got {text!r}; expected {expected}')
    return numbers


def positive(text: str) -> int:
    """A whole number > 0."""
    return _numbers(text, int, 'a whole number > 0', 1, lambda n: n > 0)[0]


def not_negative(text: str) -> int:
    """A whole number >= 0."""
    return _numbers(text, int, 'a whole number >= 0', 1, lambda n: n >= 0)[0]


def rate(text: str) -> float:
    """A finite number >= 0."""
    return _numbers(text, float, 'a finite number >= 0', 1, lambda x: 0 <= x < math.inf)[0]


class _Parser(argparse.ArgumentParser):
    """Prints an error's message only, without the usage of all flags before it."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n({self.prog} --help lists the flags)\n')


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the script's docstring."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def training_parser(
    doc: str,
    models: Sequence[str],
    backbones: Iterable[str],
    restore_help: str,
    *,
    batch_size: int | None,
    num_epoch: int,
) -> argparse.ArgumentParser:
    """A parser with the flags that both stages share.

    Args:
        doc: the script's docstring.
        models, backbones: choices of --model and --backbone.
        restore_help: help of --restore-from.
        batch_size, num_epoch: defaults; a batch size of None is the dataset's.
    """
    parser = make_parser(doc)
    add_data_flags(parser)
    add_model_flags(parser, models, backbones, restore_help)
    add_training_flags(parser, batch_size, num_epoch)
    add_process_flags(parser)
    return parser


def add_data_flags(parser: argparse.ArgumentParser):
    """Which data: --dataset --data-dir --train-list --val-list --fold --base-size --num-workers ..."""
    group = parser.add_argument_group('data')
    add_dataset_flags(group)
    group.add_argument(
        '--val-list', type=Path, help='evaluation ids (default: val.txt beside --train-list, or the list of the card)'
    )
    group.add_argument('--fold', type=int, default=0, help='which classes are novel; -1: none (default: 0)')
    group.add_argument(
        '--filter-novel', action='store_true', help='leave out training images that contain novel classes'
    )
    add_evaluation_flags(group)


def add_evaluation_flags(group):
    """How evaluation feeds images to the network; `group` is a parser or a group of one."""
    group.add_argument(
        '--base-size', type=parse_size, default=BASE_SIZE, metavar='H,W',
        help='evaluation: images are resized to fit (default: that of the checkpoint, or 473,473)',
    )  # fmt: skip
    group.add_argument(
        '--test-batch-size', type=positive, help='per process; changes rounding only (default: 16 on a GPU, 1 on a CPU)'
    )
    group.add_argument(
        '--num-workers', type=not_negative, default=min(4, usable_cores()),
        help='loader processes per training process (default: 4, or the usable cores if there are fewer)',
    )  # fmt: skip


def add_model_flags(
    parser: argparse.ArgumentParser, models: Sequence[str], backbones: Iterable[str], restore_help: str
):
    """Which network, from which weights, where and in which precision."""
    group = parser.add_argument_group('model')
    default = DEFAULT_NETWORK
    group.add_argument('--model', choices=models, default=models[0], help=f'default: {models[0]}')
    group.add_argument(
        '--backbone', choices=list(backbones), default=default['backbone'],
        help=f'default: {default["backbone"]}; ft_pop.py and test.py: that of the checkpoint',
    )  # fmt: skip
    group.add_argument(
        '--os', type=int, choices=(8, 16, 32), default=default['os'],
        help=f'output stride (default: {default["os"]}, or as --backbone)',
    )  # fmt: skip
    group.add_argument('--restore-from', required=True, help=restore_help)
    add_device_flags(group)
    group.add_argument(
        '--compile', action='store_true', help='torch.compile backbone and decoder; no gain on the CPUs measured'
    )


def add_device_flags(group):
    """Where and in which precision; `group` is a parser or a group of one."""
    group.add_argument(
        '--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='auto: CUDA if available (default)'
    )
    group.add_argument(
        '--fp16', action='store_true',
        help='mixed precision: float16 on CUDA, bfloat16 on CPUs with instructions for it (float32 on others)',
    )  # fmt: skip


def add_training_flags(parser: argparse.ArgumentParser, batch_size: int | None, num_epoch: int):
    """How a run trains, when it saves and validates, and its folder. Defaults are the paper's."""
    _add_optimisation_flags(parser.add_argument_group('training'), batch_size, num_epoch)
    _add_run_flags(parser.add_argument_group('run'))
    _add_validation_flags(parser.add_argument_group('validation'))


def _add_optimisation_flags(group, batch_size, num_epoch):
    group.add_argument(
        '--input-size', type=parse_size, default=BASE_SIZE, metavar='H,W',
        help='training crop (default: 473,473; in stage 2 that of stage 1)',
    )  # fmt: skip
    group.add_argument(
        '--scale-range', type=parse_range, metavar='LO,HI',
        help="random resize factor, relative to the original size (default: the dataset's; in stage 2 that of stage 1)",
    )  # fmt: skip
    group.add_argument(
        '--batch-size', type=positive, default=batch_size,
        help='of all processes together (default: 8 on VOC and 16 on COCO in stage 1, 1 in stage 2)',
    )  # fmt: skip
    group.add_argument(
        '--learning-rate', type=rate, default=1e-3,
        help='of the backbone; everything else has ten times this rate (default: 1e-3; pspnet_capl: 1e-2)',
    )  # fmt: skip
    group.add_argument('--momentum', type=rate, default=0.9, help='default: 0.9')
    group.add_argument('--weight-decay', type=rate, default=1e-4, help='default: 1e-4')
    group.add_argument('--power', type=rate, default=0.9, help='of the poly schedule (default: 0.9)')
    group.add_argument('--num-epoch', type=positive, default=num_epoch, help=f'default: {num_epoch}')
    group.add_argument(
        '--start-epoch', type=not_negative, default=0,
        help='start the schedule and the random draws at this epoch, from the weights of --restore-from',
    )  # fmt: skip
    group.add_argument(
        '--fix-bn', action='store_true', help='keep every batch normalisation as loaded (stage 2 always does)'
    )
    group.add_argument('--freeze-backbone', action='store_true', help='do not train the backbone (stage 2 never does)')
    group.add_argument('--fix-lr', action='store_true', help='constant learning rate')
    group.add_argument(
        '--accumulate', type=positive, default=1, metavar='N',
        help='divide the batch into N micro-batches, one after the other, to save memory; batch normalisation then '
        'sees one of them (default: 1)',
    )  # fmt: skip


def _add_run_flags(group):
    group.add_argument('--snapshot-dir', type=Path, required=True, help='folder for checkpoints, logs and curves')
    group.add_argument(
        '--resume', default='auto', metavar='auto|off|FILE',
        help='auto: resume an interrupted run with the same arguments (default); off: start in an empty folder; '
        'FILE: resume from a checkpoint, also with other arguments',
    )  # fmt: skip
    group.add_argument('--overwrite', action='store_true', help='unless --resume auto: remove an earlier run first')
    group.add_argument(
        '--save-every-steps', type=not_negative, default=0, metavar='N', help='also save within epochs (default: 0, no)'
    )
    group.add_argument(
        '--save-every-minutes', type=rate, default=0, metavar='M', help='the same every M minutes (default: 0, no)'
    )
    group.add_argument(
        '--save-pred-every', type=not_negative, default=0, metavar='N',
        help='also keep epoch_N.pth every N epochs (default: 0, never)',
    )  # fmt: skip
    group.add_argument(
        '--print-frequency', type=positive, default=50, metavar='N', help='log every N steps (default: 50)'
    )


def _add_validation_flags(group):
    group.add_argument(
        '--val-every', type=positive, default=1, metavar='N',
        help='validate every N epochs and after the last (default: 1)',
    )  # fmt: skip
    group.add_argument(
        '--val-limit', type=positive, metavar='N',
        help='validate on a fixed random choice of N images; test.py evaluates on all (default: all)',
    )  # fmt: skip


def add_process_flags(parser: argparse.ArgumentParser):
    """How processes work together, and how they treat errors."""
    group = parser.add_argument_group('processes')
    group.add_argument(
        '--timeout-minutes', type=rate, default=30, metavar='M',
        help='a process that keeps the others waiting for longer ends the run (default: 30)',
    )  # fmt: skip
    group.add_argument(
        '--deterministic', action='store_true', help='only deterministic algorithms on CUDA; CPU runs always are'
    )
    group.add_argument(
        '--skip-bad-images', action='store_true',
        help='skip images that cannot be read, and list them at the end',
    )  # fmt: skip


def add_few_shot_flags(parser: argparse.ArgumentParser):
    """Which support images, and which checkpoint of a run is reported."""
    group = parser.add_argument_group('few-shot')
    group.add_argument('--shot', type=positive, default=1, help='support images per novel class (default: 1)')
    group.add_argument(
        '--select', choices=('best', 'last'), default='best',
        help='the checkpoint that is reported (default: best)',
    )  # fmt: skip


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Set the defaults that depend on the dataset, and refuse values that do not fit together.

    Args:
        parser: ends the program with exit code 2.
        args: parsed; changed in place.
    """
    try:
        check_ranks()
    except InputError as error:
        parser.error(str(error))
    spec = args.dataset
    check_data_flags(parser, args, [args.fold])
    if hasattr(args, 'batch_size'):
        args.batch_size = args.batch_size or spec.batch_size
        _check_training(parser, args)
    return args


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint that is named by its path or by its folder."""
    return path if path.is_dir() else path.parent


def _check_training(parser, args):
    """Refuse training flags that do not fit together."""
    if args.start_epoch >= args.num_epoch:
        parser.error(f'--start-epoch {args.start_epoch} leaves nothing of --num-epoch {args.num_epoch}')
    if args.learning_rate == 0:
        parser.error(f'--learning-rate: got {args.learning_rate}; expected a number > 0')
    if args.overwrite and args.resume == 'auto':
        parser.error('--overwrite needs --resume off or --resume FILE')
    if args.overwrite and args.snapshot_dir.resolve() == folder_of(Path(args.restore_from).resolve()):
        parser.error(
            f'--overwrite would remove what --restore-from {args.restore_from} names; use another --snapshot-dir'
        )
    unit = world_size() * args.accumulate
    if args.batch_size % unit:
        below, above = args.batch_size // unit * unit, (args.batch_size // unit + 1) * unit
        nearest = f'{below} or {above}' if below else f'{above}'
        times = f' times {args.accumulate} micro-batches' if args.accumulate > 1 else ''
        parser.error(
            f'--batch-size {args.batch_size} is not divisible by {world_size()} processes{times}; use {nearest}'
        )
