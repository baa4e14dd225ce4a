"""Pictures of an evaluation's predictions while they are made: palette PNGs, panels of telling images, overlays."""

import numpy as np
from PIL import Image

from core.files import atomic_write
from dataset.legend import PALETTES
from engine.metrics import confusion_matrix, iou_per_class
from report.figures import coloured, panel_figure, save_figure
from report.tensorboard import label_array


def save_palette_png(path, mask, palette):
    """Write a mask (uint8 [H, W], class ids) as a palette PNG; the palette is uint8 [256, 3]."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    with atomic_write(path, 'wb', sync=False) as file:
        picture.save(file, format='png')


def save_labels(path, labels, legend):
    """Write labels (uint8 [H, W], below 255) as a palette PNG of class ids, in the data set's colours."""
    save_palette_png(path, np.array(legend.class_ids, np.uint8)[labels], PALETTES[legend.palette]())


class ImageScores:
    """Takes the predictions of an evaluation: scores each image, and writes it where that is asked for.

    Args:
        legend (Legend): of the labels.
        folder (Path, optional): gets ID.png of every image, a palette PNG of class ids.

    Attributes:
        scores (dict): image id -> (mean IoU in percent over the classes in truth or prediction, shows a novel class);
            images without a pixel that counts are left out.
    """

    def __init__(self, legend, folder=None):
        self.legend, self.folder = legend, folder
        self.scores = {}

    def __call__(self, image_id, prediction, truth):
        """Take one image's labels, integer tensors [H, W]."""
        counts = confusion_matrix(truth, prediction, len(self.legend.names)).cpu()
        prediction, truth = label_array(prediction), label_array(truth)
        if counts.any():
            shows_novel = bool(np.isin(truth, list(self.legend.novel_labels)).any())
            self.scores[image_id] = (float(np.nanmean(iou_per_class(counts))), shows_novel)
        if self.folder:
            save_labels(self.folder / f'{image_id}.png', prediction, self.legend)


def choose_telling(scores, count):
    """Choose images to look at: worst, median and best ones and ones with novel classes, in turn.

    Args:
        scores (dict): of `ImageScores`.
        count (int): how many.

    Returns:
        dict: image id -> what it is an example of, e.g. 'worst1'.
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
    order = sorted(range(len(items)), key=lambda i: abs(i - (len(items) - 1) / 2))
    return [items[i] for i in order]


class PanelWriter:
    """Writes a panel of each prediction that it is given.

    Args:
        legend (Legend): of the labels.
        read_image (callable): image id -> RGB uint8 [H, W, 3].
        folder (Path): of the pictures.
        chosen (dict): image id -> what it is an example of.
        scores (dict): of `ImageScores`.
    """

    def __init__(self, legend, read_image, folder, chosen, scores):
        self.legend, self.read_image, self.folder = legend, read_image, folder
        self.chosen, self.scores = chosen, scores

    def path(self, image_id):
        return self.folder / f'{self.chosen[image_id]}_{image_id}.png'

    def __call__(self, image_id, prediction, truth):
        """Take one image's labels, integer tensors [H, W]."""
        prediction, truth = label_array(prediction), label_array(truth)
        title = f'{image_id} ({self.chosen[image_id].rstrip("0123456789")}): mIoU {self.scores[image_id][0]:.1f} %'
        figure = panel_figure(self.read_image(image_id), truth, prediction, self.legend, title)
        save_figure(self.path(image_id), figure)


class OverlayWriter:
    """Writes the class ids of each prediction, ID.png, and its image with the classes coloured, ID_overlay.jpg.

    Args:
        legend (Legend): of the labels.
        read_image (callable): image id -> RGB uint8 [H, W, 3].
        folder (Path): of the pictures.

    Attributes:
        written (int): images so far.
    """

    def __init__(self, legend, read_image, folder):
        self.legend, self.read_image, self.folder = legend, read_image, folder
        self.written = 0

    def __call__(self, image_id, prediction, truth):
        """Take one image's labels, an integer tensor [H, W]; the truth is not looked at."""
        labels = label_array(prediction)
        save_labels(self.folder / f'{image_id}.png', labels, self.legend)
        overlay = Image.fromarray(coloured(self.read_image(image_id), labels, self.legend))
        with atomic_write(self.folder / f'{image_id}_overlay.jpg', 'wb', sync=False) as file:
            overlay.save(file, format='jpeg', quality=92)
        self.written += 1
