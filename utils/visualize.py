"""Pictures of predictions: palette PNGs, and panels of image, ground truth and prediction."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from utils.files import atomic_write
from utils.metrics import IGNORE_INDEX


def voc_palette():
    """PASCAL VOC's colours, uint8 [256, 3]: the bits of a value, dealt to red, green and blue from the top down."""
    values = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((values >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def save_palette_png(path, mask):
    """Write a mask (uint8 [H, W], class ids) as a palette PNG in VOC's colours."""
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette().tobytes())
    with atomic_write(path, 'wb', sync=False) as file:
        picture.save(file, format='png')


def draw_panel(path, image, truth, prediction, class_ids, names):
    """Draw image, ground truth and prediction side by side, with a legend of the classes that occur.

    Args:
        path (Path): PNG to write.
        image (ndarray): RGB uint8 [H, W, 3].
        truth, prediction (ndarray): labels uint8 [H, W]; 255 in the truth is ignored.
        class_ids, names (sequence): class id and name of each label.
    """
    palette = voc_palette()
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(class_ids)] = palette[list(class_ids)]
    height, width = truth.shape
    figure = Figure(figsize=(10.5, 3.5 * height / width + 0.9), layout='constrained')
    axes = figure.subplots(1, 3)
    for axis, picture, title in zip(
        axes, (image, colors[truth], colors[prediction]), ('image', 'ground truth', 'prediction'), strict=True
    ):
        axis.imshow(picture)
        axis.set_title(title)
        axis.set_axis_off()
    present = sorted({*np.unique(truth), *np.unique(prediction)} - {IGNORE_INDEX})
    handles = [Patch(facecolor=colors[k] / 255, edgecolor='grey', label=names[k]) for k in present]
    if IGNORE_INDEX in truth:
        handles.append(Patch(facecolor='white', edgecolor='grey', label='not counted'))
    figure.legend(handles=handles, loc='outside lower center', ncols=6, frameon=False)
    with atomic_write(path, 'wb', sync=False) as file:
        figure.savefig(file, format='png', dpi=100)


class PredictionWriter:
    """Writes pictures while an evaluation goes on.

    Args:
        class_ids, names (sequence): class id and name of each label.
        read_image (callable): image id -> RGB uint8 [H, W, 3].
        prediction_folder (Path, optional): gets ID.png of every image.
        overlay_folder (Path): gets panels of the first `overlays` images that show a wanted label.
        overlays (int): how many.
        wanted (collection of int): labels.
    """

    def __init__(self, class_ids, names, read_image, prediction_folder, overlay_folder, overlays, wanted):
        self.class_ids = np.array(class_ids, np.uint8)
        self.names = names
        self.read_image = read_image
        self.prediction_folder = prediction_folder
        self.overlay_folder = overlay_folder
        self.overlays = overlays
        self.wanted = list(wanted)
        self.pictures = []

    def __call__(self, image_id, prediction, truth):
        """Take one image's labels, uint8 [H, W] each."""
        if self.prediction_folder:
            save_palette_png(self.prediction_folder / f'{image_id}.png', self.class_ids[prediction])
        if len(self.pictures) < self.overlays and np.isin(truth, self.wanted).any():
            path = self.overlay_folder / f'{image_id}.png'
            draw_panel(path, self.read_image(image_id), truth, prediction, self.class_ids, self.names)
            self.pictures.append(path)
