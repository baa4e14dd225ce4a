"""Segment photographs without masks with a trained network.

    python -m utils.predict --restore-from runs/street_5shot/best_123.pth --images photographs --save-path segmented

The checkpoint says which network it holds and which classes it knows. Writes to --save-path, for each image ID:
ID.png, a palette PNG of class ids at the original size, and ID_overlay.jpg, the image with its classes coloured; and
legend.svg, the colours of the classes. With --probabilities also ID_confidence.png, how sure each pixel is; with
--format also instances.json, the predictions as COCO annotations.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from core.files import check_writable
from core.ranks import is_main
from dataset import DATASETS, Photographs, SegmentationDataset
from engine.checkpoint import read_checkpoint, resolve_checkpoint
from engine.described import described_network
from engine.distributed import process_group
from engine.evaluation import Counted
from engine.inference import Segmenter
from engine.precision import precision
from report.annotations import CocoWriter
from report.figures import legend_figure
from report.panels import ConfidenceWriter, OverlayWriter
from report.plotting import save_figure
from utils import cli
from utils.view_flags import add_view_flags, check_view_flags, views_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        '--restore-from', required=True, help='checkpoint of a stage or of utils.teach, e.g. best_123.pth'
    )
    parser.add_argument('--images', type=Path, required=True, help='a photograph, or a folder of them')
    parser.add_argument('--save-path', type=Path, required=True, help='folder of the results, not of the photographs')
    parser.add_argument(
        '--probabilities', action='store_true',
        help='also write ID_confidence.png: the probability of each predicted label, 0..255',
    )  # fmt: skip
    parser.add_argument(
        '--format', choices=('coco', 'coco-polygons'),
        help='also write instances.json, the predictions as COCO annotations for labelling tools: as masks (run '
        'lengths) or as polygons along the borders of pixels',
    )  # fmt: skip
    parser.add_argument('--skip-bad-images', action='store_true', help='skip images that cannot be read')
    cli.add_evaluation_flags(parser)
    cli.add_device_flags(parser)
    add_view_flags(parser)
    parser.set_defaults(base_size=None)
    args = parser.parse_args(argv)
    check_view_flags(parser, args)
    folder = args.images if args.images.is_dir() else args.images.parent
    if args.save_path.resolve() == folder.resolve():
        parser.error(f'--save-path {folder} holds the photographs, which could be overwritten; give another folder')
    return args


def refuse_names_of_confidences(image_ids: Sequence[str]):
    """Raise InputError where the mask of one photograph would have the name of another one's confidences."""
    known = set(image_ids)
    if taken := [image_id for image_id in image_ids if f'{image_id}_confidence' in known]:
        raise InputError(
            f'--probabilities writes {taken[0]}_confidence.png for {taken[0]}, but there is also a photograph '
            f'{taken[0]}_confidence, whose mask has this name. Rename the photograph, or leave it out of --images.'
        )


@exits_cleanly
def main(args: argparse.Namespace):
    with process_group(args.device) as device:
        photographs = Photographs(args.images)
        if photographs.left_out and is_main():
            print(f'left out: {some(photographs.left_out)}')
        if args.probabilities:
            refuse_names_of_confidences(photographs.ids)
        checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
        net, legend = described_network(checkpoint)
        if not net.num_novel and is_main():
            print(f'note: {checkpoint.path} is of stage 1: it knows the base classes only')
        if checkpoint.unfinished_note and is_main():
            print(f'note: {checkpoint.unfinished_note}')
        check_writable(args.save_path)
        known = DATASETS.get(checkpoint.config['dataset'])
        views = views_of(args, checkpoint, known.scale_range if known else None)
        segmenter = Segmenter(net, device, precision(device, args.fp16), views=views)
        size = args.base_size or tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
        dataset = SegmentationDataset(photographs.ids, photographs, fit_size=size, skip_bad=args.skip_bad_images)
        overlays = OverlayWriter(legend, photographs.read_image, args.save_path)
        polygons = args.format == 'coco-polygons'
        annotations = CocoWriter(legend, photographs.file_names, polygons) if args.format else None
        counted = Counted(overlays, annotations)
        segmenter.run(
            dataset, counted, ConfidenceWriter(args.save_path) if args.probabilities else None,
            batch_size=args.test_batch_size, num_workers=args.num_workers,
        )  # fmt: skip
        if annotations:
            annotations.write(args.save_path / 'instances.json')
        written = counted.total()
        if is_main():
            save_figure(args.save_path / 'legend.svg', legend_figure(legend))
            print(f'{written} of {len(photographs.ids)} images segmented: {args.save_path}')


if __name__ == '__main__':
    main(parse_args())
