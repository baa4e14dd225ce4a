"""The one dataset that stage 1, validation and test use: images with labels."""

import numpy as np
from torch.utils.data import Dataset

from core.errors import InputError
from dataset import transforms


class SegmentationDataset(Dataset):
    """Images with labels.

    Args:
        image_ids (sequence of str): in list order.
        samples (Samples or Photographs): how to read one.
        augmentation (Augmentation, optional): training views. A training item is asked for as (epoch, index), and
            everything random about it is a function of (seed, epoch, index): neither the number of workers nor the
            epoch that training starts from changes what is drawn.
        seed (int): of the random choices.
        fit_size ((int, int), optional): evaluation: image resized to fit (H, W) and padded.
        resize_mask (bool): evaluation: mask resized alike (not padded) rather than left at its original size.
        skip_bad (bool): an image that cannot be read is no error: a training view shows the next readable image of the
            list instead, an evaluation item is empty. 'skipped' then says why.
    """

    def __init__(self, image_ids, samples, augmentation=None, seed=0, fit_size=None, resize_mask=False, skip_bad=False):
        if (augmentation is None) == (fit_size is None):
            raise ValueError('exactly one of augmentation and fit_size must be given')
        self.image_ids = list(image_ids)
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed
        self.fit_size = fit_size
        self.resize_mask = resize_mask
        self.skip_bad = skip_bad

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        """A training view for (epoch, index), an evaluation item for index.

        Returns:
            dict: 'image' float32 [3, H, W]; 'mask' uint8 [H, W] of labels; 'id'; 'skipped', '' unless an image was; for
            evaluation also 'canvas', the (H, W) to which logits are upsampled so that their top left corner meets the
            mask.
        """
        if self.augmentation is None:
            return self._evaluation_item(key)
        epoch, index = key
        return self.view(index, np.random.default_rng((self.seed, epoch, index)))

    def view(self, index, rng):
        """A training view of one image; every random choice comes from the numpy Generator `rng`."""
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

    def _evaluation_item(self, index):
        image_id = self.image_ids[index]
        try:
            original, labels = self.samples.read(image_id)
        except InputError as error:
            if not self.skip_bad:
                raise InputError(f'{error} --skip-bad-images goes on without it.') from error
            return {'skipped': str(error)}
        fitted, mask = transforms.resize_to_fit(original, labels, self.fit_size)
        image, _ = transforms.to_tensors(fitted, mask, self.fit_size)
        if self.resize_mask:
            return {'image': image, 'mask': mask, 'canvas': self.fit_size, 'id': image_id, 'skipped': ''}
        factor = transforms.fit_factor(labels.shape, self.fit_size)
        canvas = tuple(round(side / factor) for side in self.fit_size)
        return {'image': image, 'mask': labels, 'canvas': canvas, 'id': image_id, 'skipped': ''}
