"""Evaluate a network on base and novel classes together, at the masks' original size.

    python test.py --dataset voc --data-dir VOC2012 --fold 0 --shot 5 --random-seed 123,234 --restore-from runs/5shot

--restore-from DIR evaluates DIR/best_{seed}.pth of each seed (DIR/last_{seed}.pth with --select last), as does
DIR/best.pth. A stage-1 checkpoint is evaluated on the base classes, novel pixels counting as background.

Writes to --save-path (default: the checkpoint's folder): results.json, results.md, confusion_{seed}.npy (int64,
row = ground truth, in the order of the logits); with --save, predictions_{seed}/ID.png (palette PNG of class ids, at
the original size); with --overlay N, overlay_{seed}/ID.png.
"""

import json
from pathlib import Path

import numpy as np
import torch

from dataset import DATASETS, FoldData
from model import BACKBONES, MODELS, build_model
from model.folding import folded
from utils import args as cli
from utils.checkpoint import count_classes, load_backbone, load_weights, network_config, resolve_checkpoint
from utils.distributed import is_main, main_first, process_group
from utils.engine import compile_features, evaluate, evaluation_loader, precision
from utils.errors import InputError, exits_cleanly, some
from utils.files import atomic_write, check_writable
from utils.metrics import SUMMARY, iou_per_class, summarize, summary_table
from utils.visualize import PredictionWriter

UNTRAINED = ('none', 'imagenet')  # --restore-from without a checkpoint


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser, DATASETS)
    cli.add_model_flags(
        parser, MODELS, BACKBONES,
        'checkpoint or snapshot folder; "imagenet" and "none" evaluate an untrained network',
    )  # fmt: skip
    cli.add_process_flags(parser)
    cli.add_few_shot_flags(parser)
    parser.add_argument(
        '--random-seed', type=cli.parse_seeds, default=(123,), help='one row each, e.g. 123,234 (default: 123)'
    )
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
        help='write N pictures of image, ground truth and prediction side by side',
    )
    parser.add_argument('--save-path', type=Path, help='folder of the results')
    args = cli.check(parser, parser.parse_args(argv), DATASETS)
    if args.restore_from in UNTRAINED and not args.save_path:
        parser.error(f'--restore-from {args.restore_from} has no folder of its own: give --save-path')
    return args


def load_network(args, data, seed):
    """The network that --restore-from means for a seed, and the file it came from (None for an untrained one)."""
    if args.restore_from in UNTRAINED:
        torch.manual_seed(seed)
        net = build_model(args.backbone, len(data.base_ids), len(data.novel_ids), args.os)
        if args.restore_from == 'imagenet':
            load_backbone(net, 'imagenet', args.backbone)
        return net, None
    path = resolve_checkpoint(args.restore_from, args.select, seed)
    num_novel = len(data.novel_ids) if count_classes(path)[1] else 0
    net = build_model(args.backbone, len(data.base_ids), num_novel, args.os)
    load_weights(net, path, network_config(args, seed))
    return net, path


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


def evaluate_seed(args, data, seed, device, folder):
    """Evaluate one seed's network; writes its pictures and confusion matrix.

    Returns:
        tuple: dict of 'checkpoint', the keys of `SUMMARY`, and 'iou' by class name, in percent; paths of the panels.
    """
    net, path = load_network(args, data, seed)
    net = folded(net.to(device), precision(device, args.fp16))
    if args.compile:
        compile_features(net)
    val_set = data.validation(args.base_size, with_novel=net.num_novel > 0, original_size=True)
    loader = evaluation_loader(val_set, args.test_batch_size, args.num_workers, device)
    names = data.spec.logit_names(data.fold)[: net.num_logits]
    writer = PredictionWriter(
        class_ids=(0, *data.base_ids, *data.novel_ids)[: net.num_logits],
        names=names,
        read_image=val_set.samples.read_image,
        prediction_folder=folder / f'predictions_{seed}' if args.save else None,
        overlay_folder=folder / f'overlay_{seed}',
        overlays=args.overlay if is_main() else 0,
        wanted=range(net.num_base + 1, net.num_logits) if net.num_novel else range(1, net.num_logits),
    )
    confusion = evaluate(net, loader, device, args.fp16, writer if args.save or args.overlay else None)
    if is_main():
        with atomic_write(folder / f'confusion_{seed}.npy', 'wb') as file:
            np.save(file, confusion)
    iou = dict(zip(names, iou_per_class(confusion).tolist(), strict=True))
    return {
        'checkpoint': str(path or args.restore_from),
        **summarize(confusion, net.num_base),
        'iou': iou,
    }, writer.pictures


def report(args, data, results, folder):
    """Print the table of all seeds and write results.md and results.json."""
    rows = {f'seed {seed}': result for seed, result in results.items()}
    columns = {key: [result[key] for result in results.values()] for key in SUMMARY}
    mean = {key: float(np.mean(values)) for key, values in columns.items()}
    std = {key: float(np.std(values)) for key, values in columns.items()}
    if len(results) > 1:
        rows['mean ± std'] = {key: f'{mean[key]:.2f} ± {std[key]:.2f}' for key in SUMMARY}
    names = list(next(iter(results.values()))['iou'])
    stage_2 = len(names) > 1 + len(data.base_ids)
    # which weights: 'best' for best_123.pth; from the files' names, as --select does not apply to a file
    weights = ', '.join({Path(r['checkpoint']).stem.removesuffix(f'_{seed}'): None for seed, r in results.items()})
    shots = f'{args.shot}-shot' if stage_2 else 'base classes only'
    title = f'{args.dataset} fold {args.fold}, {shots}, weights "{weights}", mIoU in %'
    classes = {name: [result['iou'][name] for result in results.values()] for name in names}
    header = f'| class | {" | ".join(f"seed {seed}" for seed in results)} |\n|{" --- |" * (len(results) + 1)}'
    body = ''.join(f'| {name} | {" | ".join(f"{v:.2f}" for v in values)} |\n' for name, values in classes.items())
    print(f'{title}\n{summary_table(rows)}')
    with atomic_write(folder / 'results.md') as file:
        file.write(f'{title}\n\n{summary_table(rows)}\n\nIoU per class in %:\n\n{header}\n{body}')
    summary = {'dataset': args.dataset, 'fold': args.fold, 'shot': args.shot if stage_2 else None, 'weights': weights}
    with atomic_write(folder / 'results.json') as file:
        json.dump(_nan_to_none(summary | {'seeds': results, 'mean': mean, 'std': std}), file, indent=2)


def _nan_to_none(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): _nan_to_none(item) for key, item in value.items()}
    return None if value != value else value


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
        results, pictures = {}, []
        for seed in args.random_seed:
            results[seed], drawn = evaluate_seed(args, data, seed, device, folder)
            pictures += drawn
        if is_main():
            report(args, data, results, folder)
            print(''.join(f'picture: {path}\n' for path in pictures), end='')


if __name__ == '__main__':
    main(parse_args())
