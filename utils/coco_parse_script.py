"""Make the masks and the two lists of COCO 2014 from its annotations.

    python -m utils.coco_parse_script --coco-root COCO

Reads COCO_ROOT/annotations/instances_{train,val}2014.json. Writes COCO_ROOT/{train,val}_no_crowd/*.png and
dataset/list/coco/{train,val}.txt, the sorted ids of the images with a mask.

The class id of an annotation is 1 + the position of its category in the file's category list. Later annotations cover
earlier ones. Crowd regions stay background, and an image without other annotations gets no mask. Existing files are
kept, so you can run the same command again after an interruption.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from core.errors import InputError, exits_cleanly, some
from core.files import atomic_write
from core.names import canonical, files_by_id
from core.parallel import parallel_map
from dataset import DATASETS
from dataset.classes import LIST_ROOT
from dataset.lists import keep_or_write_ids
from utils.cli import make_parser, positive


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--coco-root', type=Path, required=True, help='folder of train2014, val2014 and annotations')
    parser.add_argument('--split', nargs='+', choices=('train', 'val'), default=('train', 'val'),
                        help='default: train val')  # fmt: skip
    parser.add_argument('--rasterizer', choices=('opencv', 'coco'), default='opencv',
                        help='opencv: fillPoly on truncated vertices, as for the published results (default); '
                        'coco: exact masks by pycocotools')  # fmt: skip
    parser.add_argument('--list-dir', type=Path, default=LIST_ROOT / 'coco', help='default: dataset/list/coco')
    parser.add_argument('--workers', type=positive, help='processes (default: one per core)')
    parser.add_argument('--overwrite', action='store_true', help='make existing masks and lists again')
    return parser.parse_args(argv)


def rasterize(
    height: int, width: int, annotations: list[tuple[int, list | dict]], rasterizer: str = 'opencv'
) -> np.ndarray:
    """Draw an image's annotations into a mask.

    Args:
        height, width: size of the image.
        annotations: (class id, segmentation) in annotation order. A segmentation is a list of polygons
            [x0, y0, x1, y1, ...], or a run-length encoding {'size', 'counts'}, compressed or not.
        rasterizer: how polygons are filled, 'opencv' or 'coco'.

    Returns:
        uint8 [height, width], class ids.
    """
    mask = np.zeros((height, width), np.uint8)
    for class_id, segmentation in annotations:
        if isinstance(segmentation, list) and rasterizer == 'opencv':
            for polygon in segmentation:
                vertices = np.asarray(polygon, np.float64).reshape(-1, 2).astype(np.int32)  # truncated
                cv2.fillPoly(mask, [vertices], int(class_id))
        else:
            mask[_decode(segmentation, height, width)] = class_id
    return mask


def _decode(segmentation, height, width):
    """Region of polygons or of a run-length encoding by pycocotools, bool [height, width]."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle).astype(bool)


def write_mask(job: tuple, rasterizer: str):
    """Draw and write one mask; `job` is its path, then height, width and annotations as in `rasterize`."""
    path, *image = job
    with atomic_write(path, 'wb', sync=False) as file:
        file.write(cv2.imencode('.png', rasterize(*image, rasterizer))[1].tobytes())


def read_annotations(path: Path) -> dict[str, tuple[int, int, list]]:
    """Read the non-crowd annotations of an instances file.

    Returns:
        Image id (file name without suffix) -> height, width and annotations as in `rasterize`, sorted by image id.
        Images without non-crowd annotations are left out.

    Raises:
        InputError: the file is missing or is not a COCO instances file.
    """
    try:
        content = json.loads(path.read_text())
        class_ids = {category['id']: i for i, category in enumerate(content['categories'], 1)}
        images = {image['id']: image for image in content['images']}
        drawn = {}
        for annotation in content['annotations']:
            if not annotation.get('iscrowd', 0):
                item = (class_ids[annotation['category_id']], annotation['segmentation'])
                drawn.setdefault(annotation['image_id'], []).append(item)
        by_stem = {
            canonical(Path(images[i]['file_name']).stem): (images[i]['height'], images[i]['width'], drawn[i])
            for i in drawn
        }
    except FileNotFoundError:
        raise InputError(f'{path} does not exist; unpack annotations_trainval2014.zip of COCO in --coco-root') from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} is not a COCO instances file ({type(error).__name__}: {error}); unpack it again'
        ) from error
    return dict(sorted(by_stem.items()))


@exits_cleanly
def main(args: argparse.Namespace):
    spec = DATASETS['coco']
    for split in args.split:
        annotated = read_annotations(args.coco_root / 'annotations' / f'instances_{split}2014.json')
        photographs = set(files_by_id(args.coco_root / getattr(spec, f'{split}_images'), '.jpg'))
        if absent := [stem for stem in annotated if stem not in photographs]:
            raise InputError(
                f'{len(absent)} of {len(annotated)} annotated images are missing in '
                f'{args.coco_root / getattr(spec, f"{split}_images")}: {some(absent)}. Unpack {split}2014.zip again.'
            )
        folder = args.coco_root / getattr(spec, f'{split}_masks')
        present = set() if args.overwrite else set(files_by_id(folder, '.png'))
        jobs = [(folder / f'{stem}.png', *image) for stem, image in annotated.items() if stem not in present]
        parallel_map(partial(write_mask, rasterizer=args.rasterizer), jobs, f'writing {split} masks', args.workers)
        print(f'{split}: {len(jobs)} masks written, {len(annotated) - len(jobs)} existed, '
              f'{len(photographs) - len(annotated)} images without objects')  # fmt: skip
        print(keep_or_write_ids(args.list_dir / getattr(spec, f'{split}_list'), list(annotated), args.overwrite))


if __name__ == '__main__':
    main(parse_args())
