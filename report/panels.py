"""Pictures of predictions, written while an evaluation runs: palette PNGs, panels of example images, overlays."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.files import atomic_write
from core.ranks import is_main
from dataset import SegmentationDataset
from dataset.legend import Legend
from dataset.masks import save_palette_png
from engine.distributed import all_gather, on_main
from engine.inference import Segmenter
from engine.metrics import confusion_matrix, iou_per_class
from report.arrays import label_array
from report.figures import color_classes, panel_figure
from report.plotting import save_figure


def save_labels(path: Path, labels: np.ndarray, legend: Legend):
    """Write labels (uint8 [H, W], below 255) as a palette PNG of class ids, in the data set's colours."""
    save_palette_png(path, np.array(legend.class_ids, np.uint8)[labels], legend.value_colors)


class ImageScores:
    """Scores each image of an evaluation and, with a folder, writes its prediction.

    Args:
        legend: names and colours of the labels.
        folder: gets ID.png of every image, a palette PNG of class ids.

    Attributes:
        scores: image id -> (mean IoU in percent over the classes in truth or prediction, shows a novel class);
            images without a pixel that counts are left out.
    """

    def __init__(self, legend: Legend, folder: Path | None = None):
        self.legend, self.folder = legend, folder
        self.scores: dict[str, tuple[float, bool]] = {}

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]."""
        counts = confusion_matrix(truth, prediction, len(self.legend.names)).cpu()
        prediction, truth = label_array(prediction), label_array(truth)
        if counts.any():
            shows_novel = bool(np.isin(truth, list(self.legend.novel_labels)).any())
            self.scores[image_id] = (float(np.nanmean(iou_per_class(counts))), shows_novel)
        if self.folder:
            save_labels(self.folder / f'{image_id}.png', prediction, self.legend)


def choose_examples(scores: Mapping[str, tuple[float, bool]], count: int) -> dict[str, str]:
    """Choose images to look at: in turn the worst, a median, the best, and one with novel classes.

    Args:
        scores: `ImageScores.scores`.
        count: how many images.

    Returns:
        Image id -> what it is an example of, e.g. 'worst1'.
    """
    ordered = sorted(scores, key=lambda image_id: (scores[image_id][0], image_id))
    novel = [image_id for image_id in ordered if scores[image_id][1]]
    queues = {'worst': ordered, 'median': _from_the_middle(ordered), 'best': ordered[::-1],
              'novel': _from_the_middle(novel)}  # fmt: skip
    chosen, rank = {}, 0
    while len(chosen) < min(count, len(ordered)):
        rank += 1
        for kind, queue in queues.items():
            image_id = next((image_id for image_id in queue if image_id not in chosen), None)
            if image_id is not None and len(chosen) < count:
                chosen[image_id] = f'{kind}{rank}'
    return chosen


def _from_the_middle(items):
    """Items by their distance from the middle of the list."""
    order = sorted(range(len(items)), key=lambda i: abs(i - (len(items) - 1) / 2))
    return [items[i] for i in order]


class PanelWriter:
    """Writes a panel of each prediction that it is given.

    Args:
        legend: names and colours of the labels.
        read_image: image id -> RGB uint8 [H, W, 3].
        folder: gets the pictures.
        chosen: image id -> what it is an example of.
        scores: `ImageScores.scores`.
    """

    def __init__(
        self,
        legend: Legend,
        read_image: Callable[[str], np.ndarray],
        folder: Path,
        chosen: Mapping[str, str],
        scores: Mapping[str, tuple[float, bool]],
    ):
        self.legend, self.read_image, self.folder = legend, read_image, folder
        self.chosen, self.scores = chosen, scores

    def path(self, image_id: str) -> Path:
        """Where the panel of an image is written."""
        return self.folder / f'{self.chosen[image_id]}_{image_id}.png'

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]."""
        prediction, truth = label_array(prediction), label_array(truth)
        title = f'{image_id} ({self.chosen[image_id].rstrip("0123456789")}): mIoU {self.scores[image_id][0]:.1f} %'
        figure = panel_figure(self.read_image(image_id), truth, prediction, self.legend, title)
        save_figure(self.path(image_id), figure)


def draw_examples(segmenter: Segmenter, dataset: SegmentationDataset, scores: ImageScores, folder: Path, count: int):
    """Choose example images by their scores, segment them once more and write their panels.

    Args:
        segmenter: the one that gave the scores.
        dataset: the evaluation images.
        scores: scores of this process's images.
        folder: gets the panels; those of an earlier evaluation, which showed other images, are removed.
        count: how many images.
    """
    all_scores = {image_id: score for share in all_gather(scores.scores) for image_id, score in share.items()}
    chosen = choose_examples(all_scores, count)
    on_main(lambda: _remove_pictures(folder))
    panels = PanelWriter(scores.legend, dataset.samples.read_image, folder, chosen, all_scores)
    segmenter.run(dataset.chosen(chosen), panels)
    if is_main():
        print(''.join(f'picture: {panels.path(image_id)}\n' for image_id in chosen), end='')


def _remove_pictures(folder):
    for path in folder.glob('*.png'):
        path.unlink(missing_ok=True)


class OverlayWriter:
    """Writes the class ids of each prediction, ID.png, and its image with the classes coloured, ID_overlay.jpg.

    Args:
        legend: names and colours of the labels.
        read_image: image id -> RGB uint8 [H, W, 3].
        folder: gets the pictures.
    """

    def __init__(self, legend: Legend, read_image: Callable[[str], np.ndarray], folder: Path):
        self.legend, self.read_image, self.folder = legend, read_image, folder

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor):
        """Take one image's labels, integer [H, W]; the truth is not used."""
        labels = label_array(prediction)
        save_labels(self.folder / f'{image_id}.png', labels, self.legend)
        overlay = Image.fromarray(color_classes(self.read_image(image_id), labels, self.legend))
        with atomic_write(self.folder / f'{image_id}_overlay.jpg', 'wb', sync=False) as file:
            overlay.save(file, format='jpeg', quality=92)


class ConfidenceWriter:
    """Writes how sure each prediction is, ID_confidence.png, grey: 0..255 for probabilities 0..1.

    Args:
        folder: gets the pictures.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, image_id: str, confidence: torch.Tensor):
        """Take one image's confidence, uint8 [H, W]."""
        with atomic_write(self.folder / f'{image_id}_confidence.png', 'wb', sync=False) as file:
            Image.fromarray(label_array(confidence)).save(file, format='png')
