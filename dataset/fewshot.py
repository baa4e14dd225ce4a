"""Stage 2's data: which support images and base images there are, and the pairs that training draws from them."""

import random

import numpy as np
from torch.utils.data import Dataset

from core.errors import InputError


def draw_support(class_lists, shot, seed):
    """Draw support images so that published seeds give the published draws.

    Args:
        class_lists (dict): novel class id -> ids of the images that can support it, ascending class id.
        shot (int): K.
        seed (int): of Python's generator.

    Returns:
        list of str: K ids per class, in the order of `class_lists`. An image supports one class only; a class with
        fewer than K images gives all of them, then random repeats.

    Raises:
        InputError: no image, or fewer than K that no other class has taken.
    """
    rng = random.Random(seed)
    taken, support = set(), []
    for class_id, ids in class_lists.items():
        if not ids:
            raise InputError(f'novel class {class_id} has no image that shows enough of it; it cannot be taught')
        if len(ids) < shot:
            drawn = ids + [ids[rng.randint(1, len(ids)) - 1] for _ in range(shot - len(ids))]
        else:
            drawn = _draw_unused(class_id, ids, shot, taken, rng)
        taken.update(drawn)
        support += drawn
    return support


def _draw_unused(class_id, ids, shot, taken, rng):
    unused = set(ids) - taken
    if len(unused) < shot:
        raise InputError(
            f'novel class {class_id}: {shot} support images asked for, {len(unused)} of its {len(ids)} images are not '
            'support of another class already. Use fewer shots, another seed or more training images.'
        )
    drawn = []
    while len(drawn) < shot:
        image_id = ids[rng.randint(1, len(ids)) - 1]
        if image_id in unused:
            unused.remove(image_id)
            drawn.append(image_id)
    return drawn


def draw_base(class_lists, shot, support, seed, epoch):
    """Draw the base images of an epoch.

    Args:
        class_lists (dict): base class id -> ids of images that show enough of it.
        shot (int): images per base class.
        support (collection of str): ids that must not be drawn.
        seed, epoch (int): the draw is a function of these.

    Returns:
        list of str: shot * Kb ids without repetition, shuffled.

    Raises:
        InputError: a class has fewer than `shot` images left.
    """
    rng = np.random.default_rng((seed, epoch))
    free = {c: [i for i in ids if i not in support] for c, ids in class_lists.items()}
    for _ in range(100):  # classes share images, so a draw may run dry where another does not
        drawn, short = _try_draw_base(free, shot, rng)
        if short is None:
            rng.shuffle(drawn)
            return drawn
    raise InputError(
        f'base class {short}: {shot} base images an epoch asked for; it has {len(class_lists[short])}, of which '
        f'{len(free[short])} are no support images, and other classes need some of these. '
        'Use fewer shots or more training images.'
    )


def _try_draw_base(free, shot, rng):
    """One draw from `free` (class id -> ids): the ids, and the class that ran dry (None where none did)."""
    drawn = {}
    # The rarest class chooses first: a shared image must not be spent on a class that has many others.
    for class_id in sorted(free, key=lambda c: len(free[c])):
        ids = [image_id for image_id in free[class_id] if image_id not in drawn]
        if len(ids) < shot:
            return [], class_id
        drawn |= dict.fromkeys(rng.choice(ids, shot, replace=False).tolist())
    return list(drawn), None


class FewShotDataset(Dataset):
    """Pairs of a support view and a base view; an epoch passes once over shot * Kb base images.

    Like the training views themselves, everything drawn is a function of (seed, epoch, index).

    Args:
        support (SegmentationDataset): training views of the support images, all annotations kept.
        base (SegmentationDataset): training views of `base_ids`, novel pixels relabelled background.
        class_lists (dict): base class id -> candidate ids, as in `draw_base`.
        shot (int): base images per base class and epoch.
        seed (int): of every draw.
        redraw_every (int): epochs between draws of new base images; 0 keeps the first draw.
    """

    def __init__(self, support, base, class_lists, shot, seed, redraw_every=0):
        self.support, self.base = support, base
        self.class_lists, self.shot, self.seed, self.redraw_every = class_lists, shot, seed, redraw_every
        self.position = {image_id: i for i, image_id in enumerate(base.image_ids)}
        self._drawn = None, None
        self.base_images(epoch=0)  # a shortage is an error before training starts

    def __len__(self):
        return self.shot * len(self.class_lists)

    def base_images(self, epoch):
        """Ids of the base images of an epoch."""
        draw = epoch // self.redraw_every if self.redraw_every else 0
        if self._drawn[0] != draw:
            self._drawn = draw, draw_base(self.class_lists, self.shot, self.support.image_ids, self.seed, draw)
        return self._drawn[1]

    def __getitem__(self, key):
        """The pair (epoch, index): {'support': view, 'base': view}."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        support = self.support.view(int(rng.integers(len(self.support))), rng)
        base = self.base.view(self.position[self.base_images(epoch)[index]], rng)
        return {'support': support, 'base': base}
