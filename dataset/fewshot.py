"""Data of stage 2: how support images and base images are drawn, and the pairs of them that training uses."""

import random
from collections.abc import Collection

import numpy as np
from torch.utils.data import Dataset

from core.errors import InputError
from dataset.segmentation import SegmentationDataset


def draw_support(class_lists: dict[int | str, list[str]], shot: int, seed: int) -> list[str]:
    """Draw support images. A seed of the published code gives the images that the published code draws.

    Args:
        class_lists: novel class, by id or name -> ids of the images that can support the class; ascending class ids.
        shot: K, support images per class.
        seed: seed of Python's random generator.

    Returns:
        K image ids per class, in the order of `class_lists`. A class with fewer than K images gives all of them, then
        random repeats, as published; no other image supports two classes.

    Raises:
        InputError: a class has no image, or fewer than K that do not support another class.
    """
    rng = random.Random(seed)
    taken, support = set(), []
    for class_id, ids in class_lists.items():
        if not ids:
            raise _no_image(class_id)
        if len(ids) < shot:
            drawn = ids + [ids[rng.randint(1, len(ids)) - 1] for _ in range(shot - len(ids))]
        else:
            drawn = _draw_unused(class_id, ids, shot, taken, rng)
        taken.update(drawn)
        support += drawn
    return support


def support_shortage(class_lists: dict[int | str, list[str]], shot: int, tries: int = 10) -> str:
    """Why no support images can be drawn with any of the first seeds; '' where they can."""
    for seed in range(tries):
        try:
            draw_support(class_lists, shot, seed)
        except InputError as error:
            reason = str(error)
        else:
            return ''
    return reason


def draw_nested_support(class_lists: dict[int, list[str]], shot: int, seed: int) -> list[str]:
    """Draw support images so that those of a smaller `shot` are the first ones of each class.

    Classes take turns, one image each, until all have K. The draws are not those of the published code.

    Args, returns and errors: as `draw_support`.
    """
    orders = {c: random.Random(f'{seed} {c}').sample(ids, len(ids)) for c, ids in class_lists.items()}
    support, taken = {c: [] for c in class_lists}, set()
    for turn in range(shot):
        for class_id, order in orders.items():
            if not order:
                raise _no_image(class_id)
            image_id = next((image_id for image_id in order if image_id not in taken), None)
            if image_id is None and set(order) - set(support[class_id]):
                raise _too_few(class_id, shot, turn, len(order))
            support[class_id].append(image_id or order[turn % len(order)])
            taken.add(image_id)
    return [image_id for ids in support.values() for image_id in ids]


def _no_image(class_id):
    return InputError(f'novel class {class_id} has no image that shows enough of it, so it cannot be learned')


def _too_few(class_id, shot, free, images):
    return InputError(
        f'novel class {class_id}: {shot} support images asked for, but only {free} of its {images} images do not '
        'support another class. Use fewer shots, another seed, a lower min_pixels or more training images.'
    )


def _draw_unused(class_id, ids, shot, taken, rng):
    unused = set(ids) - taken
    if len(unused) < shot:
        raise _too_few(class_id, shot, len(unused), len(ids))
    drawn = []
    while len(drawn) < shot:
        image_id = ids[rng.randint(1, len(ids)) - 1]
        if image_id in unused:
            unused.remove(image_id)
            drawn.append(image_id)
    return drawn


def draw_base(
    class_lists: dict[int | str, list[str]],
    shot: int,
    support: Collection[str],
    seed: int,
    epoch: int,
    repeats: bool = False,
) -> list[str]:
    """Draw the base images of an epoch.

    Args:
        class_lists: base class, by id or name -> ids of the images that show enough of the class.
        shot: images per base class.
        support: ids of the support images, which are not drawn.
        seed, epoch: determine the draw.
        repeats: a class with fewer images gives them several times; otherwise it is an error.

    Returns:
        shot * Kb image ids, shuffled; none twice unless `repeats`.

    Raises:
        InputError: the lists do not hold `shot` different images per class, or not even one.
    """
    rng = np.random.default_rng((seed, epoch))
    support = set(support)
    free = {c: [i for i in ids if i not in support] for c, ids in class_lists.items()}
    for _ in range(100):  # classes share images, so one draw can fail although another succeeds
        drawn, short = _try_draw_base(free, shot, rng, repeats)
        if short is None:
            rng.shuffle(drawn)
            return drawn
    raise InputError(
        f'base class {short}: an epoch of stage 2 needs {shot} of its images; it has {len(class_lists[short])}, '
        f'{len(free[short])} beside support images, of which other classes need some. '
        'Use fewer shots, a lower min_pixels, more training images, --repeat-base-images, or kept views (--views).'
    )


def base_shortage(
    class_lists: dict[int | str, list[str]], shot: int, support: Collection[str] = (), seed: int = 0
) -> str:
    """Why stage 2 cannot draw base images beside these support images, as it does at its start; '' where it can."""
    try:
        draw_base(class_lists, shot, support, seed, epoch=0)
    except InputError as error:
        return str(error)
    return ''


def _try_draw_base(free, shot, rng, repeats):
    """Draw once from `free` (class id -> image ids): the ids, and the class that has too few left, or None."""
    drawn, seen = [], set()
    # The rarest class comes first, because a class with many images does not need those that it shares.
    for class_id in sorted(free, key=lambda c: len(free[c])):
        ids = [image_id for image_id in free[class_id] if image_id not in seen]
        rounds = []  # of all images of a class that has too few
        if repeats and len(ids) < shot and free[class_id]:
            ids = ids or free[class_id]
            rounds = ids * (shot // len(ids))
        if len(ids) < shot - len(rounds):
            return [], class_id
        chosen = rounds + rng.choice(ids, shot - len(rounds), replace=False).tolist()
        drawn += chosen
        seen.update(chosen)
    return drawn, None


class FewShotDataset(Dataset):
    """Pairs of a support view and a base view. An epoch is one pass over shot * Kb base images.

    As with single training views, all random choices depend on (seed, epoch, index) only.

    Args:
        support: training views of the support images, which keep all their annotations.
        base: training views of all candidate base images; novel pixels are relabelled background.
        class_lists: base class id -> candidate image ids, as in `draw_base`.
        shot: base images per base class and epoch.
        seed: seed of all random choices.
        redraw_every: number of epochs after which new base images are drawn; 0 keeps the first draw.
        repeats: as in `draw_base`.
    """

    def __init__(
        self,
        support: SegmentationDataset,
        base: SegmentationDataset,
        class_lists: dict[int, list[str]],
        shot: int,
        seed: int,
        redraw_every: int = 0,
        repeats: bool = False,
    ):
        self.support, self.base, self.repeats = support, base, repeats
        self.class_lists, self.shot, self.seed, self.redraw_every = class_lists, shot, seed, redraw_every
        self.position = {image_id: i for i, image_id in enumerate(base.image_ids)}
        self._drawn = None, None

    def __len__(self) -> int:
        return self.shot * len(self.class_lists)

    @property
    def short_classes(self) -> list[int]:
        """Base class ids that have fewer than `shot` images beside the support images."""
        support = set(self.support.image_ids)
        return [c for c, ids in self.class_lists.items() if len(set(ids) - support) < self.shot]

    def base_images(self, epoch: int) -> list[str]:
        """Ids of the base images of an epoch. Raises InputError where there are too few."""
        draw = epoch // self.redraw_every if self.redraw_every else 0
        if self._drawn[0] != draw:
            support = self.support.image_ids
            self._drawn = draw, draw_base(self.class_lists, self.shot, support, self.seed, draw, self.repeats)
        return self._drawn[1]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, dict]:
        """The pair for (epoch, index): {'support': view, 'base': view}, views as in `SegmentationDataset`."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        support = self.support.view(int(rng.integers(len(self.support))), rng)
        base = self.base.view(self.position[self.base_images(epoch)[index]], rng)
        return {'support': support, 'base': base}
