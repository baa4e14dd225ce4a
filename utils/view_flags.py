"""Flags of sliding windows and test-time augmentation: --slide --scale --flip --scales."""

import argparse
import math

from core.errors import InputError
from core.ranks import is_main
from engine.checkpoint import Checkpoint
from engine.sliding import Views


def add_view_flags(parser: argparse.ArgumentParser):
    """Add the flags."""
    group = parser.add_argument_group('views of a photograph')
    group.add_argument(
        '--slide', action='store_true',
        help='large photographs: windows of --base-size over the photograph at --scale, rather than all of it resized '
        'to fit one; --test-batch-size is then the number of windows at a time',
    )  # fmt: skip
    group.add_argument(
        '--scale', type=_factor, metavar='S',
        help='with --slide: the photograph is resized by this factor (default: the middle of --scale-range in the '
        "checkpoint's training)",
    )  # fmt: skip
    group.add_argument('--flip', action='store_true', help='average the probabilities with those of mirrored views')
    group.add_argument(
        '--scales', type=_factors, default=(1.0,), metavar='S,S,...',
        help='average the probabilities of views at several scales, relative to --base-size or --scale, e.g. '
        '0.75,1,1.25 (default: 1)',
    )  # fmt: skip


def check_view_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End the program with exit code 2 where the flags do not fit together."""
    if args.scale and not args.slide:
        parser.error('--scale needs --slide; without it, photographs are resized to fit --base-size')


def _factors(text):
    try:
        factors = tuple(map(float, text.split(',')))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < math.inf for factor in factors) or len(set(factors)) < len(factors):
        raise argparse.ArgumentTypeError(f'got {text!r}; expected different factors > 0, e.g. 0.75,1,1.25')
    return factors


def _factor(text):
    factors = _factors(text)
    if len(factors) > 1:
        raise argparse.ArgumentTypeError(f'got {text!r}; expected one factor > 0 (--scales takes several)')
    return factors[0]


def views_of(args: argparse.Namespace, checkpoint: Checkpoint | None, scale_range: tuple[float, float] | None) -> Views:
    """The views that the flags ask for.

    Args:
        args: the flags.
        checkpoint: of the network; None for an untrained one.
        scale_range: of the data set, for checkpoints that do not say theirs; None: unknown.

    Raises:
        InputError: --slide needs a scale that nothing says.
    """
    scale = args.scale if args.slide else None
    if args.slide and not scale:
        trained = checkpoint.config.get('scale_range') if checkpoint else None
        if not trained and not scale_range:
            raise InputError(
                f'--slide: {checkpoint.path} does not say at which scales it was trained, and its data set is unknown. '
                'Give --scale, the factor by which photographs are resized.'
            )
        scale = sum(trained or scale_range) / 2
        if checkpoint and not trained and is_main():
            print(
                f'note: {checkpoint.path} does not say at which scales it was trained; --slide takes {scale:g}, the '
                'middle of the scale range of its data set. --scale sets another one.'
            )
    return Views(scale, args.scales, args.flip)
