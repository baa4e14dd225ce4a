"""Draw figures/compare.jpg: photographs of novel classes as POP and as --recipe best segment them.

    python -m figures.compare --data-dir voc-small --fold 2 --pop runs/5shot --best runs/best_5shot

For each novel class of VOC's fold: the first evaluation photograph in which it covers at least 16384 pixels and that no
other class has taken, not chosen by hand. Both runs have the same base network and support images.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dataset import DATASETS
from dataset.masks import read_mask
from report.figures import add_legend, color_classes
from utils import predict

VOC = DATASETS['voc']


def first_photographs(data: Path, fold: int) -> dict[int, tuple[str, np.ndarray]]:
    """Novel class id -> id and mask, uint8 [H, W], of the first evaluation photograph that shows enough of it."""
    found = {}
    for image_id in (data / 'ImageSets/Segmentation/val.txt').read_text().split():
        mask = read_mask(data / f'SegmentationClassAug/{image_id}.png')
        for class_id in VOC.novel_ids(fold):
            if (mask == class_id).sum() >= VOC.min_pixels and image_id not in (known for known, _ in found.values()):
                found.setdefault(class_id, (image_id, mask))
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--fold', type=int, required=True)
    parser.add_argument('--pop', required=True, help='checkpoint or folder of a run of ft_pop.py')
    parser.add_argument('--best', required=True, help='the same, of --recipe best')
    args = parser.parse_args()
    legend, photographs = VOC.legend(args.fold), first_photographs(args.data_dir, args.fold)
    label_of = np.full(256, 255, np.uint8)
    label_of[list(legend.class_ids)] = range(len(legend.class_ids))
    figure = Figure(figsize=(2.6 * len(photographs), 6), layout='constrained')
    rows = figure.subplots(3, len(photographs), squeeze=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'photographs').mkdir()
        for image_id, _ in photographs.values():
            shutil.copy(args.data_dir / f'JPEGImages/{image_id}.jpg', folder / 'photographs')
        for method in ('pop', 'best'):
            flags = ('--images', str(folder / 'photographs'), '--save-path', str(folder / method))
            predict.main(predict.parse_args(['--restore-from', getattr(args, method), *flags]))
        for column, (class_id, (image_id, truth)) in enumerate(photographs.items()):
            image = np.array(Image.open(args.data_dir / f'JPEGImages/{image_id}.jpg').convert('RGB'))
            rows[0, column].imshow(color_classes(image, label_of[truth], legend))
            rows[0, column].set_title(f'ground truth: {VOC.classes[class_id]}', fontsize=10)
            for row, method, title in ((1, 'pop', 'POP'), (2, 'best', '--recipe best')):
                found = read_mask(folder / f'{method}/{image_id}.png')
                both, either = ((found == class_id) & (truth == class_id), (found == class_id) | (truth == class_id))
                iou = 100 * both.sum() / (either & (truth != 255)).sum()
                rows[row, column].imshow(color_classes(image, label_of[found], legend))
                rows[row, column].set_title(f'{title}: IoU {iou:.0f} %', fontsize=10)
    for axes in rows.flat:
        axes.set_axis_off()
    add_legend(figure, (label_of[truth] for _, truth in photographs.values()), legend)
    figure.savefig(Path(__file__).with_name('compare.jpg'), dpi=90, pil_kwargs={'quality': 82})


if __name__ == '__main__':
    main()
