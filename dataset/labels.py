"""Class id -> label. A class id is a value in masks; a label is the index of a logit.

Label 0 is background. Labels 1..Kb are the base classes in ascending class id, labels Kb+1..Kb+Kn the novel classes in
ascending class id. 255 is ignored.
"""

from collections.abc import Sequence

import numpy as np

from core import IGNORE_INDEX

INVALID = 254  # marks mask values that mean nothing in the dataset


def label_table(
    base_ids: Sequence[int],
    novel_ids: Sequence[int],
    novel_as_background: bool,
    background: int | None = 0,
    ignore: Sequence[int] = (IGNORE_INDEX,),
) -> np.ndarray:
    """Lookup table from mask values to labels.

    Args:
        base_ids, novel_ids: class ids, 0..255, ascending.
        novel_as_background: novel pixels get label 0, as in stage 1; otherwise their own labels.
        background: its value in masks, or None.
        ignore: values of ignored pixels.

    Returns:
        uint8 [256]; `INVALID` if the value is neither a class id nor background nor ignored.
    """
    table = np.full(256, INVALID, np.uint8)
    table[list(ignore)] = IGNORE_INDEX
    if background is not None:
        table[background] = 0
    table[list(base_ids)] = np.arange(1, len(base_ids) + 1)
    if novel_ids:
        labels = np.arange(len(base_ids) + 1, len(base_ids) + len(novel_ids) + 1)
        table[list(novel_ids)] = 0 if novel_as_background else labels
    return table


def ranges(values: Sequence[int]) -> str:
    """Numbers for a message, consecutive ones as a range: '0..20, 30'."""
    runs = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ', '.join('..'.join(map(str, run)) for run in runs)


def accepted(table: np.ndarray) -> str:
    """The mask values that a table of `label_table` knows, for a message."""
    classes = np.flatnonzero((table != INVALID) & (table != IGNORE_INDEX)).tolist()
    ignored = np.flatnonzero(table == IGNORE_INDEX).tolist()
    return f'class ids {ranges(classes)}' + (f' and {ranges(ignored)} (ignored)' if ignored else '')
