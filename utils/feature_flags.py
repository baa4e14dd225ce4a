"""Flags of ft_pop.py about features of the base network that are computed once, and what keeps them."""

import argparse
import os
from pathlib import Path

import torch

from engine.feature_store import FeatureStore, digest
from engine.features import PLACES, FeatureKeeper
from engine.run import Run
from model import Network
from utils import cli
from utils.from_flags import UNTRAINED


def add_feature_flags(parser: argparse.ArgumentParser):
    """Add the flags."""
    group = parser.add_argument_group('kept features')
    group.add_argument(
        '--views', type=cli.not_negative, default=0, metavar='N',
        help='train on N views of each support image, drawn once and kept as features of the frozen base network '
        '(default: 0, every view is new, as published)',
    )  # fmt: skip
    group.add_argument(
        '--base-views', type=cli.positive, default=20, metavar='M',
        help='views of each base class, drawn once for all runs on the base network. With --views, each epoch draws '
        'from them, as --update-base does; --calibration base looks at all (default: 20)',
    )  # fmt: skip
    group.add_argument(
        '--features', choices=PLACES, default='auto',
        help='where features are kept: on the GPU, on disk (in features/ beside the base network, for later runs too), '
        'in memory, or nowhere; auto: the first of these with room for them (default)',
    )  # fmt: skip
    group.add_argument(
        '--features-gb', type=cli.rate, default=8, metavar='GB', help='memory for them on each host (default: 8)'
    )
    group.add_argument(
        '--features-disk-gb', type=cli.rate, default=50, metavar='GB',
        help='size of the features folder; those used least recently make room (default: 50)',
    )  # fmt: skip


def feature_keeper(
    args: argparse.Namespace, base: Network, frozen: Network, device: torch.device, dtype: torch.dtype, run: Run
) -> FeatureKeeper:
    """What keeps the features of the frozen base network, in the folder of its checkpoint if that can be written to."""
    folder = args.snapshot_dir
    if args.restore_from not in UNTRAINED:
        beside = cli.folder_of(Path(args.restore_from))
        folder = beside if os.access(beside, os.W_OK) else folder
    return FeatureKeeper(
        frozen=frozen, network=digest(base.state_dict()), device=device, dtype=dtype, place=args.features,
        memory_gb=args.features_gb, store=FeatureStore(folder / 'features', args.features_disk_gb),
        batch_size=args.test_batch_size, num_workers=args.num_workers, log=run.logger.info,
    )  # fmt: skip
