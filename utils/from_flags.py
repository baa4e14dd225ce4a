"""Objects that the training and evaluation scripts make from their flags (`cli`)."""

import argparse
import contextlib
import dataclasses

import torch
from torch.utils.data import DataLoader

from core.errors import InputError, some
from core.ranks import is_main
from dataset import DATASETS, FoldData
from dataset.classes import find_dataset
from engine import run
from engine.checkpoint import Checkpoint
from engine.config import DEFAULT_MODEL
from engine.distributed import main_first
from engine.optim import Optimization
from engine.resume import RunFolder
from engine.stage import Plan, Stage
from engine.trainer import Trainer
from model import MODELS
from utils import cli
from utils.data_flags import fill_data
from utils.method_flags import method_options

UNTRAINED = ('none', 'imagenet')  # --restore-from without a checkpoint
NETWORK_FLAGS = ('model', 'backbone', 'os', 'base_size', 'input_size', 'scale_range')  # that checkpoints know


def fold_data(args: argparse.Namespace) -> FoldData:
    """The fold that --dataset, --fold, --data-dir and the lists name."""
    return FoldData(
        args.dataset, args.data_dir, args.fold, args.train_list, args.val_list,
        filter_novel=args.filter_novel, skip_bad=args.skip_bad_images,
        **_support_flags(args),
    )  # fmt: skip


def _support_flags(args):
    """Of stage 2."""
    if 'support_list' not in args:
        return {}
    return {
        'support_list': args.support_list, 'nested': args.nested, 'novel_only': args.support_labels == 'novel-only',
        'repeat_base': args.repeat_base_images,
    }  # fmt: skip


def described_data(args: argparse.Namespace, config: dict) -> FoldData:
    """The data in --data-dir, with its lists, that a network with this `network_config` was trained on.

    Raises:
        InputError: --data-dir is of another data set, or a file is missing or wrong.
    """
    name, spec = config['dataset'], DATASETS.get(config['dataset'])
    if spec is None:
        spec = find_dataset(str(args.data_dir))
        args.data_dir = spec.root
    try:
        base = [[class_id, spec.classes[class_id]] for class_id in spec.base_ids(config['fold'])]
    except ValueError as error:
        raise InputError(
            f'{args.data_dir}: {error}; the network was trained on fold {config["fold"]} of {name!r}. Give the data, '
            'and the card, that it was trained on.'
        ) from error
    known = config.get('classes', base)[: len(base)]
    if spec.name != name or known != base:
        raise InputError(
            f'{args.data_dir} is {spec.name!r} with the base classes {some(map(str, base))}; the network was trained '
            f'on {name!r} with {some(map(str, known))}. Give the --data-dir that it was trained on.'
        )
    fill_data(args, spec)
    data = FoldData(spec, args.data_dir, config['fold'], args.train_list, args.val_list)
    for note in main_first(data.ensure_lists):
        if is_main():
            print(f'note: {note}')
    return data


def network_config(args: argparse.Namespace, data: FoldData, seed: int | None = None) -> dict:
    """What a checkpoint says of its network: data set, fold, classes, architecture, size; for stage 2 shot and seed.

    When it is trained, also crop size and scale range; and the support images where they are no published draw.

    Args:
        args: the flags.
        data: the fold.
        seed: of stage 2.
    """
    config = {
        'dataset': args.dataset.name, 'fold': args.fold, 'model': args.model, 'backbone': args.backbone, 'os': args.os,
        'classes': data.legend.classes, 'base_size': list(args.base_size), 'card': args.dataset.described(),
    }  # fmt: skip
    if options := method_options(args):
        config['options'] = options
    if 'scale_range' in args:
        config |= {'input_size': list(args.input_size), 'scale_range': list(args.scale_range)}
    if data.support_list or (data.nested and seed is not None):
        config['supports'] = [list(pair) for pair in data.supports(args.shot, seed or 0).items()]
    return config if seed is None else config | {'shot': args.shot, 'seed': seed}


def fill_network(args: argparse.Namespace, checkpoint: Checkpoint | None):
    """Set the flags of `NETWORK_FLAGS`, where they are None, to those of a checkpoint, or to the default ones.

    Args:
        args: changed in place.
        checkpoint: that --restore-from names; None where it names none.
    """
    known = {**checkpoint.config, 'model': checkpoint.model} if checkpoint else {}
    default = {
        'model': DEFAULT_MODEL, **cli.DEFAULT_NETWORK, 'base_size': cli.BASE_SIZE,
        'input_size': args.base_size or known.get('base_size', cli.BASE_SIZE), 'scale_range': args.dataset.scale_range,
    }  # fmt: skip
    missing = missing_network_flags(args)
    for name in missing:
        value = known.get(name, default[name])
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
    assumed = [name for name in ('input_size', 'scale_range') if name in missing and name not in known]
    if assumed and checkpoint and checkpoint.config and novel_crops(args) and is_main():
        flags = (f'--{name.replace("_", "-")} {",".join(map(str, getattr(args, name)))}' for name in assumed)
        print(f'note: {checkpoint.path} does not say the crops of its training; assuming {" ".join(flags)}')


def novel_crops(args: argparse.Namespace) -> bool:
    """Whether stage 2 sees crops of images: some methods look at whole ones only."""
    method = MODELS[args.model]
    return method.TRAINS_NOVEL or method.uses_base_views(method_options(args))


def sizes(args: argparse.Namespace, crops: bool = True) -> str:
    """At which sizes a run sees images, for its log; `crops`: it trains on crops of them."""
    (low, high), (height, width) = args.scale_range, args.input_size
    cropped = f'crops of {height}x{width} from images resized by {low:g} to {high:g}, ' if crops else ''
    return f'{cropped}validation at {args.base_size[0]}x{args.base_size[1]}'


def missing_network_flags(args: argparse.Namespace) -> list[str]:
    """Those of `NETWORK_FLAGS` that a script has, but was not given."""
    return [name for name in NETWORK_FLAGS if getattr(args, name, '') is None]


def training_process(args: argparse.Namespace) -> contextlib.AbstractContextManager[torch.device]:
    """`run.training_process` with the flags."""
    return run.training_process(
        args.snapshot_dir, device=args.device, timeout_minutes=args.timeout_minutes, deterministic=args.deterministic
    )  # fmt: skip


def run_folder(args: argparse.Namespace, data: FoldData, arguments: dict) -> RunFolder:
    """--snapshot-dir, and where a run of this fold in it resumes; `arguments` as in `RunFolder`."""
    return RunFolder(args.snapshot_dir, arguments, args.resume, args.overwrite, classes=data.legend.classes)


def trainer(args: argparse.Namespace, stage: Stage, loader: DataLoader | None, training_run: run.Run) -> Trainer:
    """A trainer with the plan of the flags and, where there is a loader, their optimiser and schedule."""
    optimization = None
    if loader is not None:
        steps = loader.batch_sampler.steps
        optimization = Optimization(
            stage.net, args.learning_rate, args.momentum, args.weight_decay, total_steps=args.num_epoch * steps,
            first_step=args.start_epoch * steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
        )  # fmt: skip
    plan = Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)})
    return Trainer(stage, loader, optimization, training_run, plan)
