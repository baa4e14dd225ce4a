"""Draws of support and base images."""

import pytest

from core.errors import InputError
from dataset.fewshot import draw_base, draw_nested_support, draw_support


def test_few_shot_draw_is_the_published_one():
    """By hand: random.seed(123) makes randint(1, 10) give 1, 5, 2, 7, 5, 2, 1, 7, 9, 9, 6, 6, ..."""
    a = [f'a{i}' for i in range(1, 11)]
    b = [f'b{i}' for i in range(1, 11)]
    assert draw_support({1: a, 2: b}, shot=3, seed=123) == ['a1', 'a5', 'a2', 'b7', 'b5', 'b2']
    # classes that share their images: the second class skips what the first one has taken
    assert draw_support({1: a, 2: a}, shot=3, seed=123) == ['a1', 'a5', 'a2', 'a7', 'a9', 'a6']


def test_a_class_with_fewer_images_gives_all_then_repeats():
    support = draw_support({4: ['x', 'y'], 9: list('abcdefghij')}, shot=5, seed=123)
    # randint(1, 2) three times with seed 123 gives 1, 2, 1
    assert support[:5] == ['x', 'y', 'x', 'y', 'x']
    assert len(set(support[5:])) == 5


def test_a_draw_without_enough_images_is_an_error():
    with pytest.raises(InputError, match='class 2: 2 support images asked for, but only 1 of its 3 images'):
        draw_support({1: ['a', 'b'], 2: ['a', 'b', 'c']}, shot=2, seed=0)
    with pytest.raises(InputError, match='class 1 has no image'):
        draw_support({1: []}, shot=1, seed=0)


def test_nested_draws_of_fewer_shots_are_part_of_those_of_more():
    lists = {1: list('abcdefgh'), 2: list('efghijklm'), 3: list('xy')}
    for seed in range(20):
        draws = {shot: draw_nested_support(lists, shot, seed) for shot in (1, 3, 4)}
        for shot, drawn in draws.items():
            by_class = [drawn[i * shot : (i + 1) * shot] for i in range(3)]
            assert all(set(ids) <= set(lists[c]) for c, ids in zip(lists, by_class, strict=True))
            assert len({*by_class[0], *by_class[1]}) == 2 * shot  # no image supports two classes, and none twice
            assert set(by_class[2]) == {'x', 'y'} or shot == 1  # a class with fewer images gives all, then repeats
            assert [ids[0] for ids in by_class] == draws[1]
        assert [draws[4][4 * i : 4 * i + 3] for i in range(3)] == [draws[3][3 * i : 3 * i + 3] for i in range(3)]
    assert len({tuple(draw_nested_support(lists, 3, seed)) for seed in range(20)}) > 15
    with pytest.raises(InputError, match='class 2: 2 support images asked for, but only 1 of its 2'):
        draw_nested_support({1: ['a'], 2: ['a', 'b']}, 2, 0)
    with pytest.raises(InputError, match='class 1 has no image'):
        draw_nested_support({1: []}, 1, 0)


def test_base_draw_has_every_class_no_repeats_and_no_support():
    lists = {1: list('abcd'), 2: list('cdefgh'), 3: list('ghij')}
    for seed in range(30):
        drawn = draw_base(lists, 2, {'a', 'j'}, seed, epoch=0)
        assert len(drawn) == len(set(drawn)) == 6
        assert not {'a', 'j'} & set(drawn)
        assert all(len(set(drawn) & set(ids)) >= 2 for ids in lists.values())
        assert drawn == draw_base(lists, 2, {'a', 'j'}, seed, epoch=0)
    assert len({tuple(draw_base(lists, 2, (), 0, epoch)) for epoch in range(10)}) > 5
    with pytest.raises(InputError, match='base class 1: an epoch of stage 2 needs 5 of its images; it has 4'):
        draw_base(lists, 5, (), 0, 0)


def test_base_draw_succeeds_with_shared_images():
    """Class 1 needs two of a, b, c and class 2 two of b, c, d: a first draw of b and c must not be final."""
    lists = {1: list('abc'), 2: list('bcd'), 3: list('ef')}
    for epoch in range(200):
        drawn = draw_base(lists, 2, (), 0, epoch)
        assert len(set(drawn)) == 6
