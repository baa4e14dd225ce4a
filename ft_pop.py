"""Stage 2: teach a base network the novel classes of its fold from a few images each.

    python ft_pop.py --dataset voc --data-dir VOC2012 --fold 0 --shot 5 --random-seed 123,234 \\
        --restore-from runs/base --snapshot-dir runs/5shot --fix-lr --update-base
    torchrun --nproc_per_node=2 ft_pop.py --batch-size 2 ...

Writes to the snapshot folder, for each seed: best_{seed}.pth, last_{seed}.pth, epoch_N_{seed}.pth with
--save-pred-every; args.json, log.txt, metrics.jsonl, tb/. `best` is chosen on the evaluation images, as the released
protocol does; `last` is always reported beside it.
"""

import torch

from core import signals
from core.errors import InputError, exits_cleanly
from dataset import DATASETS, Augmentation, FoldData
from engine.checkpoint import imagenet_checkpoint, network_config, read_checkpoint, resolve_checkpoint
from engine.distributed import is_main, main_first, process_group, wrap_ddp
from engine.evaluation import evaluate
from engine.feature_cache import cache_features
from engine.loaders import evaluation_loader, training_loader
from engine.logger import RunLogger
from engine.precision import autocast, compile_features, name_of, precision, to_device
from engine.resume import RunFolder, digests, locked, run_arguments
from engine.trainer import Trainer
from model import BACKBONES, MODELS, build_model
from model.kernels.fusing import fuse
from model.losses import pop_losses, pseudo_label
from report.tables import summary_table
from report.tensorboard import ValidationPanel
from utils import cli


def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser, DATASETS)
    cli.add_model_flags(
        parser, MODELS, BACKBONES,
        'base network: a stage-1 checkpoint or snapshot folder; "imagenet" and "none" leave the rest random',
    )  # fmt: skip
    cli.add_training_flags(
        parser,
        batch_size=1,
        num_epoch=500,
    )
    cli.add_seeds(parser, '--random-seed', 'seeds of the support draws, one run each, e.g. 123,234 (default: 123)')
    cli.add_process_flags(parser)
    cli.add_few_shot_flags(parser)
    parser.add_argument('--update-base', action='store_true', help='draw new base images as training goes on')
    parser.add_argument(
        '--update-epoch',
        type=cli.positive,
        default=1,
        metavar='N',
        help='with --update-base: draw every N epochs (default: 1)',
    )
    group = parser.add_argument_group('validation cache')
    group.add_argument(
        '--val-cache',
        choices=('auto', 'memory', 'disk', 'off'),
        default='auto',
        help="where the frozen network's validation features are kept; auto: in memory within the budget, else in the "
        'snapshot folder, else not at all (default)',
    )
    group.add_argument(
        '--val-cache-gb',
        type=cli.rate,
        default=8,
        metavar='GB',
        help='memory for them on each host; VOC at 473x473 takes 6 GB (default: 8)',
    )
    args = cli.check(parser, parser.parse_args(argv), DATASETS)
    if args.start_epoch and args.restore_from in ('none', 'imagenet'):
        parser.error(f'--start-epoch goes on from a stage-2 checkpoint; --restore-from {args.restore_from} is none')
    if not DATASETS[args.dataset].novel_ids(args.fold):
        parser.error(f'--fold {args.fold} has no novel classes, so there is nothing for stage 2 to learn')
    return args


def restore(args, data, device, snapshots):
    """The network that stage 2 starts from and freezes.

    That is the stage-1 network of --restore-from or a random one where it names none; of a run that is resumed, and
    with --start-epoch, the base parts of a stage-2 network.
    """
    torch.manual_seed(args.random_seed[0])
    base = build_model(args.backbone, len(data.base_ids), output_stride=args.os)
    earlier = snapshots.any_path()
    stage_2 = read_checkpoint(earlier) if earlier else None
    if args.start_epoch and not earlier:
        stage_2 = stage_2_checkpoint(args, args.random_seed[0])
    config = network_config(args, data.legend)
    if stage_2:
        net = build_model(args.backbone, len(data.base_ids), len(data.novel_ids), args.os)
        stage_2.load_into(net, config)
        base.load_state_dict({key: value for key, value in net.state_dict().items() if key in base.state_dict()})
    elif args.restore_from == 'imagenet':
        imagenet_checkpoint(args.backbone).load_backbone_into(base)
    elif args.restore_from != 'none':
        stage_1 = read_checkpoint(resolve_checkpoint(args.restore_from))
        if stage_1.class_counts[1]:
            raise InputError(
                f'{stage_1.path} has novel classes already; expected a checkpoint of stage 1 (train_base.py)'
            )
        stage_1.load_into(base, config)
    return base.to(device, memory_format=torch.channels_last)


def stage_2_checkpoint(args, seed):
    """The checkpoint that --start-epoch goes on from."""
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from, 'last', seed))
    if not checkpoint.class_counts[1]:
        raise InputError(f'--start-epoch goes on from a stage-2 checkpoint; {checkpoint.path} has no novel classes')
    return checkpoint


def improves(metrics, best):
    """The released protocol's rule: total mIoU not lower, and either 0.1 points higher or novel mIoU not lower."""
    if best is None:
        return True
    gain = metrics['total'] - best['total']
    return gain >= 0 and (gain > 0.1 or metrics['novel'] >= best['novel'])


def update_novel(args, data, seed, base, frozen, dtype, val_batches, snapshots, logger):
    """Run stage 2 for one seed.

    Args:
        args (Namespace): the flags.
        data (FoldData): of the fold.
        seed (int): of the support draw and all else.
        base (POP): the network to start from.
        frozen (POP): its folded copy, whose features training and validation use.
        dtype (torch.dtype): that convolutions run in.
        val_batches (iterable): validation images or their features.
        snapshots (RunFolder): the run's folder.
        logger (RunLogger): of this run.

    Returns:
        dict: validation results of 'best' and of 'last'.
    """
    torch.manual_seed(seed)
    device = base.base_emb.device
    augmentation = Augmentation(args.input_size, args.scale_range)
    redraw_every = args.update_epoch if args.update_base else 0
    train_set = data.few_shot_training(augmentation, args.shot, seed, redraw_every)
    train_loader = training_loader(
        train_set, args.batch_size, seed, args.num_workers, device, fill_last=True, parts=args.accumulate
    )

    net = build_model(args.backbone, len(data.base_ids), len(data.novel_ids), args.os)
    net.start_from(base)
    config = network_config(args, data.legend, seed)
    if args.start_epoch and not snapshots.holds(seed):
        earlier = stage_2_checkpoint(args, seed)
        earlier.load_into(net, config)
        if any(not torch.equal(net.state_dict()[key], value.cpu()) for key, value in base.state_dict().items()):
            raise InputError(
                f'{earlier.path} rests on another base network than the checkpoint of seed {args.random_seed[0]}'
            )
    net.freeze_base()
    net.to(device, memory_format=torch.channels_last)
    fast = net.on_features_of(frozen)
    parallel_net = wrap_ddp(fast, device)

    def losses(batch, share):
        support, base = batch['support'], batch['base']
        images = to_device(torch.cat([support['image'], base['image']]), device)  # [2B, 3, H, W]
        masks = torch.cat([support['mask'], base['mask']]).to(device, non_blocking=True).long()  # [2B, H, W]
        with autocast(device, dtype):
            logits = parallel_net(images)  # [2B, 1 + Kb + Kn, h, w]
        count = len(support['image'])
        base_masks = pseudo_label(masks[count:], logits[count:], net.num_base)
        return pop_losses(logits, torch.cat([masks[:count], base_masks]), net.novel_emb, net.base_emb, **share)

    panel = ValidationPanel(data.legend, data.samples('val', False).read_image)

    def validate():
        return evaluate(fast, val_batches, device, dtype, panel if is_main() else None)

    return Trainer(
        losses, validate, panel, net, parallel_net, train_loader, args, config, improves, snapshots, logger, seed,
        patience=args.num_epoch // 4,
    ).fit()  # fmt: skip


@exits_cleanly
def main(args):
    with process_group(args.device, args.timeout_minutes, args.deterministic) as device, locked(args.snapshot_dir):
        signals.listen()
        spec = DATASETS[args.dataset]
        data = FoldData(
            spec, args.data_dir, args.fold, args.train_list, args.val_list, args.filter_novel, args.skip_bad_images
        )
        notes = main_first(data.ensure_lists)
        main_first(data.check_validation_masks)
        data.check_support(args.shot, args.random_seed)
        lists = {'validation list': data.val_list}
        lists |= {f'list of base class {class_id}': data.lists.base_class(class_id) for class_id in data.base_ids}
        if args.restore_from not in ('none', 'imagenet') and not args.start_epoch:
            lists['base network'] = resolve_checkpoint(args.restore_from)
        dtype = precision(device, args.fp16)
        common = run_arguments(args, dtype, lists)
        arguments = {
            seed: common | {'random_seed': seed} | digests({'support list': data.lists.support(args.shot, seed)})
            for seed in args.random_seed
        }
        snapshots = RunFolder(args.snapshot_dir, arguments, args.resume, args.overwrite, data.legend.classes)
        val_set = data.validation(args.base_size, with_novel=True, limit=args.val_limit)
        # with a cache the loader is gone through once
        val_loader = evaluation_loader(
            val_set, args.test_batch_size, args.num_workers, device, keep_workers=args.val_cache == 'off'
        )
        base = restore(args, data, device, snapshots)
        snapshots.make_room()
        frozen = fuse(base, dtype)
        if args.compile:
            compile_features(frozen)
        logger = RunLogger(args.snapshot_dir, vars(args), snapshots)
        if args.restore_from == 'none':
            notes.append('--restore-from none: the base network is random and stays so')
        for note in notes:
            logger.info(f'note: {note}')
        logger.info(
            f'{args.shot}-shot, novel classes {data.novel_ids}, {len(val_set)} validation images; '
            f'computing in {name_of(dtype)}'
        )
        val_batches = cache_features(frozen, val_loader, args.base_size, device, dtype, args, logger)

        rows = {}
        for seed in args.random_seed:
            results = update_novel(args, data, seed, base, frozen, dtype, val_batches, snapshots, logger)
            for which, metrics in results.items():
                mark = ' (selected)' if which == args.select else ''
                rows[f'seed {seed}, {which}{mark}'] = metrics
        logger.info(f'validation at {args.base_size[0]}x{args.base_size[1]}, mIoU in %:\n{summary_table(rows)}')
        logger.close()


if __name__ == '__main__':
    main(parse_args())
