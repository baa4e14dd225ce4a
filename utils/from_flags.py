"""Objects that the training and evaluation scripts make from their flags (`cli`)."""

import argparse
import dataclasses

from torch.utils.data import DataLoader

from dataset import DATASETS, FoldData
from engine.optim import Optimization
from engine.resume import RunFolder
from engine.run import Run
from engine.stage import Plan, Stage
from engine.trainer import Trainer


def fold_data(args: argparse.Namespace) -> FoldData:
    """The fold that --dataset, --fold, --data-dir and the lists name."""
    return FoldData(
        DATASETS[args.dataset], args.data_dir, args.fold, args.train_list, args.val_list,
        filter_novel=args.filter_novel, skip_bad=args.skip_bad_images,
    )  # fmt: skip


def run_folder(args: argparse.Namespace, data: FoldData, arguments: dict) -> RunFolder:
    """--snapshot-dir, and where a run of this fold in it resumes; `arguments` as in `RunFolder`."""
    return RunFolder(args.snapshot_dir, arguments, args.resume, args.overwrite, classes=data.legend.classes)


def trainer(args: argparse.Namespace, stage: Stage, loader: DataLoader, run: Run) -> Trainer:
    """A trainer with the optimiser, the schedule and the plan of the flags."""
    steps = loader.batch_sampler.steps
    optimization = Optimization(
        stage.net, args.learning_rate, args.momentum, args.weight_decay, total_steps=args.num_epoch * steps,
        first_step=args.start_epoch * steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
    )  # fmt: skip
    plan = Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)})
    return Trainer(stage, loader, optimization, run, plan)
