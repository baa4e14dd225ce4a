"""Figures of results: panels of predictions, confusion matrix, IoU of each class, prototypes, support images."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from core import IGNORE_INDEX
from dataset.legend import Legend
from report.arrays import similarity
from report.plotting import Figure, Patch, plain_text

ERRORS = {  # what can be wrong with a pixel, and its colour in error maps (also for colour-blind readers)
    'correct': (224, 224, 224),
    'class missed': (0, 114, 178),
    'background taken for a class': (230, 159, 0),
    'other class': (204, 51, 17),
    'not counted': (255, 255, 255),
}
ROWS_AT_ONCE = 256  # of large photographs: numbers with a fraction take eight times the memory
BASE_COLOR, NOVEL_COLOR = '#4477AA', '#EE6677'


def error_map(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Colours of `ERRORS`, uint8 [H, W, 3], for labels [H, W]."""
    kind = np.zeros(truth.shape, np.uint8)
    wrong = truth != prediction
    kind[wrong & (prediction == 0)] = 1
    kind[wrong & (truth == 0)] = 2
    kind[wrong & (truth > 0) & (prediction > 0)] = 3
    kind[truth == IGNORE_INDEX] = 4
    return np.array(list(ERRORS.values()), np.uint8)[kind]


def panel_figure(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, legend: Legend, title: str = ''
) -> Figure:
    """Image, ground truth, prediction and error map side by side, with a legend of the classes that occur.

    Args:
        image: RGB uint8 [H, W, 3].
        truth, prediction: labels uint8 [H, W]; 255 in the truth is not counted.
        legend: names and colours of the labels.
        title: text above the pictures.
    """
    colors = legend.colors
    height, width = truth.shape
    present = sorted({*np.unique(truth), *np.unique(prediction)} - {IGNORE_INDEX})
    figure = Figure(figsize=(12, 2.9 * height / width + 1.15 + 0.25 * (-(-len(present) // 6))), layout='constrained')
    pictures = {
        'image': image, 'ground truth': colors[truth], 'prediction': colors[prediction],
        'errors': error_map(truth, prediction),
    }  # fmt: skip
    for axis, (name, picture) in zip(figure.subplots(1, 4), pictures.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(name, fontsize=13)
        axis.set_axis_off()
    figure.suptitle(plain_text(title), fontsize=13)
    kinds = [_patch(name, color) for name, color in list(ERRORS.items())[1:]]
    figure.legend(handles=[*_patches(legend, present), *kinds], loc='outside lower center', ncols=6,
                  frameon=False, fontsize=12)  # fmt: skip
    return figure


def similarity_figure(prototypes: Sequence[torch.Tensor], legend: Legend) -> Figure:
    """Cosine similarities of different prototypes, base before novel.

    Args:
        prototypes: as in `similarity`.
        legend: names and colours of the labels.
    """
    matrix = similarity(prototypes)
    np.fill_diagonal(matrix, np.nan)
    limit = max(float(np.nanmax(np.abs(matrix))), 0.01) if len(matrix) > 1 else 1.0
    figure, axis = _square(len(matrix))
    shown = axis.imshow(matrix, cmap='RdBu_r', vmin=-limit, vmax=limit)
    axis.set_facecolor('lightgrey')
    figure.colorbar(shown, ax=axis, shrink=0.8, label='cosine similarity')
    _name_cells(axis, legend.names[1:], legend.num_base)
    axis.set_title('similarity of prototypes')
    return figure


def confusion_figure(confusion: np.ndarray, legend: Legend) -> Figure:
    """Confusion matrix, each row in percent of the true class's pixels.

    Args:
        confusion: int [K, K], row = truth.
        legend: names and colours of the K labels.
    """
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure, axis = _square(len(percent))
    shown = axis.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(shown, ax=axis, shrink=0.8, label="% of the true class's pixels")
    if len(percent) <= 30:
        for i, j in np.argwhere(percent >= 0.5):
            color = 'white' if percent[i, j] > 60 else 'black'
            axis.text(j, i, f'{percent[i, j]:.0f}', ha='center', va='center', fontsize=8, color=color)
    _name_cells(axis, legend.names, legend.num_base + 1)
    axis.set_xlabel('prediction')
    axis.set_ylabel('ground truth')
    return figure


def iou_figure(ious: np.ndarray, legend: Legend, title: str) -> Figure:
    """Bars of each class's IoU, base and novel classes in different colours, with their means.

    Args:
        ious: percent [S, K] of S seeds; NaN for classes that do not occur.
        legend: names and colours of the K labels.
        title: text above the bars.
    """
    count = len(legend.names)
    means = np.array([np.mean(column[~np.isnan(column)]) if (~np.isnan(column)).any() else np.nan for column in ious.T])
    figure = Figure(figsize=(9, 0.9 + 0.24 * count), layout='constrained')
    axis = figure.subplots()
    colors = [BASE_COLOR] * (legend.num_base + 1) + [NOVEL_COLOR] * (count - legend.num_base - 1)
    axis.barh(range(count), np.nan_to_num(means), color=colors)
    if len(ious) > 1:
        for one in ious:
            axis.plot(one, range(count), 'k.', markersize=4)
    for k, mean in enumerate(means):
        # to the right of the bar and of the seeds' points
        end = 0 if np.isnan(mean) else np.nanmax([*ious[:, k], mean])
        axis.text(end + 1, k, 'does not occur' if np.isnan(mean) else f'{mean:.1f}', va='center', fontsize=9)
    axis.set_yticks(range(count), legend.names, fontsize=9)
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_xlim(0, 108)
    axis.set_xlabel('IoU in %' + (', points: single seeds' if len(ious) > 1 else ''))
    axis.spines[['top', 'right']].set_visible(False)
    kinds = {'background and base': (BASE_COLOR, means[: legend.num_base + 1])}
    if legend.novel_labels:
        kinds['novel'] = (NOVEL_COLOR, means[legend.num_base + 1 :])
    handles = [
        Patch(color=color, label=f'{kind}: mean {np.nanmean(values):.1f} %')
        for kind, (color, values) in kinds.items() if not np.isnan(values).all()
    ]  # fmt: skip
    axis.legend(handles=handles, loc='lower right', fontsize=10)
    axis.set_title(plain_text(title))
    return figure


def support_figure(support: Sequence[Sequence[tuple[str, np.ndarray, np.ndarray]]], legend: Legend) -> Figure:
    """Support images with their masks: rows of up to five images of one novel class, or of five classes with one shot.

    Args:
        support: of each novel class, in the order of the labels: image id, RGB uint8 [H, W, 3] and labels uint8 [H, W]
            of its images.
        legend: names and colours of the labels.
    """
    shot = max(map(len, support))
    columns = min(shot, 5)
    lines = -(-shot // columns) * len(support)
    # one shot: the classes side by side
    rows, columns = (lines, columns) if shot > 1 else (-(-lines // 5), min(lines, 5))
    figure = Figure(figsize=(2.4 * columns, 2.15 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    per_class = -(-shot // columns) * columns if shot > 1 else 1
    for i, (label, images) in enumerate(zip(legend.novel_labels, support, strict=True)):
        for axis, (image_id, image, labels) in zip(axes.flat[i * per_class :], images, strict=False):
            axis.imshow(color_classes(image, labels, legend))
            axis.set_title(plain_text(f'{legend.names[label]}\n{image_id}'), fontsize=9)
    add_legend(figure, (labels for images in support for _, _, labels in images), legend, columns=max(2, columns + 1))
    return figure


def add_legend(figure: Figure, maps: Iterable[np.ndarray], legend: Legend, columns: int = 6):
    """Name, below a figure, the classes that label maps (uint8) show, without the background."""
    shown = {label for labels in maps for label in np.unique(labels).tolist() if 0 < label < len(legend.names)}
    figure.legend(handles=_patches(legend, sorted(shown)), loc='outside lower center', ncols=columns, frameon=False,
                  fontsize=10)  # fmt: skip


def color_classes(image: np.ndarray, labels: np.ndarray, legend: Legend) -> np.ndarray:
    """Blend an image (RGB uint8 [H, W, 3]) with the colours of its classes (labels uint8 [H, W])."""
    blended = np.empty_like(image)
    for top in range(0, len(image), ROWS_AT_ONCE):
        pixels, shown = image[top : top + ROWS_AT_ONCE], labels[top : top + ROWS_AT_ONCE]
        colored = ((shown > 0) & (shown < len(legend.names)))[:, :, None]
        blended[top : top + ROWS_AT_ONCE] = np.where(colored, 0.4 * pixels + 0.6 * legend.colors[shown], pixels)
    return blended


def legend_figure(legend: Legend) -> Figure:
    """The colours of all classes but background."""
    count = len(legend.names) - 1
    figure = Figure(figsize=(8, 0.6 + 0.25 * -(-count // 4)), layout='constrained')
    figure.legend(handles=_patches(legend, range(1, count + 1)), loc='center', ncols=4, frameon=False, fontsize=10)
    return figure


def _patch(name, color):
    """Entry of a matplotlib legend; the colour is uint8 RGB."""
    return Patch(facecolor=np.asarray(color) / 255, edgecolor='grey', label=name)


def _patches(legend, labels):
    """Entries of a matplotlib legend for labels."""
    return [_patch(legend.names[k], legend.colors[k]) for k in labels]


def _square(count):
    """A figure and its axes, large enough for count x count cells with names."""
    side = 2.6 + max(0.3 if count <= 30 else 0.19, 4 / count) * count
    figure = Figure(figsize=(side + 0.8, side), layout='constrained')
    return figure, figure.subplots()


def _name_cells(axis, names, border):
    """Write the names at both axes of a matrix, and draw lines between base and novel classes."""
    size = 9 if len(names) <= 30 else 8
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    if border < len(names):
        axis.axhline(border - 0.5, color='black', linewidth=1)
        axis.axvline(border - 0.5, color='black', linewidth=1)
