"""Rows of the dataset table: folds, refusals and label tables."""

import numpy as np
import pytest

from dataset import DATASETS, DatasetSpec
from dataset.classes import SHAPES
from dataset.labels import INVALID, label_table


def test_folds_of_pascal_5i_and_coco_20i():
    voc, coco = DATASETS['voc'], DATASETS['coco']
    assert [voc.novel_ids(f) for f in range(4)] == [
        (1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (11, 12, 13, 14, 15), (16, 17, 18, 19, 20)
    ]  # fmt: skip
    assert coco.novel_ids(1) == (2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74, 78)
    assert len(coco.class_names) == 80 and coco.class_names[0] == 'person' and coco.class_names[79] == 'toothbrush'
    for spec in DATASETS.values():
        for fold in range(4):
            assert sorted(spec.base_ids(fold) + spec.novel_ids(fold)) == list(range(1, spec.num_classes + 1))
        assert spec.novel_ids(-1) == () and len(spec.base_ids(-1)) == spec.num_classes
        with pytest.raises(ValueError, match=r'folds 0\.\.3'):
            spec.novel_ids(4)
    assert len(set(SHAPES)) == 20


@pytest.mark.parametrize(('change', 'words'), (
    ({'folds': (4, 5)}, r'fold 0 is 4; expected a tuple'),
    ({'folds': ((2, 6),)}, r'1\.\.5'),
    ({'folds': ((0, 1),)}, r'1\.\.5'),
    ({'folds': ((3, 2),)}, 'ascending'),
    ({'folds': ((2, 2),)}, 'ascending'),
    ({'folds': ((1, 2, 3, 4, 5),)}, 'leaves at least one base class'),
    ({'folds': ((),)}, 'expected a tuple of ascending'),
    ({'folds': ()}, 'folds is \\(\\); expected'),
    ({'folds': 3}, 'folds is 3; expected'),
    ({'palette': 'grey'}, 'one of voc, spread'),
    ({'scale_range': (2, 1)}, 'LO <= HI'),
    ({'scale_range': 0.3}, 'LO <= HI'),
    ({'class_names': ('background', 'a', 'b', 'c', 'd')}, 'always class 0'),
    ({'class_names': 'crack'}, 'tuple of 1 to 253 names'),
    ({'class_names': ()}, 'tuple of 1 to 253 names'),
    ({'class_names': ('a', 'b', 'a', 'c', 'd')}, 'has a more than once'),
))  # fmt: skip
def test_invalid_dataset_rows_are_refused(change, words):
    row = {'name': 'street', 'class_names': tuple('abcde'), 'folds': ((4, 5),), 'train_list': 'train.txt'}
    assert DatasetSpec(**row).base_ids(0) == (1, 2, 3)
    with pytest.raises(ValueError, match=f'street: .*{words}'):
        DatasetSpec(**(row | change))


def test_label_table_of_both_stages():
    base, novel = (2, 4), (1, 5)
    mask = np.array([0, 1, 2, 4, 5, 255, 3], np.uint8)
    assert label_table(base, novel, True)[mask].tolist() == [0, 0, 1, 2, 0, 255, INVALID]
    assert label_table(base, novel, False)[mask].tolist() == [0, 3, 1, 2, 4, 255, INVALID]
