"""Stage 1: learn the base classes of a fold.

    python train_base.py --dataset voc --data-dir VOC2012 --restore-from resnet50_v2.pth --snapshot-dir runs/base
    torchrun --nproc_per_node=4 train_base.py --dataset coco --data-dir COCO --restore-from resnet50_v2.pth \\
        --snapshot-dir runs/coco_base

Writes to the snapshot folder: best.pth (highest base mIoU on the validation list, background included; none without
such a list), last.pth, epoch_N.pth with --save-pred-every, args.json, log.txt, metrics.jsonl, tb/; memory.pt, from
which utils.teach teaches best.pth more classes without the data.
"""

import argparse
from functools import partial

import torch

from core.errors import InputError, exits_cleanly, some
from core.ranks import world_size
from dataset import Augmentation, FoldData
from engine import memory
from engine.checkpoint import read_checkpoint, resolve_checkpoint
from engine.distributed import main_first, on_main, wrap_ddp
from engine.feature_store import digest
from engine.loaders import evaluation_loader, training_loader
from engine.precision import autocast, compile_features, name_of, precision, to_device
from engine.pretrained import imagenet_checkpoint
from engine.resume import run_arguments
from engine.run import Run
from engine.stage import Stage
from model import BACKBONES, MODELS, POP, Network, build_model
from model.kernels import return_freed_memory
from report.tensorboard import ValidationPanel
from utils import cli, from_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.training_parser(
        __doc__, [name for name, method in MODELS.items() if not method.BASE_MODEL], BACKBONES,
        batch_size=None, num_epoch=50,
        restore_help='backbone weights: a file, "imagenet" (torchvision\'s) or "none"; or a stage-1 checkpoint',
    )  # fmt: skip
    parser.add_argument('--random-seed', type=cli.not_negative, default=123, help='of all random draws (default: 123)')
    parser.add_argument(
        '--sync-bn', action=argparse.BooleanOptionalAction, default=True,
        help='batch statistics over all GPUs (default: on; not available on CPUs)',
    )  # fmt: skip
    parser.add_argument(
        '--memory', action=argparse.BooleanOptionalAction, default=True,
        help='at the end, write memory.pt for utils.teach: views of each base class, at most 300 MB, or one of each '
        'in up to 1 GB (default: on, for pspnet_pop)',
    )  # fmt: skip
    parser.set_defaults(learning_rate=None)
    args = parser.parse_args(argv)
    args.scale_range = args.scale_range or args.dataset.scale_range
    if args.learning_rate is None:
        args.learning_rate = MODELS[args.model].BASE_LEARNING_RATE
    cli.check(parser, args)
    on_gpus = args.device == 'cuda' or (args.device == 'auto' and torch.cuda.is_available())
    per_process = 1 if args.sync_bn and on_gpus and world_size() > 1 else 2
    smallest = per_process * world_size() * args.accumulate
    if args.batch_size < smallest and not args.fix_bn:
        parser.error(
            f'--batch-size {args.batch_size}: batch normalisation needs two images per process and micro-batch, '
            f'{smallest} in all; use that, or --fix-bn'
        )
    unit = MODELS[args.model].BATCH_UNIT * world_size() * args.accumulate
    if args.batch_size % unit:
        parser.error(
            f'--batch-size {args.batch_size}: {args.model} divides each batch of a process and micro-batch into '
            f'{MODELS[args.model].BATCH_UNIT} parts; use a multiple of {unit}'
        )
    return args


class BaseStage(Stage):
    """Learns backbone, decoder and the base classes."""

    def losses(self, batch: dict, pixel_weight: float, micro_batches: int) -> dict[str, torch.Tensor]:
        images = to_device(batch['image'], self.device)  # [B, 3, H, W]
        masks = batch['mask'].to(self.device, non_blocking=True).long()  # [B, H, W]
        with autocast(self.device, self.dtype):
            outputs = self.model(images)  # of POP: logits [B, 1 + Kb, h, w]
        return_freed_memory(self.device)  # before the backward pass through the whole network, which needs the most
        return self.net.base_losses(outputs, masks, pixel_weight=pixel_weight, micro_batches=micro_batches)

    @staticmethod
    def improves(metrics: dict, best: dict | None) -> bool:
        return best is None or metrics['base'] >= best['base']


def build_network(args: argparse.Namespace, num_base: int, config: dict, resumes: bool) -> Network:
    """The network of stage 1, with the weights of --restore-from unless the run resumes (`Trainer` loads them then)."""
    net = build_model(args.backbone, num_base, output_stride=args.os, model=args.model)
    net.start_base()
    if not resumes:
        restore(net, args, config)
    if args.freeze_backbone:
        net.backbone.requires_grad_(False)
    if args.fix_bn:
        net.fix_batch_norm()
    return net


def restore(net: Network, args: argparse.Namespace, config: dict):
    """Load what --restore-from names: nothing, a backbone, or a whole stage-1 network with this `network_config`."""
    checkpoint = None
    if args.restore_from == 'imagenet':
        checkpoint = imagenet_checkpoint(args.backbone)
    elif args.restore_from != 'none':
        checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from, 'last'))
    is_network = checkpoint is not None and checkpoint.holds_network
    if args.start_epoch and not is_network:
        raise InputError(f'--start-epoch needs a stage-1 checkpoint; --restore-from {args.restore_from} is none')
    if is_network and checkpoint.class_counts[1]:
        raise InputError(
            f'{checkpoint.path} has novel classes, which stage 1 does not train; expected backbone weights, or a '
            'checkpoint of stage 1'
        )
    if is_network:
        checkpoint.load_into(net, config)
    elif checkpoint is not None:
        checkpoint.load_backbone_into(net)


def keep_memory(args: argparse.Namespace, data: FoldData, stage: BaseStage, run: Run):
    """Write memory.pt for best.pth, or last.pth where that is all, unless it is there; what prevents it is a note."""
    net, path = stage.net, run.folder.path() / memory.NAME
    try:
        read_checkpoint(resolve_checkpoint(run.folder.path())).load_into(net, stage.config)
        if on_main(lambda: memory.is_memory_of(path, digest(net.state_dict()))):
            return
        run.logger.info(f'making {path}, with which utils.teach teaches more classes (--no-memory: none)')
        keeper = memory.keeper_in_memory(
            memory.teachable(net), stage.device, stage.dtype, run.logger.info, args.num_workers
        )
        memory.write_memory(path, memory.look_at_base(keeper, data, args.base_size))
        run.logger.info(f'{path} is written')
    except InputError as error:
        run.logger.info(f'note: no {path}: {error}')


@partial(exits_cleanly, resumes=True)
def main(args: argparse.Namespace):
    with from_flags.training_process(args) as device:
        torch.manual_seed(args.random_seed)
        data, dtype = from_flags.fold_data(args), precision(device, args.fp16)
        notes = main_first(data.prepare)
        files = {'training list': data.lists.train} | ({'validation list': data.val_list} if data.val_list else {})
        folder = from_flags.run_folder(args, data, {None: run_arguments(vars(args), dtype, files)})
        train_set = data.base_training(Augmentation(args.input_size, args.scale_range), args.random_seed)
        val_set = data.validation(args.base_size, with_novel=False, limit=args.val_limit)
        loading = {'num_workers': args.num_workers, 'device': device}
        loader = training_loader(train_set, args.batch_size, args.random_seed, micro_batches=args.accumulate, **loading)

        config = from_flags.network_config(args, data)
        net = build_network(args, len(data.base_ids), config, resumes=folder.holds()).to(
            device, memory_format=torch.channels_last
        )
        net.background = args.dataset.background is not None
        if args.compile:
            compile_features(net)
        run = Run(folder, vars(args), notes)
        novel = ' and no novel one' if args.filter_novel else ''
        run.logger.info(
            f'{len(train_set)} of {len(data.ids("train"))} training images show a base class{novel}; '
            f'{len(val_set or ())} validation images; {len(data.base_ids)} base classes: '
            f'{some([args.dataset.classes[c] for c in data.base_ids], 5)}; {from_flags.sizes(args)}; computing in '
            f'{name_of(dtype)}'
        )
        legend = data.legend.cut(net.num_logits)
        stage = BaseStage(
            net=net, model=wrap_ddp(net, device, args.sync_bn), device=device, dtype=dtype,
            val_batches=evaluation_loader(val_set, args.test_batch_size, **loading) if val_set else None,
            panel=ValidationPanel(legend, val_set.samples.read_image) if val_set else None, class_names=legend.names,
            config=config, listed=len(data.ids('val')),
        )  # fmt: skip
        from_flags.trainer(args, stage, loader, run).fit()
        if args.memory and isinstance(net, POP):
            keep_memory(args, data, stage, run)
        run.logger.close()


if __name__ == '__main__':
    main(parse_args())
