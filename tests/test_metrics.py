"""Confusion matrix and means against brute force."""

import json

import numpy as np
import pytest
import torch

from engine.metrics import SUMMARY, confusion_matrix, iou_per_class, summarize
from report.tables import summary_table


def test_confusion_matrix_agrees_with_counting_pixel_by_pixel():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 6, (2, 31, 17))
    truth[rng.random(truth.shape) < 0.2] = 255
    expected = np.zeros((6, 6), np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t != 255:
            expected[t, p] += 1
    ours = confusion_matrix(torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(prediction), 6)
    assert ours.dtype == torch.int64
    assert np.array_equal(ours, expected)
    for k in range(6):
        union = ((truth == k) | (prediction == k)) & (truth != 255)
        inside = (truth == k) & (prediction == k)
        assert iou_per_class(expected)[k] == pytest.approx(100 * inside.sum() / union.sum())


def test_each_mean_is_over_its_own_classes():
    # background, 2 base, 2 novel; every class is half right: 10 hits, 10 pixels taken for background
    confusion = np.diag([30, 10, 20, 5, 0])
    confusion[1, 0], confusion[4, 0] = 10, 20
    iou = [30 / 60, 10 / 20, 20 / 20, 5 / 5, 0 / 20]
    means = summarize(confusion, num_base=2)
    assert means['base'] == pytest.approx(100 * np.mean(iou[:3]))
    assert means['base_without_background'] == pytest.approx(100 * np.mean(iou[1:3]))
    assert means['novel'] == pytest.approx(100 * np.mean(iou[3:]))
    assert means['total'] == pytest.approx(100 * np.mean(iou))
    assert means['harmonic'] == pytest.approx(2 * means['base'] * means['novel'] / (means['base'] + means['novel']))
    assert means['mean'] == pytest.approx((means['base_without_background'] + means['novel']) / 2)
    assert means.keys() == SUMMARY.keys()


def test_classes_that_never_occur_are_left_out():
    confusion = np.zeros((5, 5), np.int64)
    confusion[0, 0], confusion[1, 1], confusion[3, 0] = 8, 8, 8  # classes 2 and 4 never occur
    means = summarize(confusion, num_base=2)
    assert means['base'] == pytest.approx(100 * (0.5 + 1) / 2)
    assert means['novel'] == 0
    assert means['harmonic'] == 0
    assert means['total'] == pytest.approx(100 * 1.5 / 3)


def test_without_novel_classes_the_novel_mean_is_undefined_and_shown_as_such():
    means = summarize(np.diag([5, 5, 5]), num_base=2)
    assert means['base'] == 100 and np.isnan(means['novel']) and np.isnan(means['harmonic'])
    assert summary_table({'run': means}).splitlines()[2].split('|')[4].strip() == '-'
    json.dumps(means)  # plain floats
