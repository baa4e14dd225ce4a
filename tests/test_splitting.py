"""The choice of evaluation images."""

import itertools

import numpy as np

from dataset.annotations.splitting import choose_evaluation, on_one_side


def test_every_class_that_can_be_is_on_both_sides():
    rng = np.random.default_rng(0)
    for seed in range(60):
        shows = rng.random((rng.integers(2, 9), rng.integers(1, 6))) < rng.uniform(0.2, 0.8)
        chosen, several = choose_evaluation(shows, 0.2, seed), shows[:, shows.sum(axis=0) >= 2]
        assert np.array_equal(chosen, choose_evaluation(shows, 0.2, seed))
        fewest = min(
            on_one_side(np.array(sides), several).sum() for sides in itertools.product((False, True), repeat=len(shows))
        )
        assert on_one_side(chosen, several).sum() == fewest
    shows = rng.random((500, 10)) < rng.uniform(0.02, 0.3, 10)
    chosen = choose_evaluation(shows, 0.2, 1)
    assert 0.17 < chosen.mean() < 0.25 and (abs(shows[chosen].sum(0) / shows.sum(0) - 0.2) < 0.15).all()
    assert not choose_evaluation(shows, 0, 1).any() and (chosen != choose_evaluation(shows, 0.2, 2)).any()
