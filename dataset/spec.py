"""What distinguishes one data set from another (`DatasetSpec`); `cards` reads it from a file.

A class id is the value of a class in the masks, 0..255: `labels` turns class ids into labels, which count from 0.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core import IGNORE_INDEX
from dataset.labels import label_table
from dataset.legend import Legend, Palette, colors_of

MAX_CLASSES = 253  # of the 256 labels, 0 is background, 254 invalid and 255 ignored (`labels`)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: classes, folds, files, and the training settings that depend on it.

    Attributes:
        name: in checkpoints and results.
        classes: class id -> name, ascending, without the background.
        folds: novel class ids of fold 0, 1, ...; ascending.
        background: its value in masks; None: every pixel is of a class or ignored. Label 0 then exists all the same,
            as stage 1 takes novel pixels for background. No pixel of that label is evaluated, and no prediction has it.
        ignore: values of pixels that count neither in training nor in evaluation.
        images, masks: split -> folder under the data folder; 'train' and 'val', and 'test' where there is `test_list`.
        train_list, val_list: lists of image ids; the validation list is None where there is none.
        test_list: what test.py evaluates in place of `val_list`, or None.
        lists_in_data: the lists' paths start from the data folder; otherwise from the working directory.
        scale_range: (low, high) of the random resize factor in training, relative to the original size.
        batch_size: global batch size of stage 1.
        min_pixels: number of pixels that a class must cover in its support images and replayed base images.
        palette: colours of the classes in pictures.
        hint: how to get the data, for error messages.
        root: default data folder, where there is one.
        card: the file that says so.
    """

    name: str
    classes: Mapping[int, str]
    folds: tuple[tuple[int, ...], ...]
    train_list: Path
    val_list: Path | None
    images: Mapping[str, str]
    masks: Mapping[str, str]
    background: int | None = 0
    ignore: tuple[int, ...] = (IGNORE_INDEX,)
    test_list: Path | None = None
    lists_in_data: bool = False
    scale_range: tuple[float, float] = (0.9, 1.1)
    batch_size: int = 8
    min_pixels: int = 16 * 32 * 32
    palette: Palette = 'spread'
    hint: str = 'see docs/own_data.md'
    root: Path | None = None
    card: Path | None = None

    def __str__(self):
        return self.name

    @property
    def choice(self) -> str:
        """What --dataset takes."""
        return str(self.card) if self.root else self.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in ascending class id, without the background."""
        return tuple(self.classes.values())

    def novel_ids(self, fold: int) -> tuple[int, ...]:
        """Novel class ids of a fold, ascending; none for fold -1. Raises ValueError if there is no such fold."""
        if fold == -1:
            return ()
        if not self.folds:
            raise ValueError(f'{self.name} has no folds: name its novel classes in {self.card} (novel: [...])')
        if not 0 <= fold < len(self.folds):
            raise ValueError(f'fold {fold} not supported; {self.name} has folds 0..{len(self.folds) - 1}, -1 for none')
        return self.folds[fold]

    def base_ids(self, fold: int) -> tuple[int, ...]:
        """Base class ids of a fold, ascending."""
        novel = self.novel_ids(fold)
        return tuple(c for c in self.classes if c not in novel)

    def legend(self, fold: int, novel_ids: tuple[int, ...] | None = None) -> Legend:
        """Names and colours of a fold's labels: background, base and novel classes, or other novel classes."""
        base_ids = self.base_ids(fold)
        ids = base_ids + (self.novel_ids(fold) if novel_ids is None else novel_ids)
        return Legend.of([(c, self.classes[c]) for c in ids], len(base_ids), self.palette, self.background)

    def label_table(self, fold: int, novel_ids: tuple[int, ...], novel_as_background: bool) -> np.ndarray:
        """As `labels.label_table`; novel classes of the fold that are not among `novel_ids` have label 0."""
        table = label_table(self.base_ids(fold), novel_ids, novel_as_background, self.background, self.ignore)
        table[[c for c in self.novel_ids(fold) if c not in novel_ids]] = 0
        return table

    @property
    def class_colors(self) -> dict[bytes, int]:
        """RGB bytes -> value in masks, of background, classes and ignored pixels, in the data set's own colours."""
        colors = colors_of(self.palette, self.background)
        values = () if self.background is None else (self.background,)
        return {colors[value].tobytes(): value for value in (*values, *self.classes, *self.ignore)}

    def folders(self, split: str) -> tuple[str, str]:
        """Folders of the images and of the masks of a split, 'train' or 'val', under the data folder."""
        return self.images[split], self.masks[split]

    def list_path(self, split: str, data_dir: str | Path | None) -> Path | None:
        """The list of a split, 'train' or 'val'; `data_dir` may be None unless `lists_in_data`."""
        path = {'train': self.train_list, 'val': self.val_list}[split]
        return Path(data_dir) / path if path and self.lists_in_data else path

    def tested(self) -> 'DatasetSpec':
        """The same data set with its test split, where it has one, in place of 'val'."""
        if self.test_list is None:
            return self
        images, masks = (dict(folders) | {'val': folders['test']} for folders in (self.images, self.masks))
        return dataclasses.replace(self, val_list=self.test_list, images=images, masks=masks)

    def described(self) -> dict:
        """What checkpoints keep of a data set, for commands that do not have it, in types that JSON can hold."""
        palette = self.palette if isinstance(self.palette, str) else [[v, list(color)] for v, color in self.palette]
        classes = [list(pair) for pair in self.classes.items()]
        return {'classes': classes, 'background': self.background, 'ignore': list(self.ignore), 'palette': palette}
