"""Export a trained network to a file that is used without this code.

    python -m utils.export --restore-from runs/voc_5shot/best_123.pth --format onnx --check photographs
    python -m utils.export --restore-from runs/voc_5shot/best_123.pth --format torch --output logits

ONNX files need the packages of requirements-export.txt; --format torch writes a program of torch.export (.pt2). The
network takes batches of RGB images of one size, normalises them itself, and gives labels or logits of the same size.
Before the file is written, it is compared with the network that it was made from. docs/export.md says how to use it.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from core.errors import InputError, exits_cleanly
from core.files import atomic_write, check_writable
from dataset import Photographs
from dataset.shapes import SHAPES, draw_scene
from engine import export
from engine.checkpoint import read_checkpoint, resolve_checkpoint
from engine.described import described_network
from model import POP
from utils import cli

CHECKED = 16  # photographs at most


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument('--restore-from', required=True, help='checkpoint of a stage or of utils.teach')
    parser.add_argument('--format', choices=list(export.FORMATS), default='onnx', help='default: onnx')
    parser.add_argument('--out', type=Path, help='the file to write (default: beside the checkpoint)')
    parser.add_argument('--overwrite', action='store_true', help='replace it where it exists')
    parser.add_argument(
        '--input', choices=list(export.TYPES), default='uint8', help='RGB uint8 (default), or float32 in 0..1'
    )
    parser.add_argument(
        '--output', choices=('labels', 'logits'), default='labels', help='what the network gives (default: labels)'
    )
    parser.add_argument(
        '--base-size', type=cli.parse_size, metavar='H,W', help='size of its images (default: as in training)'
    )
    parser.add_argument(
        '--check', type=Path, metavar='FOLDER',
        help=f'compare with PyTorch on up to {CHECKED} photographs of this folder (default: on generated pictures)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    suffix = export.SUFFIXES[args.format]
    if args.out and args.out.suffix != suffix:
        parser.error(f'--out {args.out}: expected a name that ends with {suffix} for --format {args.format}')
    return args


def pictures(folder: Path | None) -> tuple[str, Iterator[np.ndarray]]:
    """What an exported network is checked on: in words; RGB uint8 [h, w, 3] each.

    Args:
        folder: of photographs; None: pictures are generated.
    """
    if folder is None:
        return 'generated pictures (--check FOLDER: on photographs)', (
            draw_scene(np.random.default_rng(i), i % len(SHAPES) + 1)[0] for i in range(CHECKED // 2)
        )
    photographs = Photographs(folder)
    found = len(photographs.ids)
    count = min(found, CHECKED)
    spread = (photographs.ids[i * found // count] for i in range(count))
    return f'{count} of {found} photographs', map(photographs.read_image, spread)


@exits_cleanly
def main(args: argparse.Namespace):
    if args.format == 'onnx':
        export.check_onnx()
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
    net, legend = described_network(checkpoint)
    if not isinstance(net, POP):
        raise InputError(f'{checkpoint.path} is of --model {checkpoint.model}; utils.export takes POP and its variants')
    out = args.out or Path(checkpoint.path).with_suffix(export.SUFFIXES[args.format])
    if out.exists() and not args.overwrite:
        raise InputError(f'{out} exists; give another name with --out, or --overwrite')
    what, images = pictures(args.check)
    check_writable(out.parent)
    size = args.base_size or tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
    network = export.InferenceNetwork(net, checkpoint.config, size, labels=args.output == 'labels')
    dtype = export.TYPES[args.input]
    content, run = export.FORMATS[args.format](network, dtype, export.describe(checkpoint, legend, size))
    agreement = export.compare(run, net, images, size, dtype)
    checked = f'{export.ENGINES[args.format]} compared with this code on {what}: {agreement}'
    if not agreement.holds:
        raise InputError(
            f'{checked}. That is more than rounding, so {out} has not been written. Try other versions of PyTorch or '
            'of the packages in requirements-export.txt.'
        )
    with atomic_write(out, 'wb') as file:
        file.write(content)
    print(checked)
    kind = f'{args.input} {size[0]}x{size[1]} to {args.output}'
    print(f'{net.num_base} base and {net.num_novel} novel classes, {kind}, {len(content) / 1e6:.0f} MB: {out}')


if __name__ == '__main__':
    main(parse_args())
