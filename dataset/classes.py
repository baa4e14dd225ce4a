"""What distinguishes one dataset from another: a row of `ROWS`. Only this file knows which classes are novel.

A class id is the dataset's own number of a class, 1..N; in masks, 0 is background and 255 is ignored.
"""

from dataclasses import dataclass
from pathlib import Path

from core import IGNORE_INDEX
from dataset.legend import PALETTES, Legend

MAX_CLASSES = 253  # of the 256 mask values, 0 is background, 254 invalid and 255 ignored (`labels`)
LIST_ROOT = Path(__file__).parent / 'list'


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset: names, folders, folds, and the training settings that depend on it.

    Attributes:
        name: the `--dataset` choice.
        class_names: names of class ids 1..N, without the background.
        folds: novel class ids of fold 0, 1, ...; ascending.
        train_list, val_list: file names of the id lists, one image id a line.
        train_images, train_masks, val_images, val_masks: folders under the data folder.
        scale_range: (low, high) of the random resize factor in training, relative to the original size.
        batch_size: global batch size of stage 1.
        min_pixels: number of pixels that a class must cover in its support images and replayed base images.
        palette: colours of the classes in pictures (`dataset.legend.PALETTES`).
        lists_in_data: the lists are in DATA/list rather than in dataset/list/NAME.
        hint: how to get the data, for error messages.

    Raises:
        ValueError: an attribute has a value that cannot be used.
    """

    name: str
    class_names: tuple[str, ...]
    folds: tuple[tuple[int, ...], ...]
    train_list: str
    val_list: str = 'val.txt'
    train_images: str = 'JPEGImages'
    train_masks: str = 'SegmentationClassAug'
    val_images: str = 'JPEGImages'
    val_masks: str = 'SegmentationClassAug'
    scale_range: tuple[float, float] = (0.9, 1.1)
    batch_size: int = 8
    min_pixels: int = 16 * 32 * 32
    palette: str = 'spread'
    lists_in_data: bool = False
    hint: str = 'see docs/own_data.md'

    def __post_init__(self):
        if not isinstance(self.class_names, tuple) or not 0 < self.num_classes <= MAX_CLASSES:
            raise ValueError(
                f'{self.name}: class_names is {self.class_names!r}; expected a tuple of 1 to {MAX_CLASSES} names, e.g. '
                "('car', 'tree'): masks hold 8 bits"
            )
        if 'background' in self.class_names:
            raise ValueError(f'{self.name}: background is always class 0; leave it out of class_names')
        if repeated := {name for name in self.class_names if self.class_names.count(name) > 1}:
            raise ValueError(f'{self.name}: class_names has {", ".join(repeated)} more than once')
        if not isinstance(self.folds, tuple) or not self.folds:
            raise ValueError(f'{self.name}: folds is {self.folds!r}; expected a tuple of folds, e.g. ((1, 2), (3, 4))')
        for fold, ids in enumerate(self.folds):
            known = set(range(1, self.num_classes + 1))
            if not isinstance(ids, tuple) or not ids or not set(ids) < known or list(ids) != sorted(set(ids)):
                raise ValueError(
                    f'{self.name}: fold {fold} is {ids!r}; expected a tuple of ascending class ids of '
                    f'1..{self.num_classes} that leaves at least one base class, e.g. folds=((1, 2), (3, 4))'
                )
        if self.palette not in PALETTES:
            raise ValueError(f'{self.name}: palette is {self.palette!r}; expected one of {", ".join(PALETTES)}')
        if not isinstance(self.scale_range, tuple) or not 0 < self.scale_range[0] <= self.scale_range[-1]:
            raise ValueError(f'{self.name}: scale_range is {self.scale_range!r}; expected (LO, HI) with 0 < LO <= HI')

    @property
    def num_classes(self) -> int:
        """Number of classes, without the background."""
        return len(self.class_names)

    def novel_ids(self, fold: int) -> tuple[int, ...]:
        """Novel class ids of a fold, ascending; none for fold -1. Raises ValueError if there is no such fold."""
        if fold == -1:
            return ()
        if not 0 <= fold < len(self.folds):
            raise ValueError(f'fold {fold} not supported; {self.name} has folds 0..{len(self.folds) - 1}, -1 for none')
        return self.folds[fold]

    def base_ids(self, fold: int) -> tuple[int, ...]:
        """Base class ids of a fold, ascending."""
        novel = self.novel_ids(fold)
        return tuple(c for c in range(1, self.num_classes + 1) if c not in novel)

    def legend(self, fold: int, novel_ids: tuple[int, ...] | None = None) -> Legend:
        """Names and colours of a fold's labels: background, base and novel classes, or other novel classes."""
        base_ids = self.base_ids(fold)
        ids = base_ids + (self.novel_ids(fold) if novel_ids is None else novel_ids)
        return Legend(('background', *(self.class_names[c - 1] for c in ids)), (0, *ids), len(base_ids), self.palette)

    @property
    def class_colors(self) -> dict[bytes, int]:
        """RGB bytes -> class id, of the background, all classes and ignored pixels, in the data set's own colours."""
        colors = PALETTES[self.palette]()
        return {colors[c].tobytes(): c for c in (*range(self.num_classes + 1), IGNORE_INDEX)}

    def folders(self, split: str) -> tuple[str, str]:
        """Folders of the images and of the masks of a split, 'train' or 'val', under the data folder."""
        return getattr(self, f'{split}_images'), getattr(self, f'{split}_masks')

    def list_root(self, data_dir: str | Path | None) -> Path:
        """Default folder of the lists; `data_dir` may be None unless `lists_in_data`."""
        return Path(data_dir) / 'list' if self.lists_in_data else LIST_ROOT / self.name


def _blocks(num_classes, folds=4):
    """Folds of consecutive novel classes: PASCAL-5i."""
    size = num_classes // folds
    return tuple(tuple(range(f * size + 1, (f + 1) * size + 1)) for f in range(folds))


def _interleaved(num_classes, folds=4):
    """Folds in which every fourth class is novel: COCO-20i."""
    return tuple(tuple(range(f + 1, num_classes + 1, folds)) for f in range(folds))


_VOC_NAMES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip

_COCO_NAMES = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat', 'traffic light',
    'fire hydrant', 'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow', 'elephant',
    'bear', 'zebra', 'giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard',
    'sports ball', 'kite', 'baseball bat', 'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle',
    'wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange', 'broccoli',
    'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch', 'potted plant', 'bed', 'dining table', 'toilet',
    'tv', 'laptop', 'mouse', 'remote', 'keyboard', 'cell phone', 'microwave', 'oven', 'toaster', 'sink',
    'refrigerator', 'book', 'clock', 'vase', 'scissors', 'teddy bear', 'hair drier', 'toothbrush',
)  # fmt: skip

_FILLS = (
    'plain', 'pinstriped', 'striped', 'checked', 'tiled', 'dotted', 'spotted', 'netted', 'speckled', 'waved',
)  # fmt: skip
# A fold's novel classes have the fills of base classes with the other outline, so that stage 1 can learn their parts.
SHAPES = tuple((outline, fill) for outline in ('disc', 'star') for fill in _FILLS)

ROWS = (
    DatasetSpec(
        name='voc',
        class_names=_VOC_NAMES,
        folds=_blocks(20),
        train_list='trainaug.txt',
        palette='voc',
        hint='make it with: python -m utils.voc_parse_script --voc-root VOC2012 --sbd-root SBD (see docs/data.md)',
    ),
    DatasetSpec(
        name='coco',
        class_names=_COCO_NAMES,
        folds=_interleaved(80),
        train_list='train.txt',
        train_images='train2014',
        train_masks='train_no_crowd',
        val_images='val2014',
        val_masks='val_no_crowd',
        scale_range=(0.8, 1.25),
        batch_size=16,
        hint='make it with: python -m utils.coco_parse_script --coco-root COCO (see docs/data.md)',
    ),
    DatasetSpec(
        name='shapes',
        class_names=tuple(f'{fill} {outline}' for outline, fill in SHAPES),
        folds=_blocks(20),
        train_list='trainaug.txt',
        min_pixels=16 * 32,
        lists_in_data=True,
        hint='make it with: python -m dataset.shapes --data-dir DIR',
    ),
)
DATASETS = {row.name: row for row in ROWS}
