"""Curves of runs: losses and validation mIoU against optimisation steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import parse_json
from report.plotting import Figure, colormaps

LOSSES = {'ce': 'cross-entropy', 'orth': 'orthogonality'}
MEANS = {'base': '-', 'novel': '--', 'total': ':'}  # line styles
FEW = 10  # points that are marked
SMOOTHED = 40  # points of a loss curve; each is a mean over neighbouring steps


def read_metrics(folder: Path | str) -> list[dict]:
    """Read the records of a run's metrics.jsonl.

    Raises:
        InputError: the file is missing or empty, or a line of it is not a JSON object.
    """
    path = Path(folder) / 'metrics.jsonl'
    if not path.is_file():
        raise InputError(f'{path} does not exist; expected the snapshot folder of a run of train_base.py or ft_pop.py')
    records = [parse_json(line, path) for line in path.read_bytes().splitlines()]
    if not records:
        raise InputError(f'{path} is empty: the run has not logged a step yet')
    return records


def curves_figure(runs: Mapping[str, Sequence[dict]]) -> Figure:
    """Losses and validation mIoU of runs.

    Args:
        runs: name -> records (`read_metrics`).
    """
    curves = {}  # one for each seed of each run
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
    shown, names = set(), []
    for i, (name, records) in enumerate(curves.items()):
        color = colormaps['tab10'](i % 10)
        names += axes[0].plot([], [], color=color, label=name)  # also of a run without training
        training = [record for record in records if record['kind'] == 'train']
        for key, axis in zip(LOSSES, axes, strict=False):
            points = [(r['step'], r[key]) for r in training if r.get(key) is not None]
            if points:
                marker = '.' if len(points) < FEW else ''  # of one point, a line shows nothing
                axis.plot(*_smoothed(points), color=color, marker=marker)
        validations = [record for record in records if record['kind'] == 'val']
        # without novel classes, total equals base
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
    figure.legend(handles=names, loc='outside lower center', ncols=3, frameon=False)
    return figure


def _smoothed(points):
    """Means over neighbouring points, as the loss of single steps is noisy."""
    groups = np.array_split(np.array(points, float), min(SMOOTHED, len(points)))
    return np.array([group.mean(0) for group in groups]).T
