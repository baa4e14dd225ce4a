"""Make SegmentationClassAug and the two lists of PASCAL VOC 2012 with SBD from the official downloads.

    python -m utils.voc_parse_script --voc-root VOCdevkit/VOC2012 --sbd-root benchmark_RELEASE/dataset
    python -m utils.voc_parse_script --voc-root VOC2012          # SegmentationClassAug exists already: lists only

Writes VOC_ROOT/SegmentationClassAug/*.png, which hold class ids: VOC's own mask if there is one, otherwise SBD's.
Writes dataset/list/voc/trainaug.txt, the sorted ids of all masks that are not in VOC's val list, and val.txt. Existing
files are kept, so you can run the same command again after an interruption.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from core.errors import InputError, exits_cleanly, some
from core.names import files_by_id, find_spelling
from core.parallel import parallel_map
from dataset import DATASETS, DatasetSpec, FoldData
from dataset.class_index import ClassIndex
from dataset.images import Samples, check_same_size, read_header
from dataset.lists import keep_or_write_ids, read_ids
from dataset.masks import read_colored_mask, wrong_values
from utils.cli import make_parser
from utils.preparation import add_output_flags, link_photographs, masks_to_make, write_mask

PUBLISHED_SIZES = {'trainaug.txt': 10_582, 'val.txt': 1_449}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--voc-root', type=Path, required=True, help='folder VOCdevkit/VOC2012')
    parser.add_argument(
        '--sbd-root',
        type=Path,
        help="SBD's folder benchmark_RELEASE/dataset; not needed if SegmentationClassAug exists",
    )
    add_output_flags(parser, 'voc', '--voc-root')
    return parser.parse_args(argv)


def read_sbd_mask(path: Path) -> np.ndarray:
    """Values of an SBD annotation (cls/ID.mat: GTcls.Segmentation), [H, W].

    Raises:
        InputError: the file cannot be read as an SBD annotation.
    """
    try:
        values = np.asarray(loadmat(path, simplify_cells=True)['GTcls']['Segmentation'])
        if values.ndim != 2:
            raise ValueError(f'its Segmentation has the shape {values.shape}')
        return values
    except Exception as error:  # with a damaged file, scipy raises exceptions of many types
        raise InputError(f'{path} cannot be read as an SBD annotation ({error}). Unpack it again.') from error


def convert(source: Path, folder: Path, photographs: Path):
    """Write one mask of VOC or SBD to a folder as greyscale PNG.

    Args:
        source: VOC's ID.png, as downloaded or after some tool has changed its palette, or SBD's ID.mat.
        folder: gets ID.png.
        photographs: folder of ID.jpg.

    Raises:
        InputError: the source cannot be read, holds other values than class ids, or differs in size from its
            photograph. Nothing is written then.
    """
    spec = DATASETS['voc']
    mask = read_sbd_mask(source) if source.suffix == '.mat' else read_colored_mask(source, spec.class_colors)
    if error := wrong_values(source, mask, spec.label_table(-1, (), True)):
        raise error
    photograph = find_spelling(photographs / f'{source.stem}.jpg')
    check_same_size(photograph, read_header(photograph)[0], source, mask.shape[::-1])
    write_mask(folder / f'{source.stem}.png', mask.astype(np.uint8))


def find_sources(voc_root: Path, sbd_root: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the mask of every image.

    Returns:
        Image id -> path of VOC's or SBD's mask, sorted by id; ids of masks without an image in JPEGImages.

    Raises:
        InputError: VOC or SBD has no masks.
    """
    sources = files_by_id(sbd_root / 'cls', '.mat')
    if not sources:
        raise InputError(f'{sbd_root} has no cls/*.mat; expected the folder "dataset" of SBD\'s benchmark_RELEASE')
    voc_masks = files_by_id(voc_root / 'SegmentationClass', '.png')
    if not voc_masks:
        raise InputError(f'{voc_root} has no SegmentationClass/*.png; expected VOCdevkit/VOC2012')
    sources |= voc_masks
    photographs = set(files_by_id(voc_root / 'JPEGImages', '.jpg'))
    return {i: sources[i] for i in sorted(sources) if i in photographs}, sorted(set(sources) - photographs)


def make_masks(args: argparse.Namespace, folder: Path):
    """Write the missing masks to SegmentationClassAug, `folder`, and print their number per source."""
    sources, without_image = find_sources(args.voc_root, args.sbd_root)
    missing = masks_to_make(folder, sources, args.overwrite)
    write = partial(convert, folder=folder, photographs=args.voc_root / DATASETS['voc'].images['train'])
    parallel_map(write, [sources[image_id] for image_id in missing], 'writing masks', args.workers)
    from_sbd = sum(path.suffix == '.mat' for path in sources.values())
    print(f'masks: {len(sources) - from_sbd} from VOC, {from_sbd} from SBD; {len(sources) - len(missing)} existed')
    if without_image:
        print(f'left out, because JPEGImages has no such image: {some(without_image)}')


def report(spec: DatasetSpec, samples: Samples, lists: dict[str, list[str]], workers: int | None):
    """Print the number of images of each list and class, and whether the lists have their published sizes.

    Args:
        spec: VOC.
        samples: its images and masks.
        lists: file name -> image ids.
        workers: number of processes; None: one per usable core.
    """
    indices = [ClassIndex.from_masks(samples, ids, workers=workers) for ids in lists.values()]
    print(f'{"class":<14}' + ''.join(f'{name:>14}' for name in lists))
    for class_id, name in spec.classes.items():
        print(f'{name:<14}' + ''.join(f'{len(index.containing([class_id])):>14}' for index in indices))
    for (name, ids), index in zip(lists.items(), indices, strict=True):
        expected = PUBLISHED_SIZES[name]
        verdict = 'as expected' if len(ids) == expected else f'expected {expected} for the published split'
        print(f'{name}: {len(ids)} images, {verdict}')
        if empty := index.without(spec.classes).ids:
            print(f'{name}: {len(empty)} masks show no class: {some(empty)}; check_data says which values they hold')


@exits_cleanly
def main(args: argparse.Namespace):
    spec = DATASETS['voc']
    data_dir = args.mask_root or args.voc_root
    images, masks = spec.folders('train')
    folder = data_dir / masks
    if not (args.voc_root / images).is_dir():
        raise InputError(f'{args.voc_root} has no folder JPEGImages; expected VOCdevkit/VOC2012')
    val_source = args.voc_root / 'ImageSets' / 'Segmentation' / 'val.txt'
    val = read_ids(val_source, 'it names the images for evaluation; in VOCdevkit/VOC2012 it is there')
    if args.mask_root:
        link_photographs(args.voc_root / images, args.mask_root / images)
    if args.sbd_root:
        make_masks(args, folder)
    elif not folder.is_dir():
        raise InputError(f'{folder} does not exist; use --sbd-root to make it, or copy an existing one there')
    made = set(files_by_id(folder, '.png'))
    if missing := sorted(set(val) - made):
        raise InputError(f'{len(missing)} images of {val_source} have no mask in {folder}: {some(missing)}')
    lists = {spec.train_list.name: sorted(made - set(val)), spec.val_list.name: val}
    train_list, val_list = (args.list_dir / name for name in lists)
    samples = FoldData(spec, data_dir, -1, train_list, val_list).samples('train', novel_as_background=True)
    report(spec, samples, lists, args.workers)  # reads all masks; a list is written once they are known to be right
    for name, ids in lists.items():
        print(keep_or_write_ids(args.list_dir / name, ids, args.overwrite))


if __name__ == '__main__':
    main(parse_args())
