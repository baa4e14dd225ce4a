"""Draw figures/teach.jpg: a class that utils.teach learned from five photographs, and other photographs of it.

python -m figures.teach --data-dir voc-mini --restore-from runs/mini/voc_fold0/base

The class is aeroplane, the first novel class of VOC's fold 0. It learns from the first five training photographs in
which it covers at least 16384 pixels, and segments the first five evaluation photographs that show it.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dataset.masks import read_mask
from dataset.spec import DatasetSpec
from utils import predict, teach

CLASS_ID, NAME, SHOTS = 1, 'aeroplane', 5
MIN_PIXELS = DatasetSpec.min_pixels


def showing(data: Path, split: str, pixels: int) -> Iterator[tuple[str, np.ndarray]]:
    """Ids, and where they show the class, bool [H, W], of the first photographs of a list that show enough of it."""
    for image_id in (data / f'ImageSets/Segmentation/{split}.txt').read_text().split():
        shown = read_mask(data / f'SegmentationClassAug/{image_id}.png') == CLASS_ID
        if shown.sum() >= pixels:
            yield image_id, shown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--restore-from', required=True)
    args = parser.parse_args()
    figure = Figure(figsize=(12, 4.4), layout='constrained')
    rows = figure.subplots(2, SHOTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (f'photos/{NAME}', 'others'):
            (folder / part).mkdir(parents=True)
        for axes, (image_id, shown) in zip(rows[0], showing(args.data_dir, 'trainaug', MIN_PIXELS), strict=False):
            photograph = args.data_dir / f'JPEGImages/{image_id}.jpg'
            shutil.copy(photograph, folder / 'photos' / NAME)
            Image.fromarray(shown).save(folder / f'photos/{NAME}/{image_id}.png')
            image = np.array(Image.open(photograph).convert('RGB'), np.float32)
            axes.imshow(np.where(shown[..., None], 0.4 * image + (0.6 * 255, 0, 0), image).astype(np.uint8))
            axes.set_title('labelled', fontsize=9)
        out = ('--out', str(folder / 'taught'), '--no-leave-out')
        teach.main(teach.parse_args(['--restore-from', args.restore_from, '--support', str(folder / 'photos'), *out]))
        others = dict(zip(range(SHOTS), showing(args.data_dir, 'val', 1), strict=False)).values()
        for image_id, _ in others:
            shutil.copy(args.data_dir / f'JPEGImages/{image_id}.jpg', folder / 'others')
        flags = ('--images', str(folder / 'others'), '--save-path', str(folder / 'segmented'))
        predict.main(predict.parse_args(['--restore-from', str(folder / 'taught'), *flags]))
        for axes, (image_id, shown) in zip(rows[1], others, strict=True):
            found = read_mask(folder / f'segmented/{image_id}.png') == CLASS_ID
            axes.imshow(Image.open(folder / f'segmented/{image_id}_overlay.jpg'))
            axes.set_title(f'IoU {100 * (found & shown).sum() / (found | shown).sum():.0f} %', fontsize=9)
    for axes in rows.flat:
        axes.set_axis_off()
    figure.savefig(Path(__file__).with_name('teach.jpg'), dpi=100, pil_kwargs={'quality': 82})


if __name__ == '__main__':
    main()
