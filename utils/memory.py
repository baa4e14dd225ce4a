"""Write memory.pt beside a network: what utils.teach needs in place of the data that the network was trained on.

    python -m utils.memory --restore-from runs/voc_base --data-dir VOC2012

train_base.py writes it at its end. This command makes it for networks that were trained without it, or with another
size. It holds features and labels of a few views of each base class, in half precision.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from core.files import check_writable
from engine.checkpoint import read_checkpoint, resolve_checkpoint
from engine.described import described_network
from engine.distributed import process_group
from engine.feature_store import digest
from engine.memory import NAME, keeper_in_memory, look_at_base, owner_of, teachable, write_memory
from engine.precision import precision
from utils import cli, from_flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument('--restore-from', required=True, help='the network: a checkpoint of stage 1, or its folder')
    parser.add_argument('--data-dir', type=Path, required=True, help='the data that it was trained on')
    parser.add_argument('--train-list', type=Path, help="training ids (default: the data set's)")
    parser.add_argument('--out', type=Path, help='the file to write (default: memory.pt beside the checkpoint)')
    parser.add_argument('--overwrite', action='store_true', help='replace the memory of another or a taught network')
    parser.add_argument(
        '--memory-mb', type=cli.rate, help='size at most (default: 300, or one view of each class in up to 1000)'
    )
    parser.add_argument('--num-workers', type=cli.not_negative, default=0, help='loader processes (default: 0)')
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def check_replaceable(out: Path, network: str, checkpoint: str):
    """Raise InputError if the file at `out` is not a memory of this base network alone; `network`: its digest."""
    owner, taught = owner_of(out)
    mend = 'give another file: --out, or --overwrite to replace it'
    if owner != network:
        raise InputError(
            f'{out} is the memory of another network than {checkpoint}, such as best.pth beside last.pth; {mend}'
        )
    if taught:
        raise InputError(
            f'{out} also holds photographs of {some(taught)}, which utils.teach was given and needs; {mend}'
        )


@exits_cleanly
def main(args: argparse.Namespace):
    with process_group(args.device) as device:
        checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
        checkpoint.expect_pop('utils.memory')
        if checkpoint.class_counts[1]:
            raise InputError(
                f'{checkpoint.path} has novel classes, whose photographs are in the memory of utils.teach; give '
                'the base network (of train_base.py)'
            )
        net = teachable(described_network(checkpoint)[0])
        out = args.out or Path(checkpoint.path).parent / NAME
        if out.is_file() and not args.overwrite:
            check_replaceable(out, digest(net.state_dict()), checkpoint.path)
        data = from_flags.described_data(args, checkpoint.config)
        check_writable(out.parent)
        keeper = keeper_in_memory(net.to(device), device, precision(device, args.fp16), print, args.num_workers)
        size = tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
        memory = look_at_base(keeper, data, size, args.memory_mb)
        write_memory(out, memory)
        print(f'{len(memory.base.rows)} views of {net.num_base} base classes, {out.stat().st_size / 1e6:.0f} MB: {out}')


if __name__ == '__main__':
    main(parse_args())
