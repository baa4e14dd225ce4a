"""Draw the curves of runs: losses and validation mIoU against optimisation steps.

    python -m utils.plot RUN [RUN ...] [--out curves]

RUN is a snapshot folder of train_base.py or ft_pop.py. Writes curves.png and curves.svg to the folder of a single run,
or to the current folder for several runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import exits_cleanly
from report.curves import curves_figure, read_metrics
from report.plotting import save_figure
from utils.cli import make_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='snapshot folders')
    parser.add_argument('--out', type=Path, help='path without suffix (default: RUN/curves for one run, else curves)')
    return parser.parse_args(argv)


def names_of(runs: Sequence[Path]) -> list[str]:
    """Name folders by the part of their paths that differs."""
    parts = [run.resolve().parts for run in runs]
    first = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), -1)
    return ['/'.join(part[first:]) for part in parts]


@exits_cleanly
def main(args: argparse.Namespace):
    out = args.out or (args.runs[0] / 'curves' if len(args.runs) == 1 else Path('curves'))
    figure = curves_figure({name: read_metrics(run) for name, run in zip(names_of(args.runs), args.runs, strict=True)})
    for suffix in ('png', 'svg'):
        save_figure(out.with_name(f'{out.name}.{suffix}'), figure)
    print(f'{out}.png, {out}.svg')


if __name__ == '__main__':
    main(parse_args())
