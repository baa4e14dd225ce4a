"""Stage 1: learn the base classes of a fold.

    python train_base.py --dataset voc --data-dir VOC2012 --restore-from resnet50_v2.pth --snapshot-dir runs/base
    torchrun --nproc_per_node=4 train_base.py --dataset coco --data-dir COCO --restore-from resnet50_v2.pth \\
        --snapshot-dir runs/coco_base

Writes to the snapshot folder: best.pth (highest base mIoU on the validation list, background included), last.pth,
epoch_N.pth with --save-pred-every, args.json, log.txt, metrics.jsonl, tb/.
"""

import argparse

import torch

from core import signals
from core.errors import InputError, exits_cleanly
from dataset import DATASETS, Augmentation, FoldData
from engine.checkpoint import imagenet_checkpoint, network_config, read_checkpoint, resolve_checkpoint
from engine.distributed import is_main, main_first, process_group, world_size, wrap_ddp
from engine.evaluation import evaluate
from engine.loaders import evaluation_loader, training_loader
from engine.logger import RunLogger
from engine.precision import autocast, compile_features, name_of, precision, to_device
from engine.resume import RunFolder, locked, run_arguments
from engine.trainer import Trainer
from model import BACKBONES, MODELS, build_model
from model.kernels.malloc import return_freed_memory
from model.losses import pop_losses
from report.tensorboard import ValidationPanel
from utils import cli


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser, DATASETS)
    cli.add_model_flags(
        parser, MODELS, BACKBONES,
        'backbone weights: a file, "imagenet" (torchvision\'s) or "none"; or start from a stage-1 checkpoint',
    )  # fmt: skip
    cli.add_training_flags(
        parser,
        batch_size=None,
        num_epoch=50,
    )
    parser.add_argument(
        '--random-seed', type=cli.not_negative, default=123, help='of every random choice (default: 123)'
    )
    cli.add_process_flags(parser)
    parser.add_argument(
        '--sync-bn',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='batch statistics over all GPUs (default: on; CPUs have none)',
    )
    args = cli.check(parser, parser.parse_args(argv), DATASETS)
    smallest = 2 * world_size() * args.accumulate
    if args.batch_size < smallest and not args.fix_bn:
        parser.error(
            f'--batch-size {args.batch_size}: batch normalisation needs two images per process and part, {smallest} in '
            'all; use that, or --fix-bn'
        )
    return args


def restore(net, args, config):
    """Load what --restore-from names: nothing, a backbone, or a whole stage-1 network, of this `network_config`."""
    source = None
    if args.restore_from == 'imagenet':
        source = imagenet_checkpoint(args.backbone)
    elif args.restore_from != 'none':
        source = read_checkpoint(resolve_checkpoint(args.restore_from, 'last'))
    whole = source is not None and source.holds_network
    if args.start_epoch and not whole:
        raise InputError(f'--start-epoch goes on from a stage-1 checkpoint; --restore-from {args.restore_from} is none')
    if whole:
        source.load_into(net, config)
    elif source is not None:
        source.load_backbone_into(net)


@exits_cleanly
def main(args):
    with process_group(args.device, args.timeout_minutes, args.deterministic) as device, locked(args.snapshot_dir):
        signals.listen()
        torch.manual_seed(args.random_seed)
        spec = DATASETS[args.dataset]
        data = FoldData(
            spec, args.data_dir, args.fold, args.train_list, args.val_list, args.filter_novel, args.skip_bad_images
        )
        notes = main_first(data.ensure_lists)
        main_first(data.check_validation_masks)
        lists = {'training list': data.lists.train, 'validation list': data.val_list}
        dtype = precision(device, args.fp16)
        arguments = {None: run_arguments(args, dtype, lists)}
        snapshots = RunFolder(args.snapshot_dir, arguments, args.resume, args.overwrite, data.legend.classes)
        train_set = data.base_training(Augmentation(args.input_size, args.scale_range), args.random_seed)
        val_set = data.validation(args.base_size, with_novel=False, limit=args.val_limit)
        train_loader = training_loader(
            train_set, args.batch_size, args.random_seed, args.num_workers, device, parts=args.accumulate
        )
        val_loader = evaluation_loader(val_set, args.test_batch_size, args.num_workers, device)

        config = network_config(args, data.legend)
        net = build_model(args.backbone, len(data.base_ids), output_stride=args.os)
        if not snapshots.any_path():
            restore(net, args, config)
        snapshots.make_room()
        if args.freeze_backbone:
            net.backbone.requires_grad_(False)
        if args.fix_bn:
            net.fix_batch_norm()
        net.to(device, memory_format=torch.channels_last)
        if args.compile:
            compile_features(net)
        parallel_net = wrap_ddp(net, device, args.sync_bn)
        logger = RunLogger(args.snapshot_dir, vars(args), snapshots)
        for note in notes:
            logger.info(f'note: {note}')
        logger.info(
            f'{len(train_set)} training and {len(val_set)} validation images, base classes {data.base_ids}; '
            f'computing in {name_of(dtype)}'
        )

        def losses(batch, share):
            images = to_device(batch['image'], device)  # [B, 3, H, W]
            masks = batch['mask'].to(device, non_blocking=True).long()  # [B, H, W]
            with autocast(device, dtype):
                logits = parallel_net(images)  # [B, 1 + Kb, h, w]
            return_freed_memory(device)
            return pop_losses(logits, masks, net.base_emb, **share)

        panel = ValidationPanel(data.legend.cut(net.num_logits), val_set.samples.read_image)

        def validate():
            return evaluate(net, val_loader, device, dtype, panel if is_main() else None)

        def improves(metrics, best):
            return best is None or metrics['base'] >= best['base']

        Trainer(
            losses, validate, panel, net, parallel_net, train_loader, args, config, improves, snapshots, logger
        ).fit()
        logger.close()


if __name__ == '__main__':
    main(parse_args())
