"""Objects that the training and evaluation scripts make from their flags (`cli`)."""

import argparse
import contextlib
import dataclasses

import torch
from torch.utils.data import DataLoader

from core.errors import InputError
from core.ranks import is_main
from dataset import DATASETS, FoldData
from engine import run
from engine.distributed import main_first
from engine.optim import Optimization
from engine.resume import RunFolder
from engine.stage import Plan, Stage
from engine.trainer import Trainer
from utils import cli


def fold_data(args: argparse.Namespace) -> FoldData:
    """The fold that --dataset, --fold, --data-dir and the lists name."""
    return FoldData(
        DATASETS[args.dataset], args.data_dir, args.fold, args.train_list, args.val_list,
        filter_novel=args.filter_novel, skip_bad=args.skip_bad_images,
    )  # fmt: skip


def described_data(args: argparse.Namespace, config: dict) -> FoldData:
    """The data in --data-dir, with its lists, that a network with this `network_config` was trained on.

    Raises:
        InputError: its data set has no row, or a file is missing or wrong.
    """
    if config['dataset'] not in DATASETS:
        raise InputError(
            f'--data-dir: the data set {config["dataset"]!r} of the network has no row in dataset/classes.py; '
            f'expected one of {", ".join(DATASETS)}'
        )
    spec = DATASETS[config['dataset']]
    cli.fill_lists(args, spec)
    data = FoldData(spec, args.data_dir, config['fold'], args.train_list, args.val_list)
    for note in main_first(data.ensure_lists):
        if is_main():
            print(f'note: {note}')
    return data


def network_config(args: argparse.Namespace, data: FoldData, seed: int | None = None) -> dict:
    """What a checkpoint says of its network: dataset, fold, classes, architecture and size; for stage 2 shot and seed.

    When it is trained, also the scale range.

    Args:
        args: the flags.
        data: the fold.
        seed: of stage 2.
    """
    config = {
        'dataset': args.dataset, 'fold': args.fold, 'backbone': args.backbone, 'os': args.os,
        'classes': data.legend.classes, 'base_size': list(args.base_size),
    }  # fmt: skip
    if 'scale_range' in args:
        config['scale_range'] = list(args.scale_range)
    return config if seed is None else config | {'shot': args.shot, 'seed': seed}


def training_process(args: argparse.Namespace) -> contextlib.AbstractContextManager[torch.device]:
    """`run.training_process` with the flags."""
    return run.training_process(
        args.snapshot_dir, device=args.device, timeout_minutes=args.timeout_minutes, deterministic=args.deterministic
    )  # fmt: skip


def run_folder(args: argparse.Namespace, data: FoldData, arguments: dict) -> RunFolder:
    """--snapshot-dir, and where a run of this fold in it resumes; `arguments` as in `RunFolder`."""
    return RunFolder(args.snapshot_dir, arguments, args.resume, args.overwrite, classes=data.legend.classes)


def trainer(args: argparse.Namespace, stage: Stage, loader: DataLoader, training_run: run.Run) -> Trainer:
    """A trainer with the optimiser, the schedule and the plan of the flags."""
    steps = loader.batch_sampler.steps
    optimization = Optimization(
        stage.net, args.learning_rate, args.momentum, args.weight_decay, total_steps=args.num_epoch * steps,
        first_step=args.start_epoch * steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
    )  # fmt: skip
    plan = Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)})
    return Trainer(stage, loader, optimization, training_run, plan)
