"""Class id -> label: the index of a logit.

Label 0 is background, 1..Kb the base classes in ascending class id, Kb+1..Kb+Kn the novel classes in ascending class
id; 255 is ignored.
"""

import numpy as np

from core import IGNORE_INDEX

INVALID = 254  # marks mask values that are no class id of the dataset


def label_table(base_ids, novel_ids, novel_as_background):
    """Lookup table from mask values to labels.

    Args:
        base_ids, novel_ids (sequence of int): class ids, ascending.
        novel_as_background (bool): novel pixels become label 0, as stage 1 sees them; otherwise their own labels.

    Returns:
        ndarray: uint8 [256]; `INVALID` where the value is no class id.
    """
    table = np.full(256, INVALID, np.uint8)
    table[0], table[IGNORE_INDEX] = 0, IGNORE_INDEX
    table[list(base_ids)] = np.arange(1, len(base_ids) + 1)
    if novel_ids:
        labels = np.arange(len(base_ids) + 1, len(base_ids) + len(novel_ids) + 1)
        table[list(novel_ids)] = 0 if novel_as_background else labels
    return table
