"""Segment photographs, which need no masks, with a trained network.

    python -m utils.predict --restore-from runs/street_5shot/best_123.pth --images photographs --save-path segmented

The checkpoint says which data set's classes and which network it is. --save-path gets, for each image ID, ID.png, a
palette PNG of class ids at the original size, and ID_overlay.jpg, the image with its classes coloured as in legend.svg.
"""

from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from core.files import check_writable
from core.ranks import is_main
from dataset import DATASETS, Photographs, SegmentationDataset
from engine.checkpoint import read_checkpoint, resolve_checkpoint
from engine.distributed import process_group, sum_over_processes
from engine.evaluation import evaluate
from engine.loaders import evaluation_loader
from engine.precision import precision
from model import build_model
from model.kernels.fusing import fuse
from report.figures import legend_figure, save_figure
from report.panels import OverlayWriter
from utils import cli


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    parser.add_argument('--restore-from', required=True, help='checkpoint of either stage, e.g. best_123.pth')
    parser.add_argument('--images', type=Path, required=True, help='folder of the photographs, or one of them')
    parser.add_argument('--save-path', type=Path, required=True, help='folder of the results, another one')
    parser.add_argument('--skip-bad-images', action='store_true', help='go on without images that cannot be read')
    cli.add_evaluation_flags(parser)
    cli.add_device_flags(parser)
    parser.set_defaults(base_size=None)
    args = parser.parse_args(argv)
    folder = args.images if args.images.is_dir() else args.images.parent
    if args.save_path.resolve() == folder.resolve():
        parser.error(f'--save-path {args.save_path} is the folder of the photographs, which could be overwritten')
    return args


def load_network(checkpoint):
    """The network of a Checkpoint and the legend of its classes.

    Raises:
        InputError: it is of other code and does not say what it was trained on, or dataset/classes.py has no data set
            with these classes.
    """
    path, config = checkpoint.path, checkpoint.config
    if missing := {'dataset', 'fold', 'backbone', 'os'} - set(config):
        raise InputError(
            f'{path} does not say its {", ".join(sorted(missing))}; expected a checkpoint that train_base.py or '
            'ft_pop.py of this project wrote. Others can be evaluated, on images with masks, by test.py.'
        )
    if config['dataset'] not in DATASETS:
        raise InputError(
            f'{path} is of the data set {config["dataset"]!r}, which has no row in dataset/classes.py; '
            f'there are {", ".join(DATASETS)}'
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
def main(args):
    with process_group(args.device) as device:
        photographs = Photographs(args.images)
        if photographs.left_out and is_main():
            print(f'left out: {some(photographs.left_out)}')
        checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
        net, legend = load_network(checkpoint)
        check_writable(args.save_path)
        dtype = precision(device, args.fp16)
        net = fuse(net.to(device), dtype)
        size = args.base_size or tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
        dataset = SegmentationDataset(photographs.ids, photographs, fit_size=size, skip_bad=args.skip_bad_images)
        loader = evaluation_loader(dataset, args.test_batch_size, num_workers=args.num_workers, device=device)
        writer = OverlayWriter(legend, photographs.read_image, args.save_path)
        evaluate(net, loader, device, dtype, writer)
        (written,) = sum_over_processes(writer.written)
        if is_main():
            save_figure(args.save_path / 'legend.svg', legend_figure(legend))
            print(f'{written} of {len(photographs.ids)} images segmented: {args.save_path}')


if __name__ == '__main__':
    main(parse_args())
