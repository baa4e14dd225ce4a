"""One fold of a dataset on disk: makes the data sets of both stages and of evaluation, and checks their lists."""

import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core import IGNORE_INDEX
from core.errors import InputError, some
from core.names import printable
from dataset.class_index import CACHE_NAME, ClassIndex
from dataset.fewshot import FewShotDataset
from dataset.formats import other_suffixes
from dataset.images import MASK_SUFFIXES, Samples, find_file
from dataset.legend import Legend
from dataset.lists import FoldLists, ensure_class_lists, read_ids
from dataset.segmentation import SegmentationDataset
from dataset.spec import DatasetSpec
from dataset.support_list import read_supports
from dataset.transforms import Augmentation


@dataclass(frozen=True)
class FoldData:
    """One fold of a dataset on disk.

    Attributes:
        spec: the dataset.
        data_dir: folder of its images and masks.
        fold: 0, 1, ...; with -1, every class is a base class.
        train_list, val_list: lists of image ids; the fold's own lists are beside the train list. Without a validation
            list, there is no evaluation.
        filter_novel: omit training images that contain novel classes.
        skip_bad: an image that cannot be read is not an error, unless it is a support image.
        taught: class ids of the novel classes that a network has learned, in the order of its labels, where these are
            not those of the fold (`utils.teach`); the others count as background.
        support_list: support images that were chosen by hand (`support_list.read_supports`), in place of drawn ones.
        nested: the drawn support images of fewer shots are among those of more (`gen_fs_list --nested`).
        novel_only: supports label their novel classes only; the other pixels are unknown, and ignored.
        repeat_base: a base class with fewer images than are drawn in an epoch gives them several times.
    """

    spec: DatasetSpec
    data_dir: Path
    fold: int
    train_list: Path
    val_list: Path | None
    filter_novel: bool = False
    skip_bad: bool = False
    taught: tuple[int, ...] | None = None
    support_list: Path | None = None
    nested: bool = False
    novel_only: bool = False
    repeat_base: bool = False

    @property
    def base_ids(self) -> tuple[int, ...]:
        """Base class ids, ascending."""
        return self.spec.base_ids(self.fold)

    @property
    def novel_ids(self) -> tuple[int, ...]:
        """Novel class ids, ascending, or in the order in which they were taught."""
        return self.spec.novel_ids(self.fold) if self.taught is None else self.taught

    @property
    def legend(self) -> Legend:
        """Names and colours of the labels."""
        return self.spec.legend(self.fold, self.taught)

    @property
    def lists(self) -> FoldLists:
        """Paths of the fold's lists."""
        return FoldLists(Path(self.train_list).parent, self.fold, self.filter_novel)

    def ids(self, split: str) -> list[str]:
        """Image ids of the training or the evaluation list, 'train' or 'val'; none without a list.

        Raises as `lists.read_ids`.
        """
        path = {'train': self.train_list, 'val': self.val_list}[split]
        return read_ids(path, self.spec.hint, **self._files(split)) if path else []

    def read_list(self, path: Path, hint: str = '', **allowed: bool) -> list[str]:
        """Ids of a list of training images; as `lists.read_ids`."""
        return read_ids(path, hint, **self._files('train'), **allowed)

    def _files(self, split):
        """By which a line of a list can name the files of an id: arguments of `read_ids`."""
        return {'folders': self.spec.folders(split), 'samples': self._samples(split) if self.data_dir else None}

    def ensure_images(self):
        """Make the embedded data set if it is asked for and missing."""
        if self.spec.name == 'shapes':
            from dataset.shapes import ensure_shapes  # here: it is a command too, which a package should not import

            ensure_shapes(self.data_dir)

    def prepare(self) -> list[str]:
        """Check the data before training: read all validation and training masks, then make missing class lists.

        Returns:
            Notes on the lists, as `ensure_lists`.
        """
        self.ensure_images()
        self.samples('train', self.ids('train'), novel_as_background=True)  # missing files, before all masks are read
        self.check_validation_masks()
        return self.ensure_lists()

    def ensure_lists(self, overwrite: bool = False) -> list[str]:
        """Make the fold's missing class lists and check the existing ones.

        Returns:
            Notes: classes without an image, and existing lists that this data would not give.
        """
        self.ensure_images()
        samples = self.samples('train', novel_as_background=True)
        differing = ensure_class_lists(self.spec, samples, self.train_list, self.lists, overwrite)
        notes = []
        lists = {} if self.support_list else {c: self.lists.novel_class(c) for c in self.novel_ids}
        lists |= {c: self.lists.base_class(c) for c in self.base_ids}
        empty = [self.spec.classes[c] for c, path in lists.items() if not self.read_list(path, allow_empty=True)]
        if empty and self.fold != -1:
            notes.append(
                f'no training image shows >= {self.spec.min_pixels} pixels of {some(empty)}, so stage 2 will refuse to '
                'start: add images, or lower min_pixels'
            )
        if differing:
            notes.append(
                f'{len(differing)} existing lists of fold {self.fold} are used, but this data and min_pixels '
                f'{self.spec.min_pixels} give others: {some(map(str, differing))}. '
                f'To make all of them again: rm {shlex.quote(str(differing[0].parent))}/train_*.txt'
            )
        return notes

    def check_validation_masks(self):
        """Read every validation mask once, so that a bad mask ends a run before its first epoch, not after it."""
        if ids := self.ids('val'):
            cache = Path(self.val_list).parent / f'val_{CACHE_NAME}'
            ClassIndex.from_masks(self.samples('val', ids, novel_as_background=True), ids, cache)

    def base_training(self, augmentation: Augmentation, seed: int) -> SegmentationDataset:
        """Training set of stage 1: images with at least one base class; novel pixels are relabelled background."""
        ids = self.read_list(self.lists.train, self._lists_hint)
        samples = self.samples('train', ids, novel_as_background=True)
        return SegmentationDataset(ids, samples, augmentation, seed, skip_bad=self.skip_bad)

    def few_shot_training(
        self, augmentation: Augmentation, shot: int, seed: int, redraw_every: int = 0
    ) -> FewShotDataset:
        """Training set of stage 2: pairs of a support view with all annotations and a base view with base ones only.

        Args:
            augmentation: applied to both views.
            shot: support images per novel class unless they were chosen by hand, and base images per base class and
                epoch.
            seed: seed of the support list and of all random choices.
            redraw_every: number of epochs after which new base images are drawn; 0 keeps the first draw.
        """
        base, class_lists = self.base_images(augmentation)
        support_ids = [image_id for ids in self.checked_supports(shot, seed).values() for image_id in ids]
        samples = self.samples('train', support_ids, novel_as_background=False)
        if self.novel_only:
            samples.table[samples.table <= len(self.base_ids)] = IGNORE_INDEX
        support = SegmentationDataset(support_ids, samples, augmentation)
        return FewShotDataset(support, base, class_lists, shot, seed, redraw_every, self.repeat_base)

    def base_images(self, augmentation: Augmentation) -> tuple[SegmentationDataset, dict[int, list[str]]]:
        """What stage 2 draws base images from: views of all candidates, and base class id -> ids of its candidates."""
        class_lists = {
            c: self.read_list(self.lists.base_class(c), self._lists_hint, allow_empty=True) for c in self.base_ids
        }
        ids = list(dict.fromkeys(image_id for ids in class_lists.values() for image_id in ids))
        samples = self.samples('train', ids, novel_as_background=True)
        return SegmentationDataset(ids, samples, augmentation, skip_bad=self.skip_bad), class_lists

    def support_path(self, shot: int, seed: int) -> Path:
        """The list of the support images of a draw, or of those that were chosen by hand."""
        return self.support_list or self.lists.support(shot, seed, self.nested)

    def check_support_lists(self, shot: int, seeds: Sequence[int]):
        """Raise one InputError for all missing support lists; `few_shot_training` checks what the others hold."""
        missing = [seed for seed in seeds if not self.support_path(shot, seed).is_file()]
        if missing:
            paths = ', '.join(str(self.support_path(shot, seed)) for seed in missing)
            make = f'make it with: {self._support_command(shot, *missing)}'
            raise InputError(f'list {paths} does not exist; {"give another one" if self.support_list else make}')

    def _support_command(self, shot, *seeds):
        command = (
            'python', '-m', 'utils.gen_fs_list', '--dataset', self.spec.choice, '--data-dir', self.data_dir,
            '--train-list', self.train_list, '--fold', self.fold, '--shot', shot, '--seed', *seeds,
            *(['--nested'] if self.nested else []),
        )  # fmt: skip
        return shlex.join(map(str, command))

    def supports(self, shot: int, seed: int) -> dict[int, list[str]]:
        """Support images: novel class id -> image ids, in the order of the labels.

        K of each class where they are drawn; any number where they were chosen by hand.

        Raises:
            InputError: the list is missing or wrong, or belongs to another shot.
        """
        path = self.support_path(shot, seed)
        if self.support_list:
            return read_supports(path, {c: self.spec.classes[c] for c in self.novel_ids})
        make = f'make it with: {self._support_command(shot, seed)}'
        ids = self.read_list(path, make, allow_repeats=True)
        if len(ids) != shot * len(self.novel_ids):
            raise InputError(
                f'list {path} names {len(ids)} images; expected {shot * len(self.novel_ids)}, {shot} for each of '
                f'{len(self.novel_ids)} novel classes. Is it a list of another shot? If so, delete {path} and {make}'
            )
        return {c: ids[i * shot : (i + 1) * shot] for i, c in enumerate(self.novel_ids)}

    def checked_supports(self, shot: int, seed: int) -> dict[int, list[str]]:
        """As `supports`; InputError too where a support image does not show its class, as in a list of another fold."""
        path, supports = self.support_path(shot, seed), self.supports(shot, seed)
        samples = self.samples('train', [i for ids in supports.values() for i in ids], novel_as_background=False)
        entries = [(label, class_id, image_id)
                   for label, (class_id, ids) in enumerate(supports.items(), len(self.base_ids) + 1)
                   for image_id in ids]  # fmt: skip
        for number, (label, class_id, image_id) in enumerate(entries, 1):
            if label not in samples.read(image_id)[1]:
                line, hint = '', 'Correct the list, or the mask.'
                if not self.support_list:
                    line, make = f', line {number}', self._support_command(shot, seed)
                    hint = f'Is it a list of another fold? If so, delete {path} and make it with: {make}'
                raise InputError(f'list {path}{line}: image {image_id} does not show novel class {class_id}. {hint}')
        return supports

    def outdated_supports(self, shot: int, seed: int) -> list[str]:
        """Drawn support images that are not in the class lists any more, as after a change of min_pixels.

        Empty where support images are chosen by hand, or class lists are missing.
        """
        lists = {c: self.lists.novel_class(c) for c in self.novel_ids}
        if self.support_list or not all(path.is_file() for path in lists.values()):
            return []
        listed = {c: set(self.read_list(path, allow_empty=True)) for c, path in lists.items()}
        return [i for c, ids in self.supports(shot, seed).items() for i in ids if i not in listed[c]]

    def validation(
        self, size: tuple[int, int], with_novel: bool, original_size: bool = False, limit: int | None = None
    ) -> SegmentationDataset | None:
        """Evaluation images; None without an evaluation list.

        Args:
            size: images are resized to fit (H, W) and padded.
            with_novel: novel pixels keep their own labels; otherwise they count as background.
            original_size: masks keep their original size, at which `test.py` evaluates.
            limit: number of images, chosen at random but the same in every run; default: all.
        """
        if not self.val_list:
            return None
        ids = self.ids('val')
        if limit and limit < len(ids):
            chosen = set(random.Random(0).sample(ids, limit))
            ids = [image_id for image_id in ids if image_id in chosen]
        samples = self.samples('val', ids, novel_as_background=not with_novel)
        return SegmentationDataset(ids, samples, fit_size=size, resize_mask=not original_size, skip_bad=self.skip_bad)

    @property
    def _lists_hint(self):
        return f'remove {self.lists.train.parent} to make its lists again'

    def samples(self, split: str, ids: Sequence[str] = (), *, novel_as_background: bool) -> Samples:
        """How to read the images and masks of a split.

        Args:
            split: 'train' or 'val'.
            ids: image ids whose files must exist.
            novel_as_background: novel pixels get label 0; otherwise their own labels.

        Raises:
            InputError: a folder of the split, or the image or mask of one of `ids`, is missing.
        """
        samples = self._samples(split, novel_as_background)
        for folder, suffixes in ((samples.image_dir, samples.image_suffixes), (samples.mask_dir, MASK_SUFFIXES)):
            if not folder.is_dir():
                key = 'images' if folder == samples.image_dir else 'masks'
                raise InputError(f'folder {folder} ({key}) does not exist; {self.spec.hint}')
            _check_present(folder, suffixes, ids)
        return samples

    def _samples(self, split, novel_as_background=True):
        images, masks = (Path(self.data_dir) / folder for folder in self.spec.folders(split))
        table = self.spec.label_table(self.fold, self.novel_ids, novel_as_background)
        if split == 'val' and self.spec.background is None:
            table[table == 0] = IGNORE_INDEX  # no prediction has label 0
        return Samples(images, masks, table, self.spec.class_colors)


def _check_present(folder, suffixes, ids):
    """InputError where a folder lacks the file of an id; says what is there instead."""
    missing = [image_id for image_id in ids if not find_file(folder, image_id, suffixes)]
    if not missing:
        return
    expected = ', '.join(suffixes)
    if others := other_suffixes(folder / f'{missing[0]}{suffixes[0]}'):
        raise InputError(
            f'{folder} holds {some(others)}; expected {missing[0]} with the suffix {expected}: convert the files, or '
            'rename them if they are such files'
        )
    hint = 'Check --data-dir and the lists.'
    first_column = re.split(r'[\s,;]|__', missing[0])[0]
    if there := find_file(folder, first_column, suffixes):
        hint = f'There is {there.name}: a line of a list is one id, without further columns.'
    elif printable(missing[0]) != missing[0]:
        hint = 'Is the list in another encoding than UTF-8? iconv -f ISO-8859-1 -t UTF-8 LIST converts it.'
    raise InputError(
        f'{len(missing)} of {len(ids)} listed images are missing in {folder}: {some(missing)}; expected files with '
        f'the suffix {expected}. {hint}'
    )
