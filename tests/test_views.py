"""What training and evaluation see of an image, and the batches of an epoch."""

import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from core.errors import InputError
from dataset import DATASETS, Augmentation, FoldData
from dataset.fewshot import draw_support
from dataset.lists import read_ids, write_ids
from dataset.transforms import resize
from dataset.views import KeptPairs, base_views, support_views
from engine.loaders import TrainingBatches, evaluation_loader, training_loader

CPU = torch.device('cpu')


def test_resize_rounds_half_up():
    image, mask = np.zeros((281, 500, 3), np.uint8), np.zeros((281, 500), np.uint8)
    assert resize(image, mask, 473 / 500)[1].shape == (int(281 * 473 / 500 + 0.5), 473)
    assert resize(image, mask, 0.5)[1].shape == (141, 250)


def test_augmentation_keeps_image_and_mask_together():
    """The colour encodes the label, so image and mask must agree in every view."""
    mask = np.kron(np.random.default_rng(0).integers(0, 5, (4, 5)), np.ones((40, 40))).astype(np.uint8)
    image = np.repeat((mask * 50)[:, :, None], 3, axis=2)
    view = Augmentation((150, 190), (0.5, 1.5))
    sizes = set()
    for seed in range(20):
        pixels, labels = view(image, mask, np.random.default_rng(seed))
        assert pixels.shape == (3, 150, 190) and pixels.dtype == torch.float32
        assert labels.shape == (150, 190) and labels.dtype == torch.uint8
        inside = labels != 255
        assert (pixels[:, ~inside] == 0).all()
        red = ((pixels[0] * 0.229 + 0.485) * 255)[inside]
        # interpolation changes colours along edges only
        assert ((red - labels[inside] * 50.0).abs() < 2).float().mean() > 0.85
        sizes.add(inside.sum().item())
    assert len(sizes) > 5  # small factors pad, large ones fill


def test_normalisation_is_imagenets():
    view = Augmentation((8, 8), (1, 1))
    image = np.full((8, 8, 3), (255, 0, 128), np.uint8)
    pixels, _ = view(image, np.zeros((8, 8), np.uint8), np.random.default_rng(0))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert pixels[:, 3, 3].tolist() == pytest.approx(expected, abs=1e-5)


def fold_data(folder, fold=0, **settings):
    root = folder / 'list'
    data = FoldData(DATASETS['shapes'], folder, fold, root / 'trainaug.txt', root / 'val.txt', **settings)
    data.ensure_lists()
    return data


def epoch_of(dataset, epoch, workers):
    loader = training_loader(dataset, 4, 7, num_workers=workers, device=CPU)
    loader.batch_sampler.epoch = epoch
    return list(loader)


@pytest.mark.parametrize('stage', (1, 2))
def test_what_is_drawn_depends_on_seed_epoch_and_sample_only(shapes, stage):
    data = fold_data(shapes)
    write_ids(
        data.lists.support(1, 7),
        draw_support({c: read_ids(data.lists.novel_class(c)) for c in data.novel_ids}, 1, 7),
    )
    view = Augmentation((65, 65), (0.8, 1.2))

    def dataset():
        return data.base_training(view, 7) if stage == 1 else data.few_shot_training(view, 1, 7, redraw_every=1)

    reference = dataset()
    epochs = [epoch_of(reference, epoch, workers=0) for epoch in range(3)]
    again = epoch_of(dataset(), 2, workers=2)  # other workers, and epochs 0 and 1 never drawn
    flat = [torch.cat([_images(batch) for batch in epoch]) for epoch in (*epochs, again)]
    assert torch.equal(flat[2], flat[3])
    assert not torch.equal(flat[0], flat[1])


def _images(batch):
    return batch['image'] if 'image' in batch else torch.cat([batch['support']['image'], batch['base']['image']])


def test_stage_1_sees_base_labels_and_stage_2_support_sees_all(shapes):
    data = fold_data(shapes)
    view = Augmentation((129, 129), (1, 1))
    base = data.base_training(view, 0)
    seen = set(torch.cat([base[0, i]['mask'].unique() for i in range(len(base))]).tolist())
    assert seen == {*range(16), 255}
    pairs = data.few_shot_training(view, 1, 7)
    support = set(torch.cat([pairs[0, i]['support']['mask'].unique() for i in range(len(pairs))]).tolist())
    assert any(label > 15 for label in support - {255})
    assert max({int(pairs[0, i]['base']['mask'][pairs[0, i]['base']['mask'] != 255].max()) for i in range(15)}) <= 15


def test_a_limited_validation_is_the_same_choice_for_every_run(shapes):
    everything = fold_data(shapes).validation((65, 65), with_novel=True).image_ids
    few = fold_data(shapes).validation((65, 65), with_novel=True, limit=3).image_ids
    again = fold_data(shapes).validation((65, 65), with_novel=False, limit=3).image_ids
    assert len(few) == 3 and few == again == [image_id for image_id in everything if image_id in few]
    assert few != everything[:3]
    assert fold_data(shapes).validation((65, 65), with_novel=True, limit=99).image_ids == everything


def test_evaluation_items_fit_pad_and_know_their_canvas(shapes):
    data = fold_data(shapes)
    small = data.validation((65, 65), with_novel=True)
    full = data.validation((65, 65), with_novel=True, original_size=True)
    for item, original in zip(small, full, strict=True):
        height, width = original['mask'].shape
        longer = max(height, width)
        assert original['canvas'] == (longer, longer)
        assert item['image'].shape == (3, 65, 65) and item['canvas'] == (65, 65)
        fitted = int(height * 65 / longer + 0.5), int(width * 65 / longer + 0.5)
        expected = cv2.resize(original['mask'], fitted[::-1], interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(item['mask'], expected)
        assert (item['image'][:, fitted[0] :] == 0).all() and (item['image'][:, :, fitted[1] :] == 0).all()
    batch = next(iter(evaluation_loader(full, 8, num_workers=0, device=CPU)))
    assert len(set(batch['shape'])) > 1
    for item, mask, (height, width) in zip(full, batch['mask'], batch['shape'], strict=False):
        assert np.array_equal(mask[:height, :width], item['mask'])
        assert (mask[height:] == 255).all() and (mask[:, width:] == 255).all()


def test_an_epoch_fills_its_last_batch_or_drops_it():
    whole = TrainingBatches(7, 3, 0, fill_last=True)
    batches = [[index for _, index in batch] for batch in whole]
    assert [len(batch) for batch in batches] == [3, 3, 3] == [3] * len(whole)
    assert {index for batch in batches for index in batch} == set(range(7))
    assert [len(batch) for batch in TrainingBatches(7, 3, 0)] == [3, 3]
    (few,) = TrainingBatches(3, 4, 0, fill_last=True)
    assert sorted(few)[::3] == [(0, 0), (0, 2)] and len(few) == 4


def test_an_epoch_of_stage_2_passes_over_the_draw_and_redraws_on_request(shapes):
    data = fold_data(shapes)
    write_ids(
        data.lists.support(1, 9),
        draw_support({c: read_ids(data.lists.novel_class(c)) for c in data.novel_ids}, 1, 9),
    )
    view = Augmentation((33, 33), (1, 1))
    for redraw_every, changes in ((0, []), (1, [1, 2, 3]), (2, [2])):
        pairs = data.few_shot_training(view, 1, 9, redraw_every)
        epochs = [[pairs[epoch, i]['base']['id'] for i in range(len(pairs))] for epoch in range(4)]
        assert all(len(set(ids)) == 15 for ids in epochs)
        assert [e for e, (a, b) in enumerate(itertools.pairwise(epochs), 1) if a != b] == changes


def scenes(data, size=33):
    view = Augmentation((size, size), (0.8, 1.2))
    write_ids(
        data.lists.support(1, 7),
        draw_support({c: read_ids(data.lists.novel_class(c)) for c in data.novel_ids}, 1, 7),
    )
    return data.few_shot_training(view, 1, 7)


def test_kept_views_are_the_same_in_every_run_and_differ_among_each_other(shapes):
    pairs = scenes(fold_data(shapes))
    for make in (lambda: support_views(pairs.support, 3, 7), lambda: base_views(pairs.base, pairs.class_lists, 2)):
        views, again = make(), make()
        assert views.fingerprint() == again.fingerprint()
        for row in (len(views) - 1, 0, 4):  # in any order
            assert torch.equal(views[row]['image'], again[row]['image'])
            assert views[row]['index'] == row and views[row]['canvas'] == (33, 33)
    views = support_views(pairs.support, 3, 7)
    assert [views[row]['id'] for row in range(len(views))] == [i for i in pairs.support.image_ids for _ in range(3)]
    assert not torch.equal(views[0]['image'], views[1]['image'])
    assert views.fingerprint() != support_views(pairs.support, 3, 8).fingerprint()


def test_the_pool_takes_every_image_of_a_class_before_one_again(shapes):
    pairs = scenes(fold_data(shapes))
    lists = {class_id: ids[:3] for class_id, ids in pairs.class_lists.items()}
    pool = base_views(pairs.base, lists, 7)
    drawn = [pairs.base.image_ids[position] for position in pool.positions]
    for i, ids in enumerate(lists.values()):
        counts = Counter(drawn[7 * i : 7 * i + 7])
        assert set(counts) == set(ids) and max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(InputError, match='base class 6 has no image'):
        base_views(pairs.base, lists | {6: []}, 7)


class Kept(list):
    """Rows of views as `KeptFeatures` gives them; the id of row r of the base views is its number modulo 10."""

    def __init__(self, count):
        super().__init__({'row': row, 'id': str(row % 10)} for row in range(count))
        self.rows = dict(enumerate(self))


def test_pairs_of_kept_views_depend_on_seed_epoch_and_index_and_leave_support_images_out():
    support, base = Kept(6), Kept(60)  # three base classes with 20 views each

    def epoch(number, seed=1, shot=4):
        pairs = KeptPairs(support, base, num_base=3, per_class=20, support_ids={'3', '4'}, shot=shot, seed=seed)
        return [pairs[number, i] for i in range(len(pairs))]

    drawn = [[pair['base']['row'] for pair in epoch(number)] for number in range(3)]
    assert epoch(2) == epoch(2) and drawn[0] != drawn[1] != drawn[2] and epoch(2) != epoch(2, seed=2)
    for rows in drawn:
        assert [sum(row // 20 == k for row in rows) for k in range(3)] == [4, 4, 4] and len(set(rows)) == 12
        assert not {row % 10 for row in rows} & {3, 4}
    assert len({pair['support']['row'] for number in range(9) for pair in epoch(number)}) == 6
    assert len(epoch(0, shot=30)) == 90  # more than there are: some are repeated
    common = {'num_base': 3, 'per_class': 20, 'shot': 1, 'seed': 0}
    with pytest.raises(InputError, match='--base-views'):
        KeptPairs(support, base, **common, support_ids={str(i) for i in range(10)})
    base.rows = {row: known for row, known in base.rows.items() if row not in (0, 59)}  # skipped
    pairs = KeptPairs(support, base, **common, support_ids={'5'})
    assert [len(rows) for rows in pairs.free] == [17, 18, 17]
