"""Draw figures/slide.jpg: a large photograph, segmented as a whole and in windows.

python -m figures.slide --data-dir voc-mini --restore-from runs/mini/voc_fold0/base/best.pth --scale 0.525

The large photograph is a mosaic of the first twelve evaluation photographs of 500x375 pixels that show a base class.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dataset.masks import read_mask
from engine.checkpoint import read_checkpoint
from utils import predict

TILE, ROWS, COLUMNS = (375, 500), 3, 4


def mosaic(data: Path, base_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The photographs side by side, RGB uint8 [H, W, 3], and their class ids, uint8 [H, W]."""
    pairs = []
    for image_id in (data / 'ImageSets/Segmentation/val.txt').read_text().split():
        mask = read_mask(data / f'SegmentationClassAug/{image_id}.png')
        if mask.shape == TILE and np.isin(mask, base_ids).any():
            pairs.append((np.array(Image.open(data / f'JPEGImages/{image_id}.jpg').convert('RGB')), mask))
    pairs = pairs[: ROWS * COLUMNS]
    return tuple(
        np.concatenate([np.concatenate(each[i : i + COLUMNS], axis=1) for i in range(0, len(each), COLUMNS)])
        for each in zip(*pairs, strict=True)
    )


def mean_iou(mask: np.ndarray, truth: np.ndarray, class_ids: list[int]) -> float:
    """Mean IoU in percent of the classes that the truth shows; other classes count as background, 255 not."""
    truth = np.where(np.isin(truth, [*class_ids, 255]), truth, 0)
    counted = truth != 255
    ious = [
        ((mask == c) & (truth == c)).sum() / (((mask == c) | (truth == c)) & counted).sum()
        for c in (0, *class_ids)
        if (truth == c).any()
    ]
    return 100 * float(np.mean(ious))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--restore-from', required=True)
    parser.add_argument('--scale', required=True)
    args = parser.parse_args()
    class_ids = [class_id for class_id, _ in read_checkpoint(args.restore_from).config['classes']][:15]
    image, truth = mosaic(args.data_dir, class_ids)
    figure = Figure(figsize=(12, 3.7), layout='constrained')
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(image).save(f'{folder}/large.png')
        for axes, slide in zip(figure.subplots(1, 2), (False, True), strict=True):
            name = '--slide' if slide else 'without --slide'
            flags = ('--slide', '--scale', args.scale) if slide else ()
            to = f'{folder}/{name}'
            predict.main(predict.parse_args([
                '--restore-from', args.restore_from, '--images', f'{folder}/large.png', '--save-path', to, *flags,
            ]))  # fmt: skip
            axes.imshow(Image.open(f'{to}/large_overlay.jpg'))
            score = mean_iou(read_mask(f'{to}/large.png'), truth, class_ids)
            axes.set_title(f'{name} (mIoU {score:.1f} %)', fontsize=10)
            axes.set_axis_off()
    figure.savefig(Path(__file__).with_name('slide.jpg'), dpi=100, pil_kwargs={'quality': 82})


if __name__ == '__main__':
    main()
