"""Stage 2: teach a base network the novel classes of its fold from a few images each.

    python ft_pop.py --dataset voc --data-dir VOC2012 --fold 0 --shot 5 --random-seed 123,234 \\
        --restore-from runs/base --snapshot-dir runs/5shot --fix-lr --update-base
    torchrun --nproc_per_node=2 ft_pop.py --batch-size 2 ...

Writes to the snapshot folder, for each seed: best_{seed}.pth, last_{seed}.pth, epoch_N_{seed}.pth with
--save-pred-every; args.json, log.txt, metrics.jsonl, tb/. `best` is selected on the evaluation images, as in the
released protocol, so it is optimistically biased; `last` is always reported beside it. Without a validation list
there is only `last`. With --model pspnet_capl or pspnet_lda nothing is trained: the novel classes are learned from the
whole support images, as evaluation reads them, without augmentation, and validated once.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from core.errors import InputError, exits_cleanly, some
from dataset import Augmentation, FewShotDataset, FoldData, SegmentationDataset
from dataset.views import KeptPairs, base_views, support_views
from engine.checkpoint import Checkpoint, read_checkpoint, resolve_checkpoint
from engine.config import check_config
from engine.distributed import main_first, wrap_ddp
from engine.features import FeatureKeeper, FrozenFeatures, KeptFeatures, LabelledFeatures, join
from engine.loaders import training_loader
from engine.precision import autocast, compile_features, name_of, precision, to_device
from engine.pretrained import imagenet_checkpoint
from engine.resume import RunFolder, digests, run_arguments
from engine.run import Run
from engine.stage import Stage
from engine.supports import Supports
from model import BACKBONES, MODELS, Head, Network, base_model, build_model
from model.kernels import fuse
from model.network import Labelled
from report.tables import summary_table
from report.tensorboard import ValidationPanel
from utils import cli, from_flags
from utils.data_flags import add_support_flags
from utils.feature_flags import add_feature_flags, feature_keeper
from utils.from_flags import UNTRAINED
from utils.method_flags import add_method_flags, add_recipe_flag, check_method_flags, method_in_words, method_options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.training_parser(
        __doc__, tuple(MODELS), BACKBONES, batch_size=1, num_epoch=500,
        restore_help='base network: a stage-1 checkpoint or its folder; "imagenet" and "none" leave the rest random',
    )  # fmt: skip
    cli.add_seeds(parser, '--random-seed', 'seeds of the support draws, one run each, e.g. 123,234 (default: 123)')
    cli.add_few_shot_flags(parser)
    add_support_flags(parser)
    parser.add_argument('--update-base', action='store_true', help='draw new base images during training')
    parser.add_argument(
        '--update-epoch', type=cli.positive, default=1, metavar='N',
        help='with --update-base: draw every N epochs (default: 1)',
    )  # fmt: skip
    add_method_flags(parser)
    add_feature_flags(parser)
    parser.set_defaults(backbone=None, os=None, base_size=None, input_size=None)
    add_recipe_flag(parser, argv)
    args = parser.parse_args(argv)
    check_method_flags(parser, args)
    cli.check(parser, args)
    if args.start_epoch and args.restore_from in UNTRAINED:
        parser.error(f'--start-epoch needs a stage-2 checkpoint; --restore-from {args.restore_from} is none')
    if args.views and args.features == 'off':
        parser.error('--views trains on kept features; give --features another place than off')
    if args.support_list and (args.nested or len(args.random_seed) > 1):
        parser.error('--support-list names the support images of one run; give one --random-seed, and no --nested')
    if not args.dataset.novel_ids(args.fold):
        parser.error(f'--fold {args.fold} has no novel classes, so there is nothing for stage 2 to learn')
    return args


@dataclass(kw_only=True)
class NovelStage(Stage):
    """Learns the novel classes, on maps of the frozen base network.

    Attributes:
        frozen: the base network, fused; gives the maps.
        kept: maps of the support and base views where these are kept (--views).
        base_views: as `Network.calibrate` takes them.
    """

    frozen: Network
    kept: dict[str, KeptFeatures] | None = None
    base_views: Iterable[Labelled] = ()

    def losses(self, batch: dict, pixel_weight: float, micro_batches: int) -> dict[str, torch.Tensor]:
        support, base = batch['support'], batch['base']
        # moved before they are joined: the halves are pinned, what is joined of them is not
        masks = torch.cat([half['mask'].to(self.device, non_blocking=True) for half in (support, base)]).long()
        with autocast(self.device, self.dtype):
            logits = self.model(self.maps(batch))  # [2B, 1 + Kb + Kn, h, w]
        return self.net.novel_losses(logits, masks, pixel_weight=pixel_weight, micro_batches=micro_batches)

    def maps(self, batch: dict) -> dict[str, torch.Tensor]:
        """What the head classifies of a batch of B pairs: name -> [2B, channels, h, w], the support images first."""
        if self.kept:
            return join(self.kept[name].take(batch[name]['row']) for name in ('support', 'base'))
        images = [to_device(batch[name]['image'], self.device) for name in ('support', 'base')]
        return self.frozen.maps(torch.cat(images))

    def calibrate(self):
        """Let the network calibrate on the base views."""
        self.net.calibrate(self.base_views)

    @staticmethod
    def improves(metrics: dict, best: dict | None) -> bool:
        """The released protocol's rule: total mIoU not lower, and either 0.1 points higher or novel mIoU not lower."""
        if best is None:
            return True
        gain = metrics['total'] - best['total']
        return gain >= 0 and (gain > 0.1 or metrics['novel'] >= best['novel'])


def read_source(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint that --restore-from names, of stage 1 unless --start-epoch is given; None where it names none."""
    if args.restore_from in UNTRAINED:
        return None
    if args.start_epoch:
        return start_epoch_checkpoint(args, args.random_seed[0])
    source = read_checkpoint(resolve_checkpoint(args.restore_from))
    if source.class_counts[1]:
        raise InputError(f'{source.path} has novel classes already; expected a checkpoint of stage 1 (train_base.py)')
    return source


def check_source(args: argparse.Namespace, data: FoldData, source: Checkpoint | None):
    """Raise InputError if the source is of another method, of other classes or of another fold than the flags say."""
    if source:
        model = args.model if args.start_epoch else base_model(args.model)
        check_config(source.path, source.config, from_flags.network_config(args, data) | {'model': model})


def restore_base(args: argparse.Namespace, data: FoldData, folder: RunFolder, source: Checkpoint | None) -> Network:
    """The network that stage 2 starts from: of --restore-from, or the base parts of the stage-2 run to resume."""
    torch.manual_seed(args.random_seed[0])
    base = build_network(args, data)
    if folder.any_path() and base.keeps_base:  # then a checkpoint of stage 2 holds the base network
        read_checkpoint(folder.any_path()).load_base_into(base, from_flags.network_config(args, data))
    elif source:
        source.load_base_into(base)
    elif args.restore_from == 'imagenet':
        imagenet_checkpoint(args.backbone).load_backbone_into(base)
    return base


def start_epoch_checkpoint(args: argparse.Namespace, seed: int) -> Checkpoint:
    """The stage-2 checkpoint that --start-epoch continues from."""
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from, 'last', seed))
    if not checkpoint.class_counts[1]:
        raise InputError(f'--start-epoch needs a stage-2 checkpoint; {checkpoint.path} has no novel classes')
    return checkpoint


def build_network(args: argparse.Namespace, data: FoldData, num_novel: int = 0) -> Network:
    """A network of the flags, with random weights."""
    net = build_model(args.backbone, len(data.base_ids), num_novel, args.os, args.model, method_options(args))
    net.background = args.dataset.background is not None
    return net


def build_novel(
    args: argparse.Namespace, data: FoldData, seed: int, *, base: Network, supports: Iterable[Labelled],
    base_views: Iterable[Labelled], folder: RunFolder,
) -> Network:  # fmt: skip
    """The network to train for a seed: the base network with what stage 2 adds; all else is frozen."""
    net = build_network(args, data, len(data.novel_ids))
    net.start_from(base)
    net.to(next(base.parameters()).device, memory_format=torch.channels_last)
    if not folder.holds(seed):  # a run that is resumed has learned from them
        net.start_from_supports(supports, base_views)
    net.freeze_base()
    if args.start_epoch and not folder.holds(seed):
        earlier = start_epoch_checkpoint(args, seed)
        earlier.load_into(net, from_flags.network_config(args, data, seed))
        trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        frozen = {name: value for name, value in base.state_dict().items() if name not in trained}
        if any(not torch.equal(net.state_dict()[name], value) for name, value in frozen.items()):
            raise InputError(
                f'{earlier.path} has another base network than the checkpoint of seed {args.random_seed[0]}'
            )
    return net


def few_shot_set(args: argparse.Namespace, data: FoldData, seed: int) -> FewShotDataset:
    """Training data of a seed; InputError if its support images, or base images to train on, cannot be drawn."""
    train_set = data.few_shot_training(
        Augmentation(args.input_size, args.scale_range), args.shot, seed,
        redraw_every=args.update_epoch if args.update_base else 0,
    )  # fmt: skip
    if draws_base_images(args):
        train_set.base_images(epoch=0)
    return train_set


def draws_base_images(args: argparse.Namespace) -> bool:
    """Whether epochs draw base images; others train on kept views, or not at all."""
    return MODELS[args.model].TRAINS_NOVEL and not args.views


def keep_base_views(
    args: argparse.Namespace, pairs: FewShotDataset, keeper: FeatureKeeper
) -> KeptFeatures | FrozenFeatures:
    """Features of the pool of base views, which is the same for all seeds."""
    views = base_views(pairs.base, pairs.class_lists, args.base_views)
    return keeper.keep(views, 'base view', args.input_size, whole=True)


def check_kept(features: KeptFeatures | FrozenFeatures) -> KeptFeatures:
    """The features of views to train on; InputError where there was no room to keep them."""
    if not isinstance(features, KeptFeatures):
        raise InputError('--views: there is no room to keep the features; raise --features-gb, or keep fewer views')
    return features


def train_seed(
    args: argparse.Namespace,
    data: FoldData,
    seed: int,
    *,
    train_set: FewShotDataset,
    base: Network,
    keeper: FeatureKeeper,
    pool: FrozenFeatures | KeptFeatures | None,
    val_batches: FrozenFeatures | KeptFeatures | None,
    run: Run,
) -> dict[str, dict]:
    """Run stage 2 for one seed: `base` is what it starts from, the keeper's fused copy of it gives the features.

    `pool` are the features of `keep_base_views`, where --views or the method needs them.

    Returns:
        Validation metrics of 'best' and of 'last'; none without a validation list.
    """
    device, kept, pairs = keeper.device, None, train_set
    support = pairs.support
    whole = SegmentationDataset(support.image_ids, support.samples, fit_size=args.base_size, resize_mask=True)
    counts = {args.dataset.classes[c]: len(ids) for c, ids in data.supports(args.shot, seed).items()}
    supports = Supports(whole, counts, keeper.frozen, device, keeper.dtype)
    if args.views:
        views = keeper.keep(support_views(support, args.views, seed), 'support view', args.input_size, whole=True)
        kept = {'support': check_kept(views), 'base': pool}
        train_set = KeptPairs(
            **kept, num_base=len(data.base_ids), per_class=args.base_views, support_ids=support.image_ids,
            shot=args.shot, seed=seed,
        )  # fmt: skip
    loader = None
    if base.TRAINS_NOVEL:
        loader = training_loader(
            train_set, args.batch_size, seed, num_workers=0 if kept else args.num_workers, device=device,
            fill_last=True, micro_batches=args.accumulate,
        )  # fmt: skip
    base_views = LabelledFeatures(pool, device, set(support.image_ids)) if base.uses_base_views(base.options) else ()
    torch.manual_seed(seed)  # only now: loaders draw too, and features may be there already
    net = build_novel(args, data, seed, base=base, supports=supports, base_views=base_views, folder=run.folder)
    panel = None
    if val_batches is not None:
        panel = ValidationPanel(data.legend, data.samples('val', novel_as_background=False).read_image)
    stage = NovelStage(
        net=net, frozen=keeper.frozen, kept=kept, base_views=base_views,
        model=wrap_ddp(Head(net), device, sync_bn=False), device=device, dtype=keeper.dtype, val_batches=val_batches,
        panel=panel, class_names=data.legend.names, config=from_flags.network_config(args, data, seed), seed=seed,
        listed=len(data.ids('val')), patience=args.num_epoch // 4,
    )  # fmt: skip
    return from_flags.trainer(args, stage, loader, run).fit()


def arguments_of_seeds(args: argparse.Namespace, data: FoldData, dtype: torch.dtype) -> dict[int, dict]:
    """Seed -> what its run depends on (`resume.run_arguments`)."""
    files = {'validation list': data.val_list} if data.val_list else {}
    files |= {f'list of base class {class_id}': data.lists.base_class(class_id) for class_id in data.base_ids}
    if args.restore_from not in UNTRAINED and not args.start_epoch:
        files['base network'] = resolve_checkpoint(args.restore_from)
    flags = vars(args).copy()
    if not MODELS[args.model].TRAINS_NOVEL:
        del flags['batch_size']  # nobody has chosen it
    common = run_arguments(flags, dtype, files)
    return {
        seed: common | {'random_seed': seed} | digests({'support list': data.support_path(args.shot, seed)})
        for seed in args.random_seed
    }


@partial(exits_cleanly, resumes=True)
def main(args: argparse.Namespace):
    with from_flags.training_process(args) as device:
        source = read_source(args)
        from_flags.fill_network(args, source)
        data, dtype = from_flags.fold_data(args), precision(device, args.fp16)
        check_source(args, data, source)  # before lists of another fold are asked for
        data.check_support_lists(args.shot, args.random_seed)  # before class lists are made
        notes = main_first(data.prepare)
        # a shortage of images is an error before anything is computed
        train_sets = {seed: few_shot_set(args, data, seed) for seed in args.random_seed}
        drawn = train_sets.values() if draws_base_images(args) else ()
        if short := {args.dataset.classes[c] for train_set in drawn for c in train_set.short_classes}:
            notes.append(f'base images of {some(sorted(short))} repeat: there are fewer than {args.shot} in an epoch')
        for seed in args.random_seed:
            if old := data.outdated_supports(args.shot, seed):
                notes.append(f'supports of seed {seed}, {some(old)}, are not in the class lists any more')
        folder = from_flags.run_folder(args, data, arguments_of_seeds(args, data, dtype))
        val_set = data.validation(args.base_size, with_novel=True, limit=args.val_limit)
        base = restore_base(args, data, folder, source).to(device, memory_format=torch.channels_last)
        del source  # its weights are in the network
        frozen = fuse(base, dtype)
        if args.compile:
            compile_features(frozen, frozen=True)
        if args.restore_from == 'none':
            notes.append('--restore-from none: the base network is random and stays so')
        run = Run(folder, vars(args), notes)
        novel = some([args.dataset.classes[c] for c in data.novel_ids], 5)
        about = (
            f'{method_in_words(args)}; {args.shot}-shot, novel classes {novel}; {len(val_set or ())} validation images'
        )
        sizes = from_flags.sizes(args, crops=from_flags.novel_crops(args))
        run.logger.info(f'{about}; {sizes}; computing in {name_of(dtype)}')
        keeper = feature_keeper(args, base, frozen, device, dtype, run)
        val_batches = keeper.keep(val_set, 'validation', args.base_size) if val_set else None
        pool = None
        if args.views or base.uses_base_views(base.options):
            pool = keep_base_views(args, train_sets[args.random_seed[0]], keeper)
        if args.views:
            check_kept(pool)
        rows = {}
        for seed, train_set in train_sets.items():
            results = train_seed(
                args, data, seed, train_set=train_set, base=base, keeper=keeper, pool=pool, val_batches=val_batches,
                run=run,
            )  # fmt: skip
            for which, metrics in results.items():
                rows[f'seed {seed}, {which}{" (selected)" if which == args.select else ""}'] = metrics
        if rows:
            run.logger.info(f'validation at {args.base_size[0]}x{args.base_size[1]}, mIoU in %:\n{summary_table(rows)}')
        run.logger.close()


if __name__ == '__main__':
    main(parse_args())
