"""Objects that the training and evaluation scripts make from their flags (`cli`)."""

import argparse
import dataclasses

from torch import nn

from dataset import DATASETS, FoldData
from engine.optim import Optimization
from engine.stage import Plan


def fold_data(args: argparse.Namespace) -> FoldData:
    """The fold that --dataset, --fold, --data-dir and the lists name."""
    return FoldData(
        DATASETS[args.dataset], args.data_dir, args.fold, args.train_list, args.val_list,
        filter_novel=args.filter_novel, skip_bad=args.skip_bad_images,
    )  # fmt: skip


def optimization(args: argparse.Namespace, net: nn.Module, steps: int) -> Optimization:
    """The optimiser of a network whose epochs have so many steps."""
    return Optimization(
        net, args.learning_rate, args.momentum, args.weight_decay, total_steps=args.num_epoch * steps,
        first_step=args.start_epoch * steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
    )  # fmt: skip


def plan(args: argparse.Namespace) -> Plan:
    """How long to train, and when to validate, save and log."""
    return Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)})
