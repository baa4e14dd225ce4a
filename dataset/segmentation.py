"""Images with labels, for training and evaluation."""

import copy
import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from torch.utils.data import Dataset

from core.errors import InputError
from dataset import transforms
from dataset.images import Photographs, Samples


class SegmentationDataset(Dataset):
    """Images with labels: training views if `augmentation` is given, evaluation items if `fit_size` is given.

    A training view is asked for as (epoch, index). Its random choices depend on (seed, epoch, index) only, and so
    neither on the number of workers nor on the epoch at which training starts.

    Args:
        image_ids: ids in list order.
        samples: reads images and masks.
        augmentation: applied to training views.
        seed: seed of the random choices.
        fit_size: evaluation images are resized to fit (H, W) and padded.
        resize_mask: evaluation masks are resized like their images, but not padded; otherwise they keep their size.
        skip_bad: an image that cannot be read is not an error. A training view shows the next readable image of the
            list instead, and an evaluation item is empty; its 'skipped' says why.

    Raises:
        ValueError: both or neither of `augmentation` and `fit_size` are given.
    """

    def __init__(
        self,
        image_ids: Sequence[str],
        samples: Samples | Photographs,
        augmentation: transforms.Augmentation | None = None,
        seed: int = 0,
        fit_size: tuple[int, int] | None = None,
        resize_mask: bool = False,
        skip_bad: bool = False,
    ):
        if (augmentation is None) == (fit_size is None):
            raise ValueError('exactly one of augmentation and fit_size must be given')
        self.image_ids = list(image_ids)
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed
        self.fit_size = fit_size
        self.resize_mask = resize_mask
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        """A training view for (epoch, index), an evaluation item for index.

        Returns:
            'image' float32 [3, H, W]; 'mask' uint8 [H, W], labels; 'id'; 'skipped', why an image was skipped, or ''.
            Evaluation items also have 'index', and 'canvas', (H, W): logits upsampled to this size match the mask in
            their top left corner. An evaluation item that is skipped has 'skipped' only.
        """
        if self.augmentation is None:
            return self._evaluation_item(key)
        epoch, index = key
        return self.view(index, np.random.default_rng((self.seed, epoch, index)))

    def fingerprint(self, positions: Collection[int] | None = None) -> dict:
        """What items depend on, in types that JSON can hold: equal fingerprints mean equal items.

        Args:
            positions: of the items; all by default.
        """
        chosen = range(len(self)) if positions is None else sorted(set(positions))
        ids = [self.image_ids[position] for position in chosen]
        sizes = {'fit': self.fit_size, 'resize_mask': self.resize_mask, 'skip_bad': self.skip_bad}
        if self.augmentation:
            sizes |= dataclasses.asdict(self.augmentation)
        return {'ids': ids, 'files': self.samples.stamps(ids), 'labels': self.samples.table.tolist()} | sizes

    def view(self, index: int, rng: np.random.Generator) -> dict:
        """A training view of one image; `rng` makes all random choices."""
        first = index
        skipped = ''
        while True:
            image_id = self.image_ids[index]
            try:
                image, mask = self.augmentation(*self.samples.read(image_id), rng)
            except InputError as error:
                index = (index + 1) % len(self)
                if not self.skip_bad or index == first:
                    raise
                skipped = skipped or str(error)
            else:
                return {'image': image, 'mask': mask, 'id': image_id, 'skipped': skipped}

    def chosen(self, image_ids: Collection[str]) -> 'SegmentationDataset':
        """The same data set with these of its images only, in their order here."""
        fewer = copy.copy(self)
        fewer.image_ids = [image_id for image_id in self.image_ids if image_id in image_ids]
        return fewer

    def original(self, index: int) -> dict:
        """An evaluation item as it is stored: 'image' RGB uint8 [H, W, 3] and 'mask', labels uint8 [H, W].

        Returns:
            Also 'id', 'index', and 'skipped', why it cannot be read, or ''; such an item has nothing else.
        """
        image_id = self.image_ids[index]
        try:
            image, labels = self.samples.read(image_id)
        except InputError as error:
            if not self.skip_bad:
                raise InputError(f'{error} Use --skip-bad-images to leave it out.') from error
            return {'skipped': str(error)}
        return {'id': image_id, 'index': index, 'skipped': '', 'image': image, 'mask': labels}

    def _evaluation_item(self, index):
        item = self.original(index)
        if item['skipped']:
            return item
        labels = item['mask']
        fitted, mask = transforms.resize_to_fit(item['image'], labels, self.fit_size)
        image, _ = transforms.to_tensors(fitted, mask, self.fit_size)
        if self.resize_mask:
            return item | {'image': image, 'mask': mask, 'canvas': self.fit_size}
        return item | {'image': image, 'canvas': transforms.canvas_of(labels.shape, self.fit_size)}
