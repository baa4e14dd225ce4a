"""Stage 1: learn the base classes of a fold (paper, section 3.2).

    python train_base.py --dataset voc --data-dir VOC2012 --restore-from resnet50_v2.pth --snapshot-dir runs/base
    torchrun --nproc_per_node=4 train_base.py --dataset coco --data-dir COCO --restore-from resnet50_v2.pth \\
        --snapshot-dir runs/coco_base

Writes to the snapshot folder: best.pth (highest base mIoU on the validation list, background included), last.pth,
epoch_N.pth with --save-pred-every, args.json, log.txt, metrics.jsonl, tb/.
"""

import torch

from dataset import DATASETS, Augmentation, FoldData
from model import BACKBONES, MODELS, build_model
from model.losses import pop_losses
from utils import args as cli
from utils.checkpoint import (
    holds_network,
    load_backbone,
    load_weights,
    network_config,
    resolve_checkpoint,
    save_checkpoint,
)  # fmt: skip
from utils.distributed import main_first, parallel, process_group
from utils.engine import autocast, evaluate, evaluation_loader, to_device, train_epoch, training_loader
from utils.errors import exits_cleanly
from utils.logger import RunLogger
from utils.metrics import summarize
from utils.optim import Optimization


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser, DATASETS)
    cli.add_model_flags(
        parser, MODELS, BACKBONES,
        'backbone weights: a file, "imagenet" (torchvision\'s) or "none"; a checkpoint of this script continues it',
    )  # fmt: skip
    cli.add_training_flags(parser, batch_size=None, num_epoch=50, seed_type=cli.parse_seed, seed=123)
    return cli.check(parser, parser.parse_args(argv), DATASETS)


def restore(net, args):
    """Load what --restore-from names: nothing, a backbone, or a whole stage-1 network."""
    if args.restore_from == 'none':
        return
    if args.restore_from == 'imagenet':
        load_backbone(net, 'imagenet', args.backbone)
        return
    path = resolve_checkpoint(args.restore_from, 'last')
    if holds_network(path):
        load_weights(net, path, network_config(args))
    else:
        load_backbone(net, path, args.backbone)


@exits_cleanly
def main(args):
    with process_group(args.device) as device:
        torch.manual_seed(args.random_seed)
        spec = DATASETS[args.dataset]
        data = FoldData(spec, args.data_dir, args.fold, args.train_list, args.val_list, args.filter_novel)
        main_first(data.ensure_lists)
        train_set = data.base_training(Augmentation(args.input_size, args.scale_range), args.random_seed)
        val_set = data.validation(args.base_size, with_novel=False)
        train_loader = training_loader(train_set, args.batch_size, args.random_seed, args.num_workers, device)
        val_loader = evaluation_loader(val_set, args.test_batch_size, args.num_workers, device)

        net = build_model(args.backbone, len(data.base_ids), output_stride=args.os)
        restore(net, args)
        if args.freeze_backbone:
            net.backbone.requires_grad_(False)
        if args.fix_bn:
            net.fix_batch_norm()
        net.to(device, memory_format=torch.channels_last)
        parallel_net = parallel(net, device)

        optimization = Optimization(
            net, args.learning_rate, args.momentum, args.weight_decay,
            total_steps=args.num_epoch * len(train_loader), first_step=args.start_epoch * len(train_loader),
            power=0 if args.fix_lr else args.power, scale_loss=args.fp16 and device.type == 'cuda',
        )  # fmt: skip
        logger = RunLogger(args.snapshot_dir, vars(args))
        logger.info(f'{len(train_set)} training and {len(val_set)} validation images, base classes {data.base_ids}')

        def step(batch):
            images = to_device(batch['image'], device)  # [B, 3, H, W]
            masks = batch['mask'].to(device, non_blocking=True).long()  # [B, H, W]
            with autocast(device, args.fp16):
                logits = parallel_net(images)  # [B, 1 + Kb, h, w]
            return pop_losses(logits, masks, net.base_emb)

        best = -1.0
        for epoch in range(args.start_epoch, args.num_epoch):
            parallel_net.train()
            train_epoch(step, train_loader, optimization, logger, epoch, args.num_epoch, args.print_frequency)

            done, metrics = epoch + 1, {}
            if done % args.val_every == 0 or done == args.num_epoch:
                metrics = summarize(evaluate(net, val_loader, device, args.fp16), net.num_base)
                logger.record('val', done * len(train_loader), metrics, epoch=done)
                if metrics['base'] >= best:
                    best = metrics['base']
                    save_checkpoint(args.snapshot_dir / 'best.pth', net, network_config(args), done, metrics)
                logger.info(f'epoch {done}: base mIoU {metrics["base"]:.2f} %, best {best:.2f} %')
            save_checkpoint(args.snapshot_dir / 'last.pth', net, network_config(args), done, metrics)
            if args.save_pred_every and done % args.save_pred_every == 0:
                save_checkpoint(args.snapshot_dir / f'epoch_{done}.pth', net, network_config(args), done, metrics)
        logger.close()


if __name__ == '__main__':
    main(parse_args())
