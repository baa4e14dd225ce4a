"""Divide images into training and evaluation images so that both show every class."""

import numpy as np

MOVES = 5_000  # of images, while some class is on one side only
CANDIDATES = 50  # images of which the best is moved


def choose_evaluation(shows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose evaluation images at random.

    Classes take turns, the rarest first: each gets its share of evaluation images. Then images change sides until
    every class of two or more images is on both. This need not be possible: with the images {a, b}, {b, c} and {a, c},
    one class is on one side only.

    Args:
        shows: bool [N, C], which classes an image shows.
        fraction: of evaluation images, 0..1; 0 chooses none.
        seed: the same seed gives the same images.

    Returns:
        bool [N], True for evaluation images.
    """
    rng = np.random.default_rng(seed)
    chosen, decided = np.zeros(len(shows), bool), np.zeros(len(shows), bool)
    if fraction == 0:
        return chosen
    counts = shows.sum(axis=0)
    everything = np.ones((len(shows), 1), bool)  # as a last class, for images without any
    for of_class in (*shows.T[np.argsort(counts, kind='stable')], everything[:, 0]):
        count = int(of_class.sum())
        wanted = min(max(round(fraction * count), 1), count - 1) - int((chosen & of_class).sum())
        free = rng.permutation(np.flatnonzero(of_class & ~decided))
        chosen[free[: max(wanted, 0)]] = True
        decided |= of_class
    return _repaired(chosen, shows[:, counts >= 2], rng)


def on_one_side(chosen: np.ndarray, shows: np.ndarray) -> np.ndarray:
    """Which classes only training images or only evaluation images show, bool [C]."""
    return ~(shows[chosen].any(axis=0) & shows[~chosen].any(axis=0))


def _repaired(chosen, shows, rng):
    """The choice after moves that bring every class to both sides, or the best one found."""
    chosen, total = chosen.copy(), shows.sum(axis=0)
    counts = shows[chosen].sum(axis=0)  # of evaluation images
    best, best_missing = chosen.copy(), len(total) + 1
    for _ in range(MOVES):
        missing = np.flatnonzero((counts == 0) | (counts == total))
        if len(missing) < best_missing:
            best, best_missing = chosen.copy(), len(missing)
        if not len(missing):
            break
        images = rng.permutation(np.flatnonzero(shows[:, rng.choice(missing)]))[:CANDIDATES]
        moved = counts + np.where(chosen[images, None], -1, 1) * shows[images]
        remaining = ((moved == 0) | (moved == total)).sum(axis=1)
        move = 0 if rng.random() < 0.1 else int(remaining.argmin())  # at times at random, to leave dead ends
        chosen[images[move]] ^= True
        counts = moved[move]
    return best
