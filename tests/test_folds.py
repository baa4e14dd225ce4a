"""Cards: folds, refusals and label tables."""

import json

import numpy as np
import pytest

from core.errors import InputError
from dataset import DATASETS
from dataset.cards import read_card
from dataset.classes import find_dataset
from dataset.labels import INVALID, label_table, ranges
from dataset.shapes import SHAPES


def test_folds_of_pascal_5i_and_coco_20i():
    voc, coco = DATASETS['voc'], DATASETS['coco']
    assert [voc.novel_ids(f) for f in range(4)] == [
        (1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (11, 12, 13, 14, 15), (16, 17, 18, 19, 20)
    ]  # fmt: skip
    assert coco.novel_ids(1) == (2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74, 78)
    assert len(coco.class_names) == 80 and coco.class_names[0] == 'person' and coco.class_names[79] == 'toothbrush'
    for spec in DATASETS.values():
        for fold in range(4):
            assert sorted(spec.base_ids(fold) + spec.novel_ids(fold)) == list(range(1, len(spec.classes) + 1))
        assert spec.novel_ids(-1) == () and len(spec.base_ids(-1)) == len(spec.classes)
        with pytest.raises(ValueError, match=r'folds 0\.\.3'):
            spec.novel_ids(4)
    assert len(set(SHAPES)) == 20 and SHAPES[10] == ('star', 'plain')


CARD = """\
names: {0: road, 7: car, 11: tree, 255: pole}
ignore: [254, 3]
novel: [tree, 255]
images: {train: a, val: b, test: c}
masks: masks
train: train.txt
val: val.txt
test: test.txt
palette: {car: [255, 0, 0], 11: [0, 255, 0]}
scale_range: [0.5, 2]
min_pixels: 9
"""


def write_card(folder, text):
    path = folder / 'dataset.yaml'
    path.write_text(text, encoding='utf-8')
    return path


def test_a_card_is_a_data_set(tmp_path):
    folder = tmp_path / 'street'
    folder.mkdir()
    path = write_card(folder, CARD)
    spec = find_dataset(str(folder))
    assert spec == find_dataset(str(path)) and spec.name == str(spec) == 'street' and spec.choice == str(path)
    assert spec.classes == {0: 'road', 7: 'car', 11: 'tree', 255: 'pole'}
    assert spec.background is None and spec.ignore == (3, 254)
    assert spec.folds == ((11, 255),) and spec.base_ids(0) == (0, 7) and spec.novel_ids(-1) == ()
    assert spec.folders('train') == ('a', 'masks') and spec.tested().folders('val') == ('c', 'masks')
    assert spec.list_path('train', None) == folder / 'train.txt' and spec.tested().val_list == folder / 'test.txt'
    assert (spec.root, spec.scale_range, spec.min_pixels, spec.batch_size) == (folder, (0.5, 2), 9, 8)
    legend = spec.legend(0)
    assert legend.names == ('no class', 'road', 'car', 'tree', 'pole') and legend.class_ids[1:] == (0, 7, 11, 255)
    assert legend.class_ids[0] not in spec.classes and legend.colors[2].tolist() == [255, 0, 0]
    assert spec.legend(0).cut(3).background is None
    mask = np.array([0, 7, 11, 255, 254, 3, 1], np.uint8)
    assert spec.label_table(0, (11, 255), False)[mask].tolist() == [1, 2, 3, 4, 255, 255, INVALID]
    assert spec.label_table(0, (11, 255), True)[mask].tolist() == [1, 2, 0, 0, 255, 255, INVALID]
    assert spec.label_table(0, (11,), False)[mask].tolist() == [1, 2, 3, 0, 255, 255, INVALID]
    # what a checkpoint keeps of it gives the same legend
    kept = json.loads(json.dumps(spec.described()))
    assert kept['background'] is None and dict(kept['classes']) == spec.classes

    write_card(folder, 'names: [car, tree]\nnovel: tree\nimages: images\nmasks: masks\nval: none\n')
    spec = find_dataset(str(folder))
    assert spec.classes == {1: 'car', 2: 'tree'} and spec.background == 0 and spec.ignore == (255,)
    assert spec.val_list is None and spec.train_list == folder / 'list/train.txt' and spec.folds == ((2,),)
    write_card(folder, 'names: {0: background, 5: car}\nimages: images\nmasks: masks\nname: x\n')
    spec = find_dataset(str(folder))
    assert spec.classes == {5: 'car'} and spec.background == 0 and spec.name == 'x' and spec.folds == ()
    with pytest.raises(ValueError, match=r'has no folds: name its novel classes in .*dataset.yaml'):
        spec.novel_ids(0)


@pytest.mark.parametrize(('line', 'change', 'words'), (
    (1, ('names: {0: road, 7: car, 11: tree, 255: pole}', 'names: {0: road, 0: car}'), 'names: 0 is there twice'),
    (1, ('7: car', '7: Tree'), "names: 'tree' is there twice; the first is in line 1"),
    (1, ('7: car', '300: car'), 'names: got 300; expected a whole number of 0..255'),
    (1, ('7: car', '7: no'), 'names: got False; expected the name of a class; put it into quotes'),
    (1, ('7: car', "7: ''"), "names: got ''; expected the name of a class$"),
    (1, ('7: car', '7: [car]'), 'names: got a list; expected the name of a class'),
    (1, ('{0: road, 7: car, 11: tree, 255: pole}', '[background, tree]'), 'names: background is no class'),
    (1, ('{0: road, 7: car, 11: tree, 255: pole}', 'car'), "names: got 'car'; expected a list of names"),
    (1, ('{0: road, 7: car, 11: tree, 255: pole}', '[]'), 'names: got 0 classes; expected 1 to 253'),
    (2, ('[254, 3]', '[254, 7]'), 'ignore: 7 is a class or the background'),
    (3, ('[tree, 255]', '[tree, sky]'), "novel: got 'sky'; expected one of the names road, car, tree, pole"),
    (3, ('[tree, 255]', '[tree, 11]'), 'novel: got 2 classes; expected different ones'),
    (3, ('[tree, 255]', '[0, 7, 11, 255]'), 'novel: got 4 classes; .* leave at least one base class'),
    (3, ('[tree, 255]', '[tree]\nfolds: [[car]]'), 'novel: folds, in line 4, names novel classes too'),
    (3, ('novel: [tree, 255]', 'folds: [tree]'), "folds: got 'tree'; expected a list of novel classes"),
    (4, ('{train: a, val: b, test: c}', '{train: a, test: c}'), 'images: there is no folder for val'),
    (4, ('{train: a, val: b, test: c}', '{trian: a}'), "images: got 'trian'; expected one of train, val, test"),
    (5, ('masks: masks', 'masks: 7'), 'masks: got 7; expected a folder'),
    (6, ('train: train.txt', 'train: none'), "train: got 'none'; expected a file of image ids"),
    (3, ('novel: [tree, 255]', 'folds: []'), 'folds: got a list; expected a list of folds'),
    (11, ('min_pixels: 9', 'zzz: 9'), "'zzz' is no key of a card[.] Keys are"),
    (6, ('train: train.txt', 'background: 7'), "background: 7 is the class 'car'; expected another value, or none"),
    (6, ('train: train.txt', 'train: [a, b]'), 'train: got a list; expected a file of image ids'),
    (9, ('[0, 255, 0]', '[255, 0, 0]'), 'palette: the values 7 and 11 have the same colour'),
    (9, ('[0, 255, 0]', '[0, 255]'), 'palette: got 2 numbers'),
    (9, ('{car: [255, 0, 0], 11: [0, 255, 0]}', 'grey'), "palette: got 'grey'; expected one of voc, spread"),
    (10, ('[0.5, 2]', '[2, 1]'), 'scale_range: .*expected .low, high. with 0 < low <= high'),
    (10, ('[0.5, 2]', '0.3'), 'scale_range: got 0.3; expected'),
    (11, ('min_pixels: 9', 'min_pixels: 9.5'), 'min_pixels: got 9.5; expected a whole number >= 1'),
    (11, ('min_pixels: 9', 'min_pixel: 9'), "'min_pixel' is no key of a card; did you mean min_pixels\\?"),
    (11, ('min_pixels: 9', 'palette: voc'), "'palette' is there twice; the first is in line 9"),
    (11, ('min_pixels: 9', 'min_pixels: [9'), 'this is no YAML'),
    (11, ('min_pixels: 9', '\tmin_pixels: 9'), 'this is no YAML'),
))  # fmt: skip
def test_a_card_is_refused_with_file_line_and_key(tmp_path, line, change, words):
    assert change[0] in CARD
    path = write_card(tmp_path, CARD.replace(*change))
    with pytest.raises(InputError, match=rf'dataset\.yaml, line ({line}|{line + 1}): {words}'):
        read_card(path)


def test_other_files_are_no_cards(tmp_path):
    for content, words in (
        (b'', 'holds no "key: value" lines'), (b'- a\n- b\n', 'holds no "key: value" lines'),
        (b'\xff\xfe\x00', 'no YAML'), (b'\x89PNG\r\n\x1a\n', 'no YAML'), (b'[' * 5000, 'no YAML'),
        (b'names: [a]\n', "has no 'images'"), (b'names: !!python/object:os.system [a]\nimages: a\nmasks: b', 'names'),
    ):  # fmt: skip
        (tmp_path / 'dataset.yaml').write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_card(tmp_path / 'dataset.yaml')
    write_card(tmp_path, 'name: voc\nnames: [a, b]\nimages: a\nmasks: b\n')
    with pytest.raises(InputError, match="the name 'voc' is that of a built-in data set; give it another"):
        find_dataset(str(tmp_path))
    with pytest.raises(
        InputError, match=r"got 'street'; expected one of voc, coco, shapes, the folder of a dataset.yaml"
    ):
        find_dataset('street')


def test_label_table_of_both_stages():
    base, novel = (2, 4), (1, 5)
    mask = np.array([0, 1, 2, 4, 5, 255, 3], np.uint8)
    assert label_table(base, novel, True)[mask].tolist() == [0, 0, 1, 2, 0, 255, INVALID]
    assert label_table(base, novel, False)[mask].tolist() == [0, 3, 1, 2, 4, 255, INVALID]


def test_ranges_of_numbers():
    assert ranges([0, 1, 2, 7, 9, 10]) == '0..2, 7, 9..10' and ranges([]) == ''
