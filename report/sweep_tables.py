"""Tables of a sweep: the paper's table in Markdown and LaTeX, differences between methods, all numbers as CSV."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from core.errors import some
from core.files import atomic_write, parse_json
from engine.config import DEFAULT_MODEL
from engine.metrics import SUMMARY
from model import MODELS, base_model
from report.tables import latex_table, markdown_table, mean_and_std

COLUMNS = {key: SUMMARY[key] for key in ('base', 'novel', 'total', 'harmonic')} | {'forgotten': 'Forgotten'}
FORGOTTEN = 'Forgotten: mIoU of the base classes without background before stage 2, minus that after it.'
SELECTED = {  # weights -> what a table says of them
    'last': 'weights of the last epoch',
    'best': 'weights selected on the evaluation images, so these numbers are optimistic',
}
Lines = list[list[str]]


def read_results(folders: Iterable[Path], out: Path) -> list[dict]:
    """Read the results.json of evaluations.

    Args:
        folders: folders of evaluations, of both stages; those without results.json are left out.
        out: folder of the sweep.

    Returns:
        For each seed of each evaluation of stage 2: 'model'; 'method', its name with options that are not the default
        ones; 'dataset', 'fold', 'shot', 'seed', 'weights'; the keys of `SUMMARY` in percent; 'forgotten' (NaN where
        stage 1 was not evaluated); 'images' and 'listed_images' (`results.seed_result`); 'checkpoint'; and 'run', the
        folder relative to `out`.
    """
    paths = [path for folder in folders if (path := folder / 'results.json').is_file()]
    contents = {path: parse_json(path.read_bytes(), path) for path in paths}
    before = {}  # base model, data set, fold -> mIoU of base classes after stage 1
    for content in contents.values():
        if _stage(content) == 1:
            (result, *_) = content['seeds'].values()
            key = content.get('model', DEFAULT_MODEL), content['dataset'], content['fold']
            before[key] = result['base_without_background']
    rows = []
    for path, content in contents.items():
        if _stage(content) == 1:
            continue
        if content['shot'] is None:
            print(f'note: {path} is in no table: its classes have different numbers of support images')
            continue
        model = content.get('model', DEFAULT_MODEL)
        place = {key: content[key] for key in ('dataset', 'fold', 'shot')}
        for seed, result in content['seeds'].items():
            means = {key: float('nan') if result[key] is None else result[key] for key in SUMMARY}
            known = before.get((base_model(model), place['dataset'], place['fold']))
            forgotten = float('nan') if known is None else known - means['base_without_background']
            rows.append({
                'model': model, 'method': MODELS[model].described(content.get('options')), **place,
                'seed': int(seed), 'weights': content.get('weights', 'best'),
                **means, 'forgotten': forgotten,
                **{key: result.get(key, '') for key in ('images', 'listed_images')},  # older results lack them
                'checkpoint': Path(result['checkpoint']).name, 'run': os.path.relpath(path.parent, out),
            })  # fmt: skip
    return rows


def _stage(content):
    """Of what stage a results.json is; those of earlier versions do not say."""
    is_base = content['shot'] is None and all(result['novel'] is None for result in content['seeds'].values())
    return content.get('stage') or (1 if is_base else 2)


def with_weights(rows: Sequence[dict], weights: str) -> list[dict]:
    """The rows of some weights; methods that train nothing have the same weights, evaluated once, under all names."""

    def place(row):
        return row['dataset'], row['model'], row['fold'], row['shot'], row['seed']

    there = {place(row) for row in rows if row['weights'] == weights}
    return [
        row for row in rows
        if row['weights'] == weights or (not MODELS[row['model']].TRAINS_NOVEL and place(row) not in there)
    ]  # fmt: skip


def write_tables(
    out: Path, rows: Sequence[dict], folds: Sequence[int], flags: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
):  # fmt: skip
    """Write table.md, table.tex and table.csv.

    Args:
        out: folder that gets the tables.
        rows: from `read_results`, at least one; the first method is what the others are compared with.
        folds: all folds of the grid.
        flags: how a method and shot is called -> the flags of its stage 2, listed below the tables.
        missing: names of evaluations that are not done.
    """
    markdown, latex = [], []
    for dataset in dict.fromkeys(row['dataset'] for row in rows):
        for weights in dict.fromkeys(row['weights'] for row in rows):
            of_table = [row for row in with_weights(rows, weights) if row['dataset'] == dataset]
            if not of_table:
                continue
            seeds = ', '.join(map(str, sorted({row['seed'] for row in of_table})))
            title = (
                f'{dataset}, {SELECTED.get(weights, weights)}: mIoU in %, mean ± standard deviation over seeds {seeds}'
            )
            tables = [(title, ['method', 'shot', 'fold', *COLUMNS.values(), 'run'], table_lines(of_table, folds))]
            if differences := paired_lines(of_table, folds):
                title = (
                    f'{dataset}, {SELECTED.get(weights, weights)}: difference to {_first(of_table)} on the same '
                    'fold, shot and support images, mean ± standard error of the mean'
                )
                tables.append((title, ['method', 'shot', 'fold', *COLUMNS.values(), 'pairs'], differences))
            for title, header, lines in tables:
                markdown.append(f'{title}\n\n{markdown_table(header, lines)}\n')
                latex.append(latex_table(title, header[:-1], [line[:-1] for line in lines]))
            markdown.append(f'{FORGOTTEN}\n{_fewer_images(of_table)}')
    if flags:
        markdown.append('Flags of ft_pop.py:\n')
        markdown += [f'* {run}: {f"`{of_run}`" if of_run else "none"}' for run, of_run in flags.items()]
    if missing:
        markdown.append(f'\nNot evaluated: {some(missing)}.\n')
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (
        ('table.md', '\n'.join(markdown)), ('table.tex', '\n'.join(latex)), ('table.csv', text.getvalue()),
    ):  # fmt: skip
        with atomic_write(out / name) as file:
            file.write(content)


def table_lines(rows: Sequence[dict], folds: Sequence[int]) -> Lines:
    """The lines of the paper's table, methods side by side.

    Args:
        rows: from `read_results`, of one data set and one kind of weights.
        folds: all folds of the grid.

    Returns:
        Method, shot, fold, then `COLUMNS` as mean ± standard deviation over seeds, and the run's folder. With several
        folds, a line for all of them follows those of each shot: mean and deviation over seeds of each seed's mean over
        folds, or '-' until every fold has been evaluated.
    """

    def of_fold(found):
        return [mean_and_std([row[key] for row in found]) for key in COLUMNS], found[0]['run']

    def of_all(found):
        return [_mean_over_folds(found, key, len(folds)) for key in COLUMNS], ''

    return _lines(rows, folds, of_fold, of_all)


def paired_lines(rows: Sequence[dict], folds: Sequence[int]) -> Lines:
    """Differences of the methods to the first one, on the same fold, shot and seed.

    Args:
        rows: from `read_results`, of one data set and one kind of weights.
        folds: all folds of the grid.

    Returns:
        Method, shot, fold, then for `COLUMNS` the mean difference ± its standard error, and the number of pairs; no
        line with a single method. The line for all folds has the mean of the folds' means; folds are fixed, draws are
        random, so that its standard error is that of the folds' means together.
    """
    first = rows[0]['model']
    known = {(row['fold'], row['shot'], row['seed']): row for row in rows if row['model'] == first}
    pairs = [
        row | {key: row[key] - partner[key] for key in COLUMNS}
        for row in rows if row['model'] != first
        and (partner := known.get((row['fold'], row['shot'], row['seed'])))
    ]  # fmt: skip

    def of_fold(found):
        return [mean_and_error([[row[key] for row in found]]) for key in COLUMNS], f'{len(found)}'

    def of_all(found):
        by_fold = [[row for row in found if row['fold'] == fold] for fold in folds]
        if not all(by_fold):
            return ['-'] * len(COLUMNS), ''
        return [mean_and_error([[row[key] for row in part] for part in by_fold]) for key in COLUMNS], f'{len(found)}'

    return _lines(pairs, folds, of_fold, of_all)


def _first(rows):
    """What the first model is called; its options may depend on the shot."""
    return ' / '.join(dict.fromkeys(row['method'] for row in rows if row['model'] == rows[0]['model']))


def mean_and_error(strata: Sequence[Sequence[float]]) -> str:
    """Mean of the strata's means ± its standard error; no error where a stratum has one number.

    Args:
        strata: independent draws in each; the strata themselves are fixed.
    """
    mean = np.mean([np.mean(values) for values in strata])
    if np.isnan(mean):
        return '-'
    if min(map(len, strata)) < 2:
        return f'{mean:+.2f}'
    error = math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in strata)) / len(strata)
    return f'{mean:+.2f} ± {error:.2f}'


def _lines(rows, folds, of_fold: Callable, of_all: Callable) -> Lines:
    """Lines of a table: for each shot, fold and model the cells and the last cell that `of_fold` makes of its rows;
    with several folds, those of `of_all` follow for each model."""
    lines, models = [], dict.fromkeys(row['model'] for row in rows)
    for shot in sorted({row['shot'] for row in rows}):
        names = {row['model']: row['method'] for row in rows if row['shot'] == shot}
        for fold in (*folds, *(['mean'] if len(folds) > 1 else [])):
            for model in models:
                found = [
                    row for row in rows
                    if (row['model'], row['shot']) == (model, shot) and fold in (row['fold'], 'mean')
                ]  # fmt: skip
                cells, last = ['-'] * len(COLUMNS), '-'
                if found:
                    cells, last = (of_all if fold == 'mean' else of_fold)(found)
                lines.append([names.get(model, MODELS[model].title), f'{shot}', f'{fold}', *cells, last])
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
