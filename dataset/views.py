"""Views that are drawn once, so that their features can be kept, and the pairs that training draws from them."""

from collections.abc import Collection, Sequence

import numpy as np
from torch.utils.data import Dataset

from core.errors import InputError
from dataset.segmentation import SegmentationDataset

POOL_SEED = 0  # of the base views, which all runs on a base network share


class DrawnViews(Dataset):
    """A fixed list of training views, read as evaluation items.

    Args:
        dataset: gives training views.
        positions: for each view, the position of its image in the data set.
        seed: of the random choices; a view depends on it and on its place in the list.
    """

    def __init__(self, dataset: SegmentationDataset, positions: Sequence[int], seed: int):
        self.dataset, self.positions, self.seed = dataset, list(positions), seed

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, row: int) -> dict:
        """A view as `SegmentationDataset.view` gives it, with the 'index' and 'canvas' of evaluation items."""
        rng = np.random.default_rng((self.seed, row, 0, 1))  # unlike any (seed, epoch, index)
        view = self.dataset.view(self.positions[row], rng)
        return view | {'index': row, 'canvas': tuple(view['mask'].shape)}

    def fingerprint(self) -> dict:
        """As `SegmentationDataset.fingerprint`."""
        return {'images': self.dataset.fingerprint(self.positions), 'positions': self.positions, 'seed': self.seed}


def support_views(support: SegmentationDataset, count: int, seed: int) -> DrawnViews:
    """`count` views of each support image."""
    return DrawnViews(support, [position for position in range(len(support)) for _ in range(count)], seed)


def base_views(base: SegmentationDataset, class_lists: dict[int, list[str]], count: int) -> DrawnViews:
    """The pool of base views: `count` of each base class, in the order of the classes.

    Every image of a class is drawn before one is drawn again. The pool does not depend on support images, so that all
    draws of them share it.

    Args:
        base: all candidate base images; novel pixels are background.
        class_lists: base class id -> ids of the images that show enough of the class.
        count: views per class.
    """
    position = {image_id: i for i, image_id in enumerate(base.image_ids)}
    drawn = []
    for class_id, ids in class_lists.items():
        if not ids:
            raise InputError(
                f'base class {class_id} has no image that shows enough of it to be drawn: add images, or lower the '
                "data set's min_pixels"
            )
        rng = np.random.default_rng((POOL_SEED, class_id))
        rounds = [rng.permutation(len(ids)) for _ in range(-(-count // len(ids)))]
        drawn += [position[ids[i]] for i in np.concatenate(rounds)[:count]]
    return DrawnViews(base, drawn, POOL_SEED)


class KeptPairs(Dataset):
    """Pairs of a kept support view and a kept base view. An epoch is one pass over shot * Kb base views.

    As in `FewShotDataset`, all random choices depend on (seed, epoch, index) only, base views are drawn anew in each
    epoch, and views of support images are not among them.

    Args:
        support, base: rows of kept views, each {'row', 'mask', 'id', 'skipped'}; `rows` has the 'id' of all, but for
            images that were skipped.
        num_base, per_class: Kb base classes with so many base views each, in their order.
        support_ids: ids of the support images.
        shot: base views per base class and epoch.
        seed: seed of all random choices.

    Raises:
        InputError: all views of a base class show support images or were skipped.
    """

    def __init__(
        self, support, base, *, num_base: int, per_class: int, support_ids: Collection[str], shot: int, seed: int
    ):
        self.support, self.base, self.shot, self.seed = support, base, shot, seed
        self.support_rows = sorted(support.rows)
        shown = set(support_ids)
        usable = {row for row, known in base.rows.items() if known['id'] not in shown}
        self.free = [
            [row for row in range(i * per_class, (i + 1) * per_class) if row in usable] for i in range(num_base)
        ]
        if not all(self.free):
            raise InputError(
                f'all {per_class} kept views of base class number {1 + [bool(f) for f in self.free].index(False)} show '
                'support images or were skipped; raise --base-views'
            )
        self._drawn = None, None

    def __len__(self) -> int:
        return self.shot * len(self.free)

    def base_rows(self, epoch: int) -> list[int]:
        """The base views of an epoch: `shot` of each class, shuffled; repeated only where a class has fewer."""
        if self._drawn[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            drawn = np.concatenate([rng.choice(rows, self.shot, replace=len(rows) < self.shot) for rows in self.free])
            self._drawn = epoch, rng.permutation(drawn).tolist()
        return self._drawn[1]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, dict]:
        """The pair for (epoch, index): {'support': row, 'base': row}."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        support = self.support_rows[int(rng.integers(len(self.support_rows)))]
        return {'support': self.support[support], 'base': self.base[self.base_rows(epoch)[index]]}
