"""Result tables in Markdown."""

import numpy as np

from engine.metrics import SUMMARY


def summary_table(rows):
    """Markdown table of summaries.

    Args:
        rows (dict): row name -> dict with the keys of `SUMMARY`, in percent; values may be strings.
    """

    def cell(value):
        return value if isinstance(value, str) else '-' if np.isnan(value) else f'{value:.2f}'

    return markdown_table(
        [
            ['', *SUMMARY.values()],
            *([str(name), *(cell(values[key]) for key in SUMMARY)] for name, values in rows.items()),
        ]
    )


def mean_and_std(values):
    """'mean ± std' of numbers, (population) standard deviation; '-' where one of them is NaN."""
    return '-' if np.isnan(values).any() else f'{np.mean(values):.2f} ± {np.std(values):.2f}'


def class_table(ious):
    """Markdown table of each class's IoU.

    Args:
        ious (dict): column name -> dict of class name -> IoU in percent; NaN for classes that do not occur.
    """
    names = next(iter(ious.values()))
    lines = [['class', *ious, *(['mean ± std'] if len(ious) > 1 else [])]]
    for name in names:
        values = [iou[name] for iou in ious.values()]
        cells = ['-' if np.isnan(value) else f'{value:.2f}' for value in values]
        lines.append([name, *cells, *([mean_and_std(values)] if len(ious) > 1 else [])])
    return markdown_table(lines)


def markdown_table(lines):
    """Rows of strings, the header first, as an aligned Markdown table; all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    aligned = [
        [text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in aligned)
