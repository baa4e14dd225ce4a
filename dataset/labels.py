"""Class id -> label. A label is the index of a logit.

Label 0 is background. Labels 1..Kb are the base classes in ascending class id, labels Kb+1..Kb+Kn the novel classes in
ascending class id. 255 is ignored.
"""

from collections.abc import Sequence

import numpy as np

from core import IGNORE_INDEX

INVALID = 254  # marks mask values that are not class ids of the dataset


def label_table(base_ids: Sequence[int], novel_ids: Sequence[int], novel_as_background: bool) -> np.ndarray:
    """Lookup table from mask values to labels.

    Args:
        base_ids, novel_ids: class ids, ascending.
        novel_as_background: novel pixels get label 0, as in stage 1; otherwise their own labels.

    Returns:
        uint8 [256]; `INVALID` if the value is not a class id.
    """
    table = np.full(256, INVALID, np.uint8)
    table[0], table[IGNORE_INDEX] = 0, IGNORE_INDEX
    table[list(base_ids)] = np.arange(1, len(base_ids) + 1)
    if novel_ids:
        labels = np.arange(len(base_ids) + 1, len(base_ids) + len(novel_ids) + 1)
        table[list(novel_ids)] = 0 if novel_as_background else labels
    return table
