"""What a network was taught (`utils.teach`): tables, teach.json, and panels of the photographs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.files import atomic_write, json_ready
from dataset.legend import Legend
from report.figures import add_legend, color_classes
from report.plotting import Figure, plain_text, save_figure
from report.tables import markdown_table

MOST_ROWS = 8  # photographs of a panel


def teaching_table(classes: Mapping[str, Mapping]) -> str:
    """Markdown table of the taught classes.

    Args:
        classes: name -> {'photographs', 'left_out_iou', 'trained_iou'}; IoU in percent, None where there is none.
    """
    lines = [
        [name, str(each['photographs']), *(_percent(each[key]) for key in ('left_out_iou', 'trained_iou'))]
        for name, each in classes.items()
    ]
    return markdown_table(['class', 'photographs', 'IoU, left out in turn', 'IoU, trained on'], lines)


def _percent(value):
    return '-' if value is None or np.isnan(value) else f'{value:.1f} %'


def write_teaching(folder: Path, result: dict):
    """Write teach.json."""
    with atomic_write(folder / 'teach.json') as file:
        json.dump(json_ready(result), file, indent=2, default=str)


def draw_panel(
    path: Path, name: str, rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, bool]], legend: Legend
):
    """Draw photographs of a class beside their masks and what the network says of them; at most `MOST_ROWS`.

    Args:
        path: of the picture.
        name: of the class.
        rows: file name, RGB uint8 [H, W, 3], mask and prediction as labels uint8 [H, W], and whether the photograph
            was left out of the training that the prediction rests on.
        legend: names and colours of the labels.
    """
    rows = rows[:MOST_ROWS]
    ratios = [mask.shape[0] / mask.shape[1] for _, _, mask, _, _ in rows]
    figure = Figure(figsize=(9, 3 * sum(ratios) + 0.45 * len(rows) + 0.8), layout='constrained')
    axes = figure.subplots(len(rows), 3, squeeze=False, height_ratios=ratios)
    for line, (file, image, mask, prediction, left_out) in zip(axes, rows, strict=True):
        shown = (image, color_classes(image, mask, legend), color_classes(image, prediction, legend))
        how = 'left out of the training' if left_out else 'trained on'
        for axis, picture, title in zip(line, shown, (file, 'mask', f'prediction, {how}'), strict=True):
            axis.imshow(picture)
            axis.set_title(plain_text(title), fontsize=9)
            axis.set_axis_off()
    add_legend(figure, (labels for _, _, *maps, _ in rows for labels in maps), legend)
    figure.suptitle(plain_text(name), fontsize=13)
    save_figure(path, figure)
