"""Result tables in Markdown and LaTeX."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import SEPARATING_LINE, tabulate

from engine.metrics import SUMMARY


def summary_table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """Markdown table of summaries.

    Args:
        rows: row name -> the keys of `SUMMARY`, in percent; values may be strings.
    """
    lines = [[name, *(_cell(values[key]) for key in SUMMARY)] for name, values in rows.items()]
    return markdown_table(['', *SUMMARY.values()], lines)


def class_table(ious: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table of each class's IoU.

    Args:
        ious: column name -> class name -> IoU in percent; NaN for classes that do not occur.
    """
    header = ['class', *ious, *(['mean ± std'] if len(ious) > 1 else [])]
    lines = []
    for name in next(iter(ious.values())):
        values = [iou[name] for iou in ious.values()]
        lines.append([name, *map(_cell, values), *([mean_and_std(values)] if len(ious) > 1 else [])])
    return markdown_table(header, lines)


def mean_and_std(values: Sequence[float]) -> str:
    """'mean ± std' of numbers, (population) standard deviation; the number if it is one, '-' if one of them is NaN."""
    if np.isnan(values).any():
        return '-'
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values):.2f}' if len(values) > 1 else '')


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table, the first column to the left and all others to the right."""
    alignment = ['left'] + ['right'] * (len(header) - 1)
    return tabulate(lines, header, tablefmt='pipe', colalign=alignment, disable_numparse=True)


def latex_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX table (package booktabs) with a rule between numbers of shots.

    Args:
        title: the caption.
        header: method, shot, fold, and the columns of results, which are centred.
        lines: rows in the order of the shots.
    """
    body = []
    for i, line in enumerate(lines):
        if i and line[1] != lines[i - 1][1]:
            body.append(SEPARATING_LINE)
        body.append(line)
    alignment = ['left', 'right', 'right', *['center'] * (len(header) - 3)]
    tabular = tabulate(body, header, tablefmt='latex_booktabs', colalign=alignment, disable_numparse=True)
    caption = re.sub(r'([%_&#$])', r'\\\1', title)
    table = f'% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{tabular}\n'
    return f'{table}\\end{{table}}\n'.replace('±', r'$\pm$')


def _cell(value):
    if isinstance(value, str):
        return value
    return '-' if np.isnan(value) else f'{value:.2f}'
