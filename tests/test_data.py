"""Folds, labels, masks, training and evaluation views, lists, draws and the embedded data."""

import dataclasses
import io
import itertools
import os
import subprocess
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import InputError
from dataset import DATASETS, Augmentation, DatasetSpec, FoldData
from dataset.classes import SHAPES
from dataset.fewshot import draw_base, draw_support
from dataset.images import ORIENTATION_TAG, Samples, read_header, read_image, read_mask
from dataset.labels import INVALID, label_table
from dataset.legend import voc_palette
from dataset.lists import ClassIndex, FoldLists, ensure_class_lists, read_ids, write_ids
from dataset.shapes import make_shapes
from dataset.transforms import resize
from engine.loaders import TrainingBatches, evaluation_loader, training_loader
from report.panels import save_palette_png

CPU = torch.device('cpu')


# ---- folds and labels


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


# ---- masks


def test_palette_and_greyscale_masks_read_alike(tmp_path):
    mask = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    cv2.imwrite(str(tmp_path / 'grey.png'), mask)
    save_palette_png(tmp_path / 'palette.png', mask, voc_palette())
    assert np.array_equal(read_mask(tmp_path / 'grey.png'), mask)
    assert np.array_equal(read_mask(tmp_path / 'palette.png'), mask)


def test_palette_masks_of_few_bits_read_as_ids(tmp_path):
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette()[:4].tobytes())
    picture.save(tmp_path / 'm.png', bits=2)
    assert np.array_equal(read_mask(tmp_path / 'm.png'), mask)


def test_greyscale_of_few_bits_is_refused(tmp_path):
    """Decoders rescale its values to 0..255: they would read class id 1 of a 4-bit mask as 17."""
    picture = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    four_bits = io.BytesIO()
    palette = picture.copy()
    palette.putpalette(bytes(48))
    palette.save(four_bits, 'png', bits=4)
    content = bytearray(four_bits.getvalue())
    header = content.index(b'IHDR')
    content[header + 13] = 0  # colour type palette -> greyscale
    content[header + 17 : header + 21] = zlib.crc32(content[header : header + 17]).to_bytes(4, 'big')
    (tmp_path / 'm.png').write_bytes(content)
    with pytest.raises(InputError, match='fewer than 8 bits'):
        read_mask(tmp_path / 'm.png')


def test_a_truncated_photograph_is_refused_and_trailing_bytes_are_not(tmp_path, shapes):
    content = (shapes / 'JPEGImages/val_0000.jpg').read_bytes()
    path = tmp_path / 'i.jpg'
    path.write_bytes(content + b'\0\0')
    assert np.array_equal(read_image(path), read_image(shapes / 'JPEGImages/val_0000.jpg'))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match='cannot be decoded'):
        read_image(path)


@pytest.mark.parametrize(('orientation', 'turned'), ((1, False), (3, False), (6, True), (9, False)))
def test_the_header_gives_the_size_that_the_decoder_gives(tmp_path, orientation, turned):
    path = tmp_path / 'a.jpg'
    picture = Image.new('RGB', (60, 40))
    exif = picture.getexif()
    exif[ORIENTATION_TAG] = orientation
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'  # is not applied
    picture.save(path, exif=exif, xmp=xmp)
    size, found = read_header(path)
    assert size == read_image(path).shape[1::-1] == ((40, 60) if turned else (60, 40))
    assert found == (orientation if orientation in (1, 3, 6) else 1)


def test_lists_are_read_by_line(tmp_path):
    path = tmp_path / 'ids.txt'
    path.write_bytes(b'a\r\n\r\nb.2\r\n')
    assert read_ids(path) == ['a', 'b.2']
    path.write_text('a\n', encoding='utf-8-sig')
    assert read_ids(path) == ['a']
    path.write_bytes(b'JPEGImages/a.jpg SegmentationClassAug/a.png\n')
    with pytest.raises(InputError, match=r'lines like "JPEGImages/a\.jpg .*one image id a line'):
        read_ids(path)
    path.write_bytes(b'a.JPG\r\nb.2.jpeg\r\n')
    with pytest.raises(InputError, match='names files') as error:
        read_ids(path)
    subprocess.run(str(error.value).partition('suffix: ')[2], shell=True, check=True)  # the message's command
    assert read_ids(path) == ['a', 'b.2']
    for wrong, content in ((tmp_path, None), (path, b'\xff\xfe')):
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match='cannot be read'):
            read_ids(wrong)


def test_real_masks_hold_voc_ids(voc_mini):
    path = sorted((voc_mini / 'SegmentationClassAug').iterdir())[0]
    assert set(np.unique(read_mask(path))) <= {*range(21), 255}


def test_voc_palette_has_vocs_colours():
    palette = voc_palette()
    assert palette[[0, 1, 2, 3, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip


# ---- views


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


def test_normalisation_is_imagenets(shapes):
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
    assert len({tuple(mask.shape) for mask in batch['mask']}) > 1


# ---- lists


def hand_made(tmp_path, masks):
    """Masks of 200x200 pixels from {id: {class id: pixels}}, with images."""
    folder = tmp_path / 'data'
    folder.mkdir()
    for image_id, classes in masks.items():
        mask = np.zeros(40_000, np.uint8)
        start = 0
        for class_id, count in classes.items():
            mask[start : start + count] = class_id
            start += count
        cv2.imwrite(str(folder / f'{image_id}.png'), mask.reshape(200, 200))
        cv2.imwrite(str(folder / f'{image_id}.jpg'), np.zeros((200, 200, 3), np.uint8))
    write_ids(tmp_path / 'list' / 'trainaug.txt', masks)
    return Samples(folder, folder, label_table(range(1, 21), (), True))


MASKS = {
    'd': {6: 16384, 1: 1},
    'a': {6: 16383, 255: 20000},
    'c': {1: 20000, 2: 16384},
    'b': {20: 16384, 7: 16384},
    'e': {},
    'f': {3: 10},
}


def test_class_lists_of_a_hand_made_case(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    lists = FoldLists(tmp_path / 'list', 0)
    ensure_class_lists(DATASETS['voc'], samples, tmp_path / 'list' / 'trainaug.txt', lists)
    read = lambda path: path.read_text().split()  # noqa: E731
    assert read(lists.train) == ['d', 'a', 'b']
    assert {c: read(lists.base_class(c)) for c in (6, 7, 8, 20)} == {6: ['d'], 7: ['b'], 8: [], 20: ['b']}
    assert {c: read(lists.novel_class(c)) for c in (1, 2, 3)} == {1: ['c'], 2: ['c'], 3: []}
    assert len(list(lists.train.parent.iterdir())) == 21

    filtered = FoldLists(tmp_path / 'list', 0, filter_novel=True)
    ensure_class_lists(DATASETS['voc'], samples, tmp_path / 'list' / 'trainaug.txt', filtered)
    assert filtered.train == tmp_path / 'list' / 'fold0_filter' / 'train_fold0.txt'
    assert read(filtered.train) == ['a', 'b'] and read(filtered.base_class(6)) == []
    assert read(filtered.novel_class(1)) == ['c']  # support comes from images with novel classes, filtered or not


def test_class_index_does_not_depend_on_workers_and_reads_a_mask_once(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    cache = tmp_path / 'counts.npz'
    one = ClassIndex.from_masks(samples, list(MASKS), 20, workers=1)
    two = ClassIndex.from_masks(samples, list(MASKS), 20, cache, workers=2)
    assert np.array_equal(one.pixels, two.pixels)
    # counts come from the cache even if a mask cannot be decoded any more, as long as its file looks unchanged
    path = samples.mask_path('a')
    stamp, size = path.stat().st_mtime_ns, path.stat().st_size
    path.write_bytes(b'x' * size)
    os.utime(path, ns=(stamp, stamp))
    cached = ClassIndex.from_masks(samples, [*reversed(MASKS)], 20, cache)
    assert np.array_equal(cached.pixels[::-1], one.pixels)
    os.utime(path, ns=(stamp + 1, stamp + 1))
    with pytest.raises(InputError, match=r'a\.png cannot be decoded'):
        ClassIndex.from_masks(samples, list(MASKS), 20, cache)


def test_existing_lists_are_kept_but_checked(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    train = tmp_path / 'list' / 'trainaug.txt'
    lists = FoldLists(tmp_path / 'list', 0)
    write_ids(lists.train, ['b', 'd'])
    ensure_class_lists(DATASETS['voc'], samples, train, lists)
    assert lists.train.read_text() == 'b\nd\n'
    assert lists.base_class(6).read_text() == 'd\n'  # the others are made
    assert ensure_class_lists(DATASETS['voc'], samples, train, lists) == [lists.train]  # this data gives d, a, b
    few = dataclasses.replace(DATASETS['voc'], min_pixels=16383)
    assert ensure_class_lists(few, samples, train, lists) == [lists.base_class(6), lists.train]
    write_ids(lists.train, ['b', 'c'])  # c shows novel classes of fold 0 only: a list of another fold
    with pytest.raises(InputError, match='names c, which do not belong there with this data: it is a list of another'):
        ensure_class_lists(DATASETS['voc'], samples, train, lists)
    write_ids(lists.train, ['b', 'd'])
    # an unfiltered list in the filtered folder is found (d shows novel class 1); filtering rewrites no list
    filtered = FoldLists(tmp_path / 'list', 0, filter_novel=True)
    write_ids(lists.novel_class(1), ['d', 'c'])
    write_ids(filtered.train, ['b', 'd'])
    with pytest.raises(InputError, match='names d'):
        ensure_class_lists(DATASETS['voc'], samples, train, filtered)
    assert lists.novel_class(1).read_text() == 'd\nc\n'
    write_ids(lists.base_class(20), [])  # the result of a min_pixels that was too high
    ensure_class_lists(DATASETS['voc'], samples, train, lists)
    assert lists.base_class(20).read_text() == 'b\n'
    ensure_class_lists(DATASETS['voc'], samples, train, lists, overwrite=True)
    assert lists.novel_class(1).read_text() == 'c\n'


def test_a_damaged_cache_is_not_used(tmp_path):
    samples = hand_made(tmp_path, MASKS)
    cache = tmp_path / 'counts.npz'
    cache.write_bytes(b'PK nothing')
    index = ClassIndex.from_masks(samples, list(MASKS), 20, cache)
    assert index.covering(6, 16384) == ['d']
    with np.load(cache) as saved:
        assert saved['ids'].tolist() == list(MASKS)


def test_class_lists_of_real_data_agree_with_np_unique(voc_mini, tmp_path):
    ids = (voc_mini / 'ImageSets/Segmentation/trainaug.txt').read_text().split()[:60]
    samples = Samples(voc_mini / 'JPEGImages', voc_mini / 'SegmentationClassAug', label_table(range(1, 21), (), True))
    index = ClassIndex.from_masks(samples, ids, 20)
    for image_id, row in zip(ids, index.pixels, strict=True):
        values, counts = np.unique(read_mask(voc_mini / f'SegmentationClassAug/{image_id}.png'), return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {v: row[v] for v in np.flatnonzero(row)}


# ---- draws


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


def test_base_draw_has_every_class_no_repeats_and_no_support():
    lists = {1: list('abcd'), 2: list('cdefgh'), 3: list('ghij')}
    for seed in range(30):
        drawn = draw_base(lists, 2, {'a', 'j'}, seed, epoch=0)
        assert len(drawn) == len(set(drawn)) == 6
        assert not {'a', 'j'} & set(drawn)
        assert all(len(set(drawn) & set(ids)) >= 2 for ids in lists.values())
        assert drawn == draw_base(lists, 2, {'a', 'j'}, seed, epoch=0)
    assert len({tuple(draw_base(lists, 2, (), 0, epoch)) for epoch in range(10)}) > 5
    with pytest.raises(InputError, match='base class 1: 5 base images per epoch asked for; it has 4'):
        draw_base(lists, 5, (), 0, 0)


def test_base_draw_succeeds_with_shared_images():
    """Class 1 needs two of a, b, c and class 2 two of b, c, d: a first draw of b and c must not be final."""
    lists = {1: list('abc'), 2: list('bcd'), 3: list('ef')}
    for epoch in range(200):
        drawn = draw_base(lists, 2, (), 0, epoch)
        assert len(set(drawn)) == 6


def test_an_epoch_fills_its_last_batch_or_drops_it():
    whole = TrainingBatches(7, 3, 0, fill_last=True)
    batches = [[index for _, index in batch] for batch in whole]
    assert [len(batch) for batch in batches] == [3, 3, 3] == [3] * len(whole)
    assert {index for batch in batches for index in batch} == set(range(7))
    assert [len(batch) for batch in TrainingBatches(7, 3, 0)] == [3, 3]


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


# ---- embedded data


def test_shapes_are_a_function_of_the_seed(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        make_shapes(tmp_path / name, seed, train_images=4, val_images=2)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob('*.*')) for n in 'abc']
    assert files[0] == files[1] == files[2] and len(files[0]) == 14
    same = [(tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files[0]]
    other = [
        (tmp_path / 'a' / f).read_bytes() == (tmp_path / 'c' / f).read_bytes() for f in files[0] if f.suffix != '.txt'
    ]
    assert all(same) and not any(other)


def test_shapes_have_every_class_ignored_outlines_and_colours_independent_of_the_class(shapes):
    ids = (shapes / 'list' / 'trainaug.txt').read_text().split()
    colours = {}
    for image_id in ids:
        mask = read_mask(shapes / f'SegmentationClassAug/{image_id}.png')
        image = cv2.imread(str(shapes / f'JPEGImages/{image_id}.jpg')).astype(float)
        assert 255 in mask and 0 in mask
        for class_id in set(np.unique(mask)) - {0, 255}:
            colours.setdefault(int(class_id), []).append(image[mask == class_id].mean(0))
    assert sorted(colours) == list(range(1, 21))
    assert min(len(means) for means in colours.values()) >= 6
    # a nearest-mean classifier of the objects' mean colours is hardly better than chance (5 %)
    right = 0
    for class_id, means in colours.items():
        for i, colour in enumerate(means):
            centers = {
                other: np.mean([m for j, m in enumerate(theirs) if (other, j) != (class_id, i)], axis=0)
                for other, theirs in colours.items()
            }
            right += min(centers, key=lambda c: np.linalg.norm(colour - centers[c])) == class_id
    assert right / sum(map(len, colours.values())) < 0.15
