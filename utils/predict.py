"""Segment photographs without masks with a trained network.

    python -m utils.predict --restore-from runs/street_5shot/best_123.pth --images photographs --save-path segmented

The checkpoint says which network it holds and which classes it knows. Writes to --save-path, for each image ID:
ID.png, a palette PNG of class ids at the original size, and ID_overlay.jpg, the image with its classes coloured; and
legend.svg, the colours of the classes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from core.files import check_writable
from core.ranks import is_main
from dataset import DATASETS, Photographs, SegmentationDataset
from dataset.legend import Legend
from engine.checkpoint import Checkpoint, read_checkpoint, resolve_checkpoint
from engine.distributed import process_group
from engine.evaluation import Counted
from engine.inference import Segmenter
from engine.precision import precision
from model import POP, build_model
from report.figures import legend_figure
from report.panels import OverlayWriter
from report.plotting import save_figure
from utils import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument('--restore-from', required=True, help='checkpoint of stage 1 or 2, e.g. best_123.pth')
    parser.add_argument('--images', type=Path, required=True, help='a photograph, or a folder of them')
    parser.add_argument('--save-path', type=Path, required=True, help='folder of the results, not of the photographs')
    parser.add_argument('--skip-bad-images', action='store_true', help='skip images that cannot be read')
    cli.add_evaluation_flags(parser)
    cli.add_device_flags(parser)
    parser.set_defaults(base_size=None)
    args = parser.parse_args(argv)
    folder = args.images if args.images.is_dir() else args.images.parent
    if args.save_path.resolve() == folder.resolve():
        parser.error(f'--save-path {folder} holds the photographs, which could be overwritten; give another folder')
    return args


def load_network(checkpoint: Checkpoint) -> tuple[POP, Legend]:
    """Load the network that a checkpoint of ours describes, and the legend of its classes.

    Raises:
        InputError: the checkpoint does not say what it was trained on, or no data set in dataset/classes.py has its
            classes.
    """
    path, config = checkpoint.path, checkpoint.config
    if missing := {'dataset', 'fold', 'backbone', 'os'} - set(config):
        raise InputError(
            f'{path} does not say its {", ".join(sorted(missing))}; expected a checkpoint that train_base.py or '
            'ft_pop.py of this project wrote. test.py can evaluate others, on images with masks.'
        )
    if config['dataset'] not in DATASETS:
        raise InputError(
            f'{path} is for the data set {config["dataset"]!r}, which has no row in dataset/classes.py; '
            f'expected one of {", ".join(DATASETS)}'
        )
    counts = checkpoint.class_counts
    try:
        legend = DATASETS[config['dataset']].legend(config['fold'])
        net = build_model(config['backbone'], *counts, config['os'])
    except ValueError as error:
        raise InputError(f'{path}: {error}') from error
    expected = legend.num_base, len(legend.novel_labels)
    if counts not in (expected, (legend.num_base, 0)):
        raise InputError(
            f'{path} has {counts[0]} base and {counts[1]} novel classes; fold {config["fold"]} of '
            f'{config["dataset"]!r} in dataset/classes.py has {expected[0]} and {expected[1]}. '
            'Has its row changed since the training?'
        )
    checkpoint.load_into(net, {'dataset': config['dataset'], 'classes': legend.classes})
    return net, legend.cut(net.num_logits)


@exits_cleanly
def main(args: argparse.Namespace):
    with process_group(args.device) as device:
        photographs = Photographs(args.images)
        if photographs.left_out and is_main():
            print(f'left out: {some(photographs.left_out)}')
        checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
        net, legend = load_network(checkpoint)
        if not net.num_novel and is_main():
            print(f'note: {checkpoint.path} is of stage 1: it knows the base classes only')
        check_writable(args.save_path)
        segmenter = Segmenter(net, device, precision(device, args.fp16))
        size = args.base_size or tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
        dataset = SegmentationDataset(photographs.ids, photographs, fit_size=size, skip_bad=args.skip_bad_images)
        counted = Counted(OverlayWriter(legend, photographs.read_image, args.save_path))
        segmenter.run(dataset, counted, batch_size=args.test_batch_size, num_workers=args.num_workers)
        written = counted.total()
        if is_main():
            save_figure(args.save_path / 'legend.svg', legend_figure(legend))
            print(f'{written} of {len(photographs.ids)} images segmented: {args.save_path}')


if __name__ == '__main__':
    main(parse_args())
