"""Evaluate a network on base and novel classes together, at the masks' original size.

    python test.py --dataset voc --data-dir VOC2012 --fold 0 --shot 5 --random-seed 123,234 --restore-from runs/5shot
    torchrun --nproc_per_node=4 test.py --dataset coco --data-dir COCO --fold 0 --shot 5 --restore-from runs/coco_5shot

--restore-from DIR evaluates DIR/best_{seed}.pth of each seed (DIR/last_{seed}.pth with --select last), as does
DIR/best.pth. A stage-1 checkpoint is evaluated on the base classes; novel pixels then count as background. A network
that utils.teach has taught is evaluated on the classes that it knows, if --dataset has them.

Writes to --save-path (default: the checkpoint's folder):
    results.md, results.json    means and IoU of each class, in percent, of each seed and over seeds; on how many images
    confusion_{seed}.npy        int64, row = ground truth, in the order of the logits
    predictions_{seed}/ID.png   with --save: palette PNG of class ids, at the original size
    overlay_{seed}/*.png        with --overlay N: image, ground truth, prediction and errors of N images
    plots/*.png                 with --plots: confusion matrix, IoU, prototypes, support images
"""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from core.errors import InputError, exits_cleanly, some
from core.files import atomic_write, check_writable
from core.ranks import is_main
from dataset import FoldData
from engine.checkpoint import Checkpoint, of_seeds, read_checkpoint, resolve_checkpoint
from engine.described import taught_classes
from engine.distributed import main_first, process_group
from engine.evaluation import Counted
from engine.inference import Segmenter
from engine.precision import name_of, precision
from engine.pretrained import imagenet_checkpoint
from model import BACKBONES, MODELS, Network, build_model
from report.panels import ImageScores, draw_examples
from report.results import Results, draw_seed, seed_result
from utils import cli, from_flags
from utils.from_flags import UNTRAINED
from utils.view_flags import add_view_flags, check_view_flags, views_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_model_flags(
        parser, tuple(MODELS), BACKBONES,
        'checkpoint or snapshot folder; "imagenet" and "none" evaluate an untrained network',
    )  # fmt: skip
    cli.add_process_flags(parser)
    cli.add_few_shot_flags(parser)
    cli.add_seeds(parser, '--random-seed', 'one row of results for each, e.g. 123,234 (default: 123)')
    parser.add_argument(
        '--save',
        type=cli.parse_switch,
        nargs='?',
        const=True,
        default=False,
        help='write the predictions as palette PNG (--save 0: no)',
    )
    parser.add_argument(
        '--overlay',
        type=cli.not_negative,
        default=0,
        metavar='N',
        help='draw image, ground truth, prediction and errors of N images: in turn the worst, a median, the best, and '
        'one with novel classes',
    )
    parser.add_argument(
        '--plots',
        action='store_true',
        help='draw confusion matrix, IoU of each class, similarity of prototypes, and the support images',
    )
    parser.add_argument('--save-path', type=Path, help="folder of the results (default: the checkpoint's)")
    add_view_flags(parser)
    parser.set_defaults(model=None, backbone=None, os=None, base_size=None)
    args = parser.parse_args(argv)
    args.dataset = args.dataset if args.val_list else args.dataset.tested()
    cli.check(parser, args)
    check_view_flags(parser, args)
    if not args.val_list:
        parser.error(
            f'{args.dataset} has no images to evaluate (val: none in {args.dataset.card}); give --val-list, or see '
            f'what the network does: python -m utils.predict --restore-from {shlex.quote(args.restore_from)} '
            '--images FOLDER --save-path segmented'
        )
    if args.restore_from in UNTRAINED and not args.save_path:
        parser.error(f'--restore-from {args.restore_from} has no folder for the results; give --save-path')
    return args


def load_network(args: argparse.Namespace, data: FoldData, seed: int) -> tuple[Network, Checkpoint | None]:
    """Load the network that --restore-from names for a seed.

    Returns:
        The network, and the checkpoint that it came from; None for an untrained one.
    """
    if args.restore_from in UNTRAINED:
        torch.manual_seed(seed)
        net = build_model(args.backbone, len(data.base_ids), len(data.novel_ids), args.os, args.model)
        if args.restore_from == 'imagenet':
            imagenet_checkpoint(args.backbone).load_backbone_into(net)
        return net, None
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from, args.select, seed))
    num_novel = len(data.novel_ids) if checkpoint.class_counts[1] else 0
    options = checkpoint.config.get('options') if checkpoint.model == args.model else None
    net = build_model(args.backbone, len(data.base_ids), num_novel, args.os, args.model, options)
    net.background = data.spec.background is not None
    checkpoint.load_into(net, from_flags.network_config(args, data, seed))
    if data.novel_ids and not num_novel and is_main():
        print(f'note: {checkpoint.path} is of stage 1: it is evaluated on the base classes, and --shot has no effect')
    if checkpoint.unfinished_note and is_main():
        print(f'note: {checkpoint.unfinished_note}')
    trained_at = checkpoint.config.get('base_size', list(args.base_size))
    if trained_at != list(args.base_size) and is_main():
        theirs, ours = (','.join(map(str, size)) for size in (trained_at, args.base_size))
        print(f'note: {checkpoint.path} was validated with --base-size {theirs} in training; this evaluates at {ours}')
    return net, checkpoint


def taught_data(args: argparse.Namespace, data: FoldData, checkpoint: Checkpoint | None) -> FoldData:
    """The fold with those novel classes that utils.teach has taught the network of a checkpoint, where it has."""
    taught = taught_classes(checkpoint) if checkpoint else None
    if taught is None:
        return data
    known = data.spec.classes
    if unknown := [name for name, class_id in taught.items() if known.get(class_id) != name]:
        raise InputError(
            f'{checkpoint.path} was taught {some(unknown)}, no class of {args.dataset.name!r}. To see what it does: '
            f'python -m utils.predict --restore-from {shlex.quote(args.restore_from)} '
            '--images FOLDER --save-path segmented'
        )
    others = [known[class_id] for class_id in data.novel_ids if class_id not in taught.values()]
    if others and is_main():
        print(f'note: {checkpoint.path} was taught {some(taught)}; other novel classes are background: {some(others)}')
    return dataclasses.replace(data, taught=tuple(taught.values()))


def images_of_each_class(args: argparse.Namespace, checkpoint: Checkpoint | None) -> int | None:
    """How many support images each novel class had; None where they differ."""
    supports = checkpoint.config.get('supports', ()) if checkpoint else ()
    counts = {len(ids) for _, ids in supports} or {args.shot}
    return counts.pop() if len(counts) == 1 else None


def refuse_one_file_for_several_seeds(args: argparse.Namespace):
    """Raise InputError where several seeds share a file: its rows would look like independent runs."""
    if args.restore_from in UNTRAINED:
        return
    paths = {resolve_checkpoint(args.restore_from, args.select, seed) for seed in args.random_seed}
    if len(paths) < len(args.random_seed):
        raise InputError(
            f'--restore-from {args.restore_from} names {some(map(str, paths))} for several seeds {args.random_seed}; '
            'give one --random-seed, or a folder that holds best_{seed}.pth of each'
        )


def evaluate_seed(
    args: argparse.Namespace, data: FoldData, seed: int, *, device: torch.device, dtype: torch.dtype, folder: Path
) -> dict:
    """Evaluate one seed's network; write its confusion matrix and pictures to the folder.

    Returns:
        As `results.seed_result`.
    """
    net, checkpoint = load_network(args, data, seed)
    views = views_of(args, checkpoint, data.spec.scale_range)
    segmenter = Segmenter(net, device, dtype, args.compile, views)
    val_set = data.validation(args.base_size, with_novel=net.num_novel > 0, original_size=True)
    legend = data.legend.cut(net.num_logits)
    scores = ImageScores(legend, folder / f'predictions_{seed}' if args.save else None)
    counted = Counted(scores if args.save or args.overlay else None)
    confusion = segmenter.run(val_set, counted, batch_size=args.test_batch_size, num_workers=args.num_workers)
    images = counted.total()
    if is_main():
        with atomic_write(folder / f'confusion_{seed}.npy', 'wb') as file:
            np.save(file, confusion)
    if args.overlay:
        draw_examples(segmenter, val_set, scores, folder / f'overlay_{seed}', args.overlay)
    if args.plots and is_main():
        draw_seed(
            folder / 'plots', seed, confusion=confusion, prototypes=segmenter.net.prototypes(), legend=legend,
            data=data, shot=args.shot, chosen=dict(checkpoint.config.get('supports', ())) if checkpoint else None,
        )  # fmt: skip
    source = checkpoint.path if checkpoint else args.restore_from
    return seed_result(source, confusion, legend, images, len(val_set), args.base_size, str(views))


def other_seeds(args: argparse.Namespace) -> str:
    """All seeds of the folder that --restore-from names, with commas, where some were not evaluated; otherwise ''."""
    files = of_seeds(Path(args.restore_from) / f'{args.select}.pth')
    seeds = {int(path.stem.removeprefix(f'{args.select}_')) for path in files}
    return ','.join(map(str, sorted(seeds))) if seeds - set(args.random_seed) else ''


@exits_cleanly
def main(args: argparse.Namespace):
    with process_group(args.device, args.timeout_minutes, args.deterministic) as device:
        first = None
        if args.restore_from not in UNTRAINED:
            first = read_checkpoint(resolve_checkpoint(args.restore_from, args.select, args.random_seed[0]))
        from_flags.fill_network(args, first)
        data = taught_data(args, from_flags.fold_data(args), first)
        refuse_one_file_for_several_seeds(args)
        main_first(data.ensure_images)
        source = Path(args.restore_from)
        folder = args.save_path or cli.folder_of(source)
        check_writable(folder)
        dtype = precision(device, args.fp16)
        seeds = {
            seed: evaluate_seed(args, data, seed, device=device, dtype=dtype, folder=folder)
            for seed in args.random_seed
        }
        if is_main():
            num_logits = len(next(iter(seeds.values()))['iou'])
            results = Results(
                seeds=seeds, legend=data.legend.cut(num_logits), dataset=args.dataset.name, fold=args.fold,
                shot=images_of_each_class(args, first) if data.taught is None else None, precision=name_of(dtype),
                model=args.model, options=first.config.get('options', {}) if first else {},
            )  # fmt: skip
            results.write(folder)  # before it is printed, as a pipe may be closed
            print(f'\n{results.tables()}\nresults: {folder / "results.md"}')
            if others := other_seeds(args):
                print(f'note: {source} also has networks of other seeds; give --random-seed {others} to evaluate all')
            if args.plots:
                results.draw(folder / 'plots')


if __name__ == '__main__':
    main(parse_args())
