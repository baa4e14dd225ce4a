"""Evaluate a network on base and novel classes together, at the masks' original size.

    python test.py --dataset voc --data-dir VOC2012 --fold 0 --shot 5 --random-seed 123,234 --restore-from runs/5shot

--restore-from DIR evaluates DIR/best_{seed}.pth of each seed (DIR/last_{seed}.pth with --select last), as does
DIR/best.pth. A stage-1 checkpoint is evaluated on the base classes, novel pixels counting as background.

Writes to --save-path (default: the checkpoint's folder): results.json, results.md, confusion_{seed}.npy (int64,
row = ground truth, in the order of the logits); with --save, predictions_{seed}/ID.png (palette PNG of class ids, at
the original size); with --overlay N, overlay_{seed}/*.png; with --plots, plots/*.png.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from core.errors import InputError, exits_cleanly, some
from core.files import atomic_write, check_writable, json_ready
from core.ranks import is_main
from dataset import DATASETS, FoldData
from engine.checkpoint import imagenet_checkpoint, network_config, read_checkpoint, resolve_checkpoint
from engine.distributed import all_gather, main_first, on_main, process_group
from engine.evaluation import evaluate
from engine.loaders import evaluation_loader
from engine.metrics import SUMMARY, iou_per_class, summarize
from engine.precision import compile_features, name_of, precision
from model import BACKBONES, MODELS, build_model
from model.kernels.fusing import fuse
from report.figures import confusion_figure, iou_figure, save_figure, similarity_figure, support_figure
from report.panels import ImageScores, PanelWriter, choose_telling
from report.tables import class_table, mean_and_std, summary_table
from utils import cli

UNTRAINED = ('none', 'imagenet')  # --restore-from without a checkpoint


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_model_flags(
        parser, MODELS, BACKBONES,
        'checkpoint or snapshot folder; "imagenet" and "none" evaluate an untrained network',
    )  # fmt: skip
    cli.add_process_flags(parser)
    cli.add_few_shot_flags(parser)
    cli.add_seeds(parser, '--random-seed', 'one row each, e.g. 123,234 (default: 123)')
    parser.add_argument(
        '--save',
        type=cli.parse_switch,
        nargs='?',
        const=True,
        default=False,
        help='write the predictions as palette PNG (--save 0: do not)',
    )
    parser.add_argument(
        '--overlay',
        type=cli.not_negative,
        default=0,
        metavar='N',
        help='write N panels of image, ground truth, prediction and errors: of the worst, median and best images and '
        'of images with novel classes, in turn',
    )
    parser.add_argument(
        '--plots',
        action='store_true',
        help='draw confusion matrix, IoU of each class, similarity of prototypes, and the support images',
    )
    parser.add_argument('--save-path', type=Path, help='folder of the results')
    args = cli.check(parser, parser.parse_args(argv))
    if args.restore_from in UNTRAINED and not args.save_path:
        parser.error(f'--restore-from {args.restore_from} has no folder of its own: give --save-path')
    return args


def load_network(args, data, seed):
    """The network that --restore-from means for a seed, and the file it came from (None for an untrained one)."""
    if args.restore_from in UNTRAINED:
        torch.manual_seed(seed)
        net = build_model(args.backbone, len(data.base_ids), len(data.novel_ids), args.os)
        if args.restore_from == 'imagenet':
            imagenet_checkpoint(args.backbone).load_backbone_into(net)
        return net, None
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from, args.select, seed))
    num_novel = len(data.novel_ids) if checkpoint.class_counts[1] else 0
    net = build_model(args.backbone, len(data.base_ids), num_novel, args.os)
    checkpoint.load_into(net, network_config(args, data.legend.classes, seed))
    trained_at = checkpoint.config.get('base_size', list(args.base_size))
    if trained_at != list(args.base_size) and is_main():
        height, width = trained_at
        print(f'note: {checkpoint.path} was validated with --base-size {height},{width} while it was trained')
    return net, checkpoint.path


def refuse_one_file_for_several_seeds(args):
    """Rows that come from one file would pass for independent runs."""
    if args.restore_from in UNTRAINED:
        return
    paths = {resolve_checkpoint(args.restore_from, args.select, seed) for seed in args.random_seed}
    if len(paths) < len(args.random_seed):
        raise InputError(
            f'--restore-from {args.restore_from} means {some(map(str, paths))} for several seeds {args.random_seed}; '
            'give one --random-seed, or the folder that holds best_{seed}.pth of each'
        )


def evaluate_seed(args, data, seed, device, dtype, folder):
    """Evaluate one seed's network; writes its confusion matrix and pictures.

    Returns:
        dict: 'checkpoint', the keys of `SUMMARY`, and 'iou' by class name, in percent.
    """
    net, path = load_network(args, data, seed)
    net = fuse(net.to(device), dtype)
    if args.compile:
        compile_features(net)
    val_set = data.validation(args.base_size, with_novel=net.num_novel > 0, original_size=True)
    loader = evaluation_loader(val_set, args.test_batch_size, num_workers=args.num_workers, device=device)
    legend = data.legend.cut(net.num_logits)
    scores = ImageScores(legend, folder / f'predictions_{seed}' if args.save else None)
    confusion = evaluate(net, loader, device, dtype, scores if args.save or args.overlay else None)
    if is_main():
        with atomic_write(folder / f'confusion_{seed}.npy', 'wb') as file:
            np.save(file, confusion)
    if args.overlay:
        draw_overlays(args, net, val_set, scores, folder / f'overlay_{seed}', device, dtype)
    if args.plots and is_main():
        draw_plots(args, data, net, legend, confusion, folder / 'plots', seed)
    return {
        'checkpoint': str(path or args.restore_from),
        **summarize(confusion, net.num_base),
        'iou': dict(zip(legend.names, iou_per_class(confusion).tolist(), strict=True)),
    }


def draw_overlays(args, net, val_set, scores, folder, device, dtype):
    """Segment telling images once more, and draw them."""
    all_scores = {image_id: score for part in all_gather(scores.scores) for image_id, score in part.items()}
    chosen = choose_telling(all_scores, args.overlay)
    on_main(lambda: remove_pictures(folder))
    panels = PanelWriter(scores.legend, val_set.samples.read_image, folder, chosen, all_scores)
    indices = {image_id: i for i, image_id in enumerate(val_set.image_ids)}
    subset = Subset(val_set, [indices[image_id] for image_id in chosen])
    evaluate(net, evaluation_loader(subset, 1, num_workers=0, device=device), device, dtype, panels)
    if is_main():
        print(''.join(f'picture: {panels.path(image_id)}\n' for image_id in chosen), end='')


def remove_pictures(folder):
    """Remove the panels of an earlier evaluation, whose examples were others."""
    for path in folder.glob('*.png'):
        path.unlink(missing_ok=True)


def draw_plots(args, data, net, legend, confusion, folder, seed):
    """Draw what there is to see of one seed."""
    figures = {
        'confusion': confusion_figure(confusion, legend),
        'prototypes': similarity_figure(net.prototypes(), legend),
    }
    if net.num_novel:
        try:
            ids = data.support_ids(args.shot, seed)
            samples = data.samples('train', False, ids)
            figures['support'] = support_figure([(i, *samples.read(i)) for i in ids], legend, args.shot)
        except InputError as error:  # the rest does not need the training images
            print(f'no picture of the support images: {error}')
    for name, figure in figures.items():
        save_figure(folder / f'{name}_{seed}.png', figure)
        print(f'picture: {folder / name}_{seed}.png')


def report(args, data, results, dtype, folder):
    """Print the tables of all seeds and write results.md and results.json."""
    rows = {f'seed {seed}': result for seed, result in results.items()}
    columns = {key: [result[key] for result in results.values()] for key in SUMMARY}
    mean = {key: float(np.mean(values)) for key, values in columns.items()}
    std = {key: float(np.std(values)) for key, values in columns.items()}
    if len(results) > 1:
        rows['mean ± std'] = {key: mean_and_std(values) for key, values in columns.items()}
    legend = data.legend.cut(len(next(iter(results.values()))['iou']))
    # which weights: 'best' for best_123.pth; from the files' names, as --select does not apply to a file
    weights = ', '.join({Path(r['checkpoint']).stem.removesuffix(f'_{seed}'): None for seed, r in results.items()})
    shots = f'{args.shot}-shot' if legend.novel_labels else 'base classes only'
    title = f'{args.dataset} fold {args.fold}, {shots}, weights "{weights}"'
    text = f'{title}, mIoU in %\n\n{summary_table(rows)}\n'
    for kind, names in (
        ('background and base', legend.names[: legend.num_base + 1]),
        ('novel', legend.names[legend.num_base + 1 :]),
    ):
        if names:
            ious = {f'seed {seed}': {name: r['iou'][name] for name in names} for seed, r in results.items()}
            text += f'\nIoU of {kind} classes in %\n\n{class_table(ious)}\n'
    print(f'\n{text}')
    with atomic_write(folder / 'results.md') as file:
        file.write(text)
    summary = {
        'dataset': args.dataset, 'fold': args.fold, 'shot': args.shot if legend.novel_labels else None,
        'weights': weights, 'precision': name_of(dtype),
    }  # fmt: skip
    with atomic_write(folder / 'results.json') as file:
        json.dump(json_ready(summary | {'seeds': results, 'mean': mean, 'std': std}), file, indent=2)
    if args.plots:
        ious = np.array([list(result['iou'].values()) for result in results.values()])
        save_figure(folder / 'plots' / 'iou.png', iou_figure(ious, legend, title))
        print(f'picture: {folder / "plots" / "iou.png"}')


@exits_cleanly
def main(args):
    with process_group(args.device, args.timeout_minutes, args.deterministic) as device:
        spec = DATASETS[args.dataset]
        data = FoldData(
            spec, args.data_dir, args.fold, args.train_list, args.val_list, args.filter_novel, args.skip_bad_images
        )
        refuse_one_file_for_several_seeds(args)
        main_first(data.ensure_images)
        source = Path(args.restore_from)
        folder = args.save_path or (source if source.is_dir() else source.parent)
        check_writable(folder)
        dtype = precision(device, args.fp16)
        results = {seed: evaluate_seed(args, data, seed, device, dtype, folder) for seed in args.random_seed}
        if is_main():
            report(args, data, results, dtype, folder)


if __name__ == '__main__':
    main(parse_args())
