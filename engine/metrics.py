"""How predictions are compared with masks: confusion matrix, IoU and the means that papers report."""

import numpy as np
import torch

from core import IGNORE_INDEX

# key -> heading; every mean under its own name
SUMMARY = {
    'base': 'Base',  # background and base classes: the paper's base mIoU
    'base_without_background': 'Base w/o bg',
    'novel': 'Novel',
    'total': 'Total',  # mean over all classes
    'harmonic': 'HM(Base, Novel)',
    'mean': 'Mean(Base w/o bg, Novel)',  # what DIaM and its followers report
}


def confusion_matrix(truth: torch.Tensor, prediction: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Count pixels by true and predicted label.

    Args:
        truth: labels 0..K-1 or 255 (not counted), any integer type and shape.
        prediction: labels 0..K-1, same shape.
        num_labels: K.

    Returns:
        int64 [K, K], row = truth, on the device of the arguments.
    """
    # ignored pixels get a row of their own, which costs less than selecting the others
    if truth.device.type == 'cpu':
        pairs = truth.flatten().int() * num_labels + prediction.flatten()
        counts = torch.bincount(pairs, minlength=(IGNORE_INDEX + 1) * num_labels)
    else:
        counts = _count_without_reading(truth.flatten(), prediction.flatten(), num_labels)
    return counts[: num_labels**2].view(num_labels, num_labels)


def _count_without_reading(truth, prediction, num_labels):
    """Counts of pairs, int64 [(K + 1) K]. bincount would read the largest value back, for which a GPU has to wait."""
    rows = truth.long().clamp(max=num_labels)  # 255 becomes K
    counts = torch.zeros((num_labels + 1) * num_labels, dtype=torch.int64, device=truth.device)
    return counts.scatter_add_(0, rows * num_labels + prediction, counts.new_ones(1).expand(len(rows)))


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union in percent, float64 [K]; NaN for classes in neither truth nor prediction."""
    confusion = np.asarray(confusion, np.float64)
    intersection = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    with np.errstate(invalid='ignore'):
        return 100 * intersection / union


def summarize(confusion: np.ndarray, num_base: int) -> dict[str, float]:
    """The means that generalized few-shot segmentation reports.

    Args:
        confusion: [1 + Kb + Kn, 1 + Kb + Kn], row = truth.
        num_base: Kb.

    Returns:
        The keys of `SUMMARY`, in percent. Classes that never occur are left out of the means; a mean without any
        class is NaN.
    """
    iou = iou_per_class(confusion)
    base, without_background, novel = iou[: num_base + 1], iou[1 : num_base + 1], iou[num_base + 1 :]
    means = {'base': _mean(base), 'base_without_background': _mean(without_background), 'novel': _mean(novel)}
    pair = means['base'] + means['novel']
    means['total'] = _mean(iou)
    means['harmonic'] = 0.0 if pair == 0 else 2 * means['base'] * means['novel'] / pair
    means['mean'] = (means['base_without_background'] + means['novel']) / 2
    return means


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float('nan')
