"""Tables of a sweep: the paper's table in Markdown and LaTeX, and every seed's numbers as CSV."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from core.files import atomic_write, parse_json
from engine.checkpoint import DEFAULT_MODEL
from engine.metrics import SUMMARY
from model import MODELS
from report.tables import latex_table, markdown_table, mean_and_std

COLUMNS = ('base', 'novel', 'total', 'harmonic')


def read_results(folders: Iterable[Path], out: Path) -> list[dict]:
    """Read the results.json of evaluations.

    Args:
        folders: folders of evaluations; those without results.json are left out.
        out: folder of the sweep.

    Returns:
        For each seed of each evaluation 'method', 'dataset', 'fold', 'shot', 'seed', the keys of `SUMMARY` in percent,
        'images' and 'listed_images' (`results.seed_result`), 'checkpoint' and 'run', the folder relative to `out`.
    """
    rows = []
    for folder in folders:
        path = folder / 'results.json'
        if not path.is_file():
            continue
        content = parse_json(path.read_bytes(), path)
        for seed, result in content['seeds'].items():
            means = {key: float('nan') if result[key] is None else result[key] for key in SUMMARY}
            method = MODELS[content.get('model', DEFAULT_MODEL)].title
            place = {'method': method, **{key: content[key] for key in ('dataset', 'fold', 'shot')}, 'seed': int(seed)}
            rests_on = {key: result.get(key, '') for key in ('images', 'listed_images')}  # older results lack them
            source = {'checkpoint': Path(result['checkpoint']).name, 'run': os.path.relpath(folder, out)}
            rows.append(place | means | rests_on | source)
    return rows


def write_tables(out: Path, rows: Sequence[dict], folds: Sequence[int]):
    """Write table.md, table.tex and table.csv.

    Args:
        out: folder that gets the tables.
        rows: from `read_results`, at least one.
        folds: all folds of the grid.
    """
    markdown, latex = [], []
    for dataset in dict.fromkeys(row['dataset'] for row in rows):
        of_dataset = [row for row in rows if row['dataset'] == dataset]
        lines = table_lines(of_dataset, folds)
        seeds = ', '.join(map(str, sorted({row['seed'] for row in of_dataset})))
        header = ['method', 'shot', 'fold', *(SUMMARY[key] for key in COLUMNS), 'run']
        title = f'{dataset}: mIoU in %, mean ± standard deviation over seeds {seeds}'
        markdown.append(f'{title}\n\n{markdown_table(header, lines)}\n{_fewer_images(of_dataset)}')
        latex.append(latex_table(title, header[:-1], [line[:-1] for line in lines]))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (
        ('table.md', '\n'.join(markdown)), ('table.tex', '\n'.join(latex)), ('table.csv', text.getvalue()),
    ):  # fmt: skip
        with atomic_write(out / name) as file:
            file.write(content)


def table_lines(rows: Sequence[dict], folds: Sequence[int]) -> list[list[str]]:
    """The lines of the paper's table.

    Args:
        rows: from `read_results`, of one data set and method.
        folds: all folds of the grid.

    Returns:
        Method, shot, fold, then `COLUMNS` as mean ± standard deviation over seeds, and the run's folder. With several
        folds, a row for all of them follows those of each shot: mean and deviation over seeds of each seed's mean over
        folds, or '-' until every fold has been evaluated.
    """
    lines = []
    for shot in sorted({row['shot'] for row in rows}):
        of_shot = [row for row in rows if row['shot'] == shot]
        for fold in folds:
            of_fold = [row for row in of_shot if row['fold'] == fold]
            cells = [mean_and_std([row[key] for row in of_fold]) if of_fold else '-' for key in COLUMNS]
            lines.append([rows[0]['method'], f'{shot}', f'{fold}', *cells, of_fold[0]['run'] if of_fold else '-'])
        if len(folds) > 1:
            means = [_mean_over_folds(of_shot, key, len(folds)) for key in COLUMNS]
            lines.append([rows[0]['method'], f'{shot}', 'mean', *means, ''])
    return lines


def _fewer_images(rows):
    """A line for each evaluation that left images out."""
    return ''.join(
        f'\n{row["run"]}, seed {row["seed"]}: on {row["images"]} of {row["listed_images"]} images\n'
        for row in rows if row['images'] != row['listed_images']
    )  # fmt: skip


def _mean_over_folds(rows, key, num_folds):
    """Mean and deviation over seeds of each seed's mean over folds; '-' if a fold of a seed is missing."""
    by_seed = [[row[key] for row in rows if row['seed'] == seed] for seed in sorted({row['seed'] for row in rows})]
    complete = all(len(of_seed) == num_folds for of_seed in by_seed)
    return mean_and_std([np.mean(of_seed) for of_seed in by_seed]) if complete else '-'
