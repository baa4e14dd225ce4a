"""Draw the curves of one or several runs: losses and validation mIoU against optimisation steps.

    python -m utils.plot RUN [RUN ...] [--out curves]

RUN is a snapshot folder of train_base.py or ft_pop.py. Writes curves.png and curves.svg, with one run into its folder.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from core.errors import InputError, exits_cleanly
from report.figures import save_figure
from utils.cli import make_parser

LOSSES = {'ce': 'cross-entropy', 'orth': 'orthogonality'}
MEANS = {'base': '-', 'novel': '--', 'total': ':'}  # line styles
SMOOTHED = 40  # points that a loss curve is averaged to


def read_metrics(folder):
    """The records of a run's metrics.jsonl.

    Returns:
        list of dict.

    Raises:
        InputError: there is no such file, it is empty, or a line of it is no JSON object.
    """
    path = Path(folder) / 'metrics.jsonl'
    if not path.is_file():
        raise InputError(f'{path} does not exist; expected the snapshot folder of a run of train_base.py or ft_pop.py')
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise InputError(f'{path} is damaged: {error}') from error
    if not all(isinstance(record, dict) for record in records):
        raise InputError(f'{path} is damaged: a line is no JSON object')
    if not records:
        raise InputError(f'{path} is empty: the run has not logged a step yet')
    return records


def curves_figure(runs):
    """Losses and mIoU of runs.

    Args:
        runs (dict): name -> records (`read_metrics`).

    Returns:
        Figure.
    """
    curves = {}  # a curve of its own for each seed
    for name, records in runs.items():
        for seed in dict.fromkeys(record.get('seed') for record in records):
            curves[name if seed is None else f'{name}, seed {seed}'] = [r for r in records if r.get('seed') == seed]
    figure = Figure(figsize=(11, 3.6 + 0.22 * (len(curves) // 3)), layout='constrained')
    axes = figure.subplots(1, 3)
    for (key, title), axis in zip(LOSSES.items(), axes, strict=False):
        axis.set_title(f'loss: {title}')
        if key == 'orth':
            axis.set_yscale('log')
    axes[2].set_title('validation mIoU in %')
    shown = set()
    for i, (name, records) in enumerate(curves.items()):
        color = colormaps['tab10'](i % 10)
        training = [record for record in records if record['kind'] == 'train']
        for key, axis in zip(LOSSES, axes, strict=False):
            points = [(r['step'], r[key]) for r in training if r.get(key) is not None]
            if points:
                axis.plot(*_smoothed(points), color=color, label=name if key == 'ce' else None)
        validations = [record for record in records if record['kind'] == 'val']
        # without novel classes, total is base
        present = MEANS if any(record.get('novel') is not None for record in validations) else ('base',)
        for key in present if validations else ():
            shown.add(key)
            points = zip(*((record['step'], record[key]) for record in validations), strict=True)
            axes[2].plot(*points, MEANS[key], color=color, marker='.', markersize=4)
    for axis in axes:
        axis.set_xlabel('step')
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    if shown:
        handles = [axes[2].plot([], [], MEANS[key], color='black', label=key)[0] for key in MEANS if key in shown]
        axes[2].legend(handles=handles)
    figure.legend(handles=axes[0].get_lines(), loc='outside lower center', ncols=3, frameon=False)
    return figure


def _smoothed(points):
    """Means of neighbouring points: a single step's loss says little."""
    groups = np.array_split(np.array(points, float), min(SMOOTHED, len(points)))
    return np.array([group.mean(0) for group in groups]).T


@exits_cleanly
def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='snapshot folders')
    parser.add_argument('--out', type=Path, help='where to, without suffix (default: RUN/curves, or curves here)')
    args = parser.parse_args(argv)
    out = args.out or (args.runs[0] / 'curves' if len(args.runs) == 1 else Path('curves'))
    parts = [run.resolve().parts for run in args.runs]
    # what tells the folders apart
    first = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), -1)
    names = ['/'.join(part[first:]) for part in parts]
    figure = curves_figure({name: read_metrics(run) for name, run in zip(names, args.runs, strict=True)})
    for suffix in ('png', 'svg'):
        save_figure(out.with_name(f'{out.name}.{suffix}'), figure)
    print(f'{out}.png, {out}.svg')


if __name__ == '__main__':
    main()
