"""How predictions are compared with masks: confusion matrix, IoU and the means that papers report."""

import numpy as np
import torch

IGNORE_INDEX = 255

# key -> heading; every mean under its own name
SUMMARY = {
    'base': 'Base',  # background and base classes: the paper's base mIoU
    'base_without_background': 'Base w/o bg',
    'novel': 'Novel',
    'total': 'Total',  # mean over all classes
    'harmonic': 'HM(Base, Novel)',
    'mean': 'Mean(Base w/o bg, Novel)',  # what DIaM and its followers report
}


def confusion_matrix(truth, prediction, num_classes):
    """Count pixels by true and predicted label.

    Args:
        truth (Tensor): labels 0..K-1 or 255 (not counted), any integer type and shape.
        prediction (Tensor): labels 0..K-1, same shape.
        num_classes (int): K.

    Returns:
        Tensor: int64 [K, K], row = truth, on the device of the arguments.
    """
    pairs = truth.flatten().int() * num_classes + prediction.flatten()
    # ignored pixels fall into a row of their own, which costs less than selecting the others
    counts = torch.bincount(pairs, minlength=(IGNORE_INDEX + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def iou_per_class(confusion):
    """Intersection over union in percent, float64 [K]; NaN for classes in neither truth nor prediction."""
    confusion = np.asarray(confusion, np.float64)
    intersection = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    with np.errstate(invalid='ignore'):
        return 100 * intersection / union


def summarize(confusion, num_base):
    """The means that generalized few-shot segmentation reports.

    Args:
        confusion (array): [1 + Kb + Kn, 1 + Kb + Kn], row = truth.
        num_base (int): Kb.

    Returns:
        dict: the keys of `SUMMARY`, in percent. Classes that never occur are left out of the means; a mean without
        any class is NaN.
    """
    iou = iou_per_class(confusion)
    base, without_background, novel = iou[: num_base + 1], iou[1 : num_base + 1], iou[num_base + 1 :]
    means = {'base': _mean(base), 'base_without_background': _mean(without_background), 'novel': _mean(novel)}
    pair = means['base'] + means['novel']
    means['total'] = _mean(iou)
    means['harmonic'] = 0.0 if pair == 0 else 2 * means['base'] * means['novel'] / pair
    means['mean'] = (means['base_without_background'] + means['novel']) / 2
    return means


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


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float('nan')
