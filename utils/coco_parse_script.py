"""Make the masks and the two lists of COCO 2014 from its annotations.

    python -m utils.coco_parse_script --coco-root COCO

Reads COCO_ROOT/annotations/instances_{train,val}2014.json. Writes COCO_ROOT/{train,val}_no_crowd/*.png and
dataset/list/coco/{train,val}.txt, the sorted ids of the images with a mask.

All annotations are checked before a mask is written. The names of their categories give the class ids. Later
annotations cover earlier ones. Crowd regions stay background, and an image without other annotations gets no mask.
Existing files are kept, so you can run the same command again after an interruption.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from core.names import files_by_id
from core.parallel import parallel_map
from dataset import DATASETS
from dataset.annotations.coco import AnnotatedImage, InstancesFile, read_instances
from dataset.annotations.outlines import RASTERIZERS, rasterize
from dataset.lists import check_ids, keep_or_write_ids
from utils.cli import make_parser
from utils.preparation import add_output_flags, link_photographs, masks_to_make, write_mask

COCO = DATASETS['coco']


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--coco-root', type=Path, required=True, help='folder of train2014, val2014 and annotations')
    parser.add_argument('--split', nargs='+', choices=('train', 'val'), default=('train', 'val'),
                        help='default: train val')  # fmt: skip
    parser.add_argument('--rasterizer', choices=RASTERIZERS, default='opencv',
                        help='opencv: fillPoly on truncated vertices, as for the published results (default); '
                        'coco: exact masks by pycocotools')  # fmt: skip
    add_output_flags(parser, 'coco', '--coco-root')
    return parser.parse_args(argv)


def draw(job: tuple[Path, AnnotatedImage], class_ids: dict[str, int], rasterizer: str):
    """Draw and write one mask; `job` is its path and the image."""
    path, image = job
    objects = [(class_ids[instance.category], instance.outline) for instance in image.instances]
    write_mask(path, rasterize(image.height, image.width, objects, rasterizer))


def find_photographs(folder: Path, annotated: dict[str, AnnotatedImage]) -> dict[str, Path]:
    """The photographs of a folder by image id, sorted. Raises InputError if one of an annotated image is missing."""
    photographs = files_by_id(folder, '.jpg')
    if absent := [f'{image_id}.jpg' for image_id in annotated if image_id not in photographs]:
        raise InputError(
            f'{len(absent)} of {len(annotated)} annotated images are missing in {folder}: {some(absent)}. Unpack '
            f'{folder.name}.zip again.'
        )
    return photographs


def list_path(split: str, args: argparse.Namespace) -> Path:
    """The list of a split."""
    return args.list_dir / COCO.list_path(split, None).name


def check_split(split: str, args: argparse.Namespace) -> tuple[InstancesFile, dict[str, Path]]:
    """Read a split's annotations and find its photographs. Raises InputError if they do not fit each other or COCO."""
    path = args.coco_root / 'annotations' / f'instances_{split}2014.json'
    if not path.exists():
        raise InputError(f'{path} does not exist; unpack annotations_trainval2014.zip of COCO in --coco-root')
    instances = read_instances(path)
    instances.class_ids(COCO.class_names)
    check_ids(list_path(split, args), instances.annotated)
    photographs = find_photographs(args.coco_root / COCO.folders(split)[0], instances.annotated)
    instances.check_sizes(photographs, args.workers)
    return instances, photographs


def make_split(split: str, instances: InstancesFile, photographs: dict[str, Path], args: argparse.Namespace):
    """Write a split's missing masks and its list, and print what was done."""
    images, masks = COCO.folders(split)
    if args.mask_root:
        link_photographs(args.coco_root / images, args.mask_root / images)
    folder, annotated = (args.mask_root or args.coco_root) / masks, instances.annotated
    jobs = [(folder / f'{i}.png', annotated[i]) for i in masks_to_make(folder, annotated, args.overwrite)]
    draw_one = partial(draw, class_ids=instances.class_ids(COCO.class_names), rasterizer=args.rasterizer)
    parallel_map(draw_one, jobs, f'writing {split} masks', args.workers)
    print(f'{split}: {len(jobs)} masks written, {len(annotated) - len(jobs)} existed, '
          f'{len(photographs) - len(annotated)} images without objects')  # fmt: skip
    print(f'{split}: annotations left out: {instances.describe_left_out()}')
    print(keep_or_write_ids(list_path(split, args), list(annotated), args.overwrite))


@exits_cleanly
def main(args: argparse.Namespace):
    checked = {split: check_split(split, args) for split in args.split}
    print(f'masks go to {args.mask_root or args.coco_root}, lists to {args.list_dir}', flush=True)
    for split, (instances, photographs) in checked.items():
        make_split(split, instances, photographs, args)


if __name__ == '__main__':
    main(parse_args())
