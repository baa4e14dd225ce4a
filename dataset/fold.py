"""One fold of a dataset on disk: the data sets of the two stages and of evaluation."""

import os
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError, some
from dataset.classes import DatasetSpec
from dataset.fewshot import FewShotDataset
from dataset.images import Samples, other_suffixes
from dataset.labels import label_table
from dataset.lists import CACHE_NAME, ClassIndex, FoldLists, ensure_class_lists, read_ids
from dataset.segmentation import SegmentationDataset
from dataset.shapes import ensure_shapes


@dataclass(frozen=True)
class FoldData:
    """One fold of one dataset on disk: builds the data sets that training and evaluation ask for.

    Attributes:
        spec: the dataset.
        data_dir: its folder.
        fold: -1, 0, 1, ...
        train_list, val_list: lists of image ids; the class lists are beside the train list.
        filter_novel: training images with novel classes are left out.
        skip_bad: images that cannot be read are no error; support images still are.
    """

    spec: DatasetSpec
    data_dir: Path
    fold: int
    train_list: Path
    val_list: Path
    filter_novel: bool = False
    skip_bad: bool = False

    @property
    def base_ids(self):
        return self.spec.base_ids(self.fold)

    @property
    def novel_ids(self):
        return self.spec.novel_ids(self.fold)

    @property
    def legend(self):
        """Names and colours of the labels."""
        return self.spec.legend(self.fold)

    @property
    def lists(self):
        return FoldLists(Path(self.train_list).parent, self.fold, self.filter_novel)

    def ensure_images(self):
        """Make the embedded data where it is asked for and not there; other data are the user's."""
        if self.spec.name == 'shapes':
            ensure_shapes(self.data_dir)

    def prepare(self) -> list[str]:
        """Check the data before training: class lists are made where they are missing, validation masks are read.

        Returns:
            Notes on the lists (`ensure_lists`).
        """
        notes = self.ensure_lists()
        self.check_validation_masks()
        return notes

    def ensure_lists(self, overwrite=False):
        """Make the fold's class lists where they are missing, and check them where they are there.

        Returns:
            list of str: notes on classes without an image, and on lists that are kept though this data gives others.
        """
        self.ensure_images()
        differing = ensure_class_lists(self.spec, self.samples('train', True), self.train_list, self.lists, overwrite)
        notes = []
        lists = {c: self.lists.novel_class(c) for c in self.novel_ids}
        lists |= {c: self.lists.base_class(c) for c in self.base_ids}
        empty = [self.spec.class_names[c - 1] for c, path in lists.items() if not read_ids(path, '', True)]
        if empty:
            notes.append(
                f'no training image shows >= {self.spec.min_pixels} pixels of {some(empty)}, so stage 2 will refuse to '
                'start: add images, or lower min_pixels in dataset/classes.py'
            )
        if differing:
            notes.append(
                f'{len(differing)} lists of fold {self.fold} are taken as they are, though this data and min_pixels '
                f'{self.spec.min_pixels} give others: {some(map(str, differing))}. Remove those to be made anew.'
            )
        return notes

    def check_validation_masks(self):
        """Read every validation mask once, so that a bad one ends a run before its first epoch rather than after."""
        ids = read_ids(self.val_list, self.spec.mend)
        cache = Path(self.val_list).parent / f'val_{CACHE_NAME}'
        ClassIndex.from_masks(self.samples('val', True, ids), ids, self.spec.num_classes, cache)

    def base_training(self, augmentation, seed):
        """Stage 1: images with at least one base class, novel pixels relabelled background."""
        ids = read_ids(self.lists.train, self._mend_lists)
        return SegmentationDataset(ids, self.samples('train', True, ids), augmentation, seed, skip_bad=self.skip_bad)

    def few_shot_training(self, augmentation, shot, seed, redraw_every=0):
        """Stage 2: pairs of a support view, all annotations kept, and a base view without novel annotations."""
        class_lists = {c: read_ids(self.lists.base_class(c), self._mend_lists, True) for c in self.base_ids}
        base_ids = list(dict.fromkeys(image_id for ids in class_lists.values() for image_id in ids))
        support_ids = self.support_ids(shot, seed)
        support = SegmentationDataset(support_ids, self.samples('train', False, support_ids), augmentation)
        base = SegmentationDataset(
            base_ids, self.samples('train', True, base_ids), augmentation, skip_bad=self.skip_bad
        )
        return FewShotDataset(support, base, class_lists, shot, seed, redraw_every)

    def check_support(self, shot, seeds):
        """InputError where the support list of one of the seeds is missing or does not fit."""
        missing = [seed for seed in seeds if not self.lists.support(shot, seed).is_file()]
        if missing:
            paths = ', '.join(str(self.lists.support(shot, seed)) for seed in missing)
            raise InputError(f'list {paths} does not exist; make it with: {self._support_command(shot, *missing)}')
        for seed in seeds:
            self.support_ids(shot, seed)

    def _support_command(self, shot, *seeds):
        command = (
            'python', '-m', 'utils.gen_fs_list', '--dataset', self.spec.name, '--data-dir', self.data_dir,
            '--train-list', self.train_list, '--fold', self.fold, '--shot', shot, '--seed', *seeds,
        )  # fmt: skip
        return shlex.join(map(str, command))

    def support_ids(self, shot, seed):
        """The support images of a draw, K per novel class; InputError where the list is of another fold or shot."""
        path = self.lists.support(shot, seed)
        mend = f'make it with: {self._support_command(shot, seed)}'
        ids = read_ids(path, mend, allow_repeats=True)
        if len(ids) != shot * len(self.novel_ids):
            raise InputError(
                f'list {path} names {len(ids)} images; {shot} shots of {len(self.novel_ids)} novel classes are '
                f'{shot * len(self.novel_ids)}. Is it a list of another shot? To make it anew, delete it and {mend}'
            )
        samples = self.samples('train', False, ids)
        for i, image_id in enumerate(ids):
            label = len(self.base_ids) + 1 + i // shot
            if label not in samples.read(image_id)[1]:
                raise InputError(
                    f'list {path}, line {i + 1}: image {image_id} does not show novel class '
                    f'{self.novel_ids[i // shot]}. Is it a list of another fold? To make it anew, delete it and {mend}'
                )
        return ids

    def validation(self, size, with_novel, original_size=False, limit=None):
        """Evaluation images.

        Args:
            size ((int, int)): images are resized to fit (H, W) and padded.
            with_novel (bool): novel pixels have their own labels; otherwise they count as background.
            original_size (bool): masks stay at their original size, as the final evaluation compares.
            limit (int, optional): a random choice of so many images, the same for every run.
        """
        ids = read_ids(self.val_list, self.spec.mend)
        if limit and limit < len(ids):
            chosen = set(random.Random(0).sample(ids, limit))
            ids = [image_id for image_id in ids if image_id in chosen]
        samples = self.samples('val', not with_novel, ids)
        return SegmentationDataset(ids, samples, fit_size=size, resize_mask=not original_size, skip_bad=self.skip_bad)

    @property
    def _mend_lists(self):
        return f'remove {self.lists.train.parent} to have its lists made anew'

    def samples(self, split, novel_as_background, ids=()):
        """How to read the 'train' or 'val' split; InputError where its folders or one of `ids` is not there.

        With fold -1 the labels are the class ids.
        """
        images = Path(self.data_dir) / getattr(self.spec, f'{split}_images')
        masks = Path(self.data_dir) / getattr(self.spec, f'{split}_masks')
        for folder, suffix in ((images, '.jpg'), (masks, '.png')):
            if not folder.is_dir():
                raise InputError(f'folder {folder} does not exist; {self.spec.mend}')
            present = set(os.listdir(folder))
            missing = [image_id + suffix for image_id in ids if image_id + suffix not in present]
            if missing:
                if twins := other_suffixes(folder / missing[0]):
                    raise InputError(
                        f'{folder} holds {some(twins)}; expected {missing[0]}: rename its files to *{suffix}'
                    )
                raise InputError(
                    f'{len(missing)} of {len(ids)} listed images are missing in {folder}: {some(missing)}. '
                    'Check --data-dir and the lists.'
                )
        return Samples(images, masks, label_table(self.base_ids, self.novel_ids, novel_as_background))
