"""Classes of one's own in masks that show several: a folder with a card."""

import numpy as np
import pytest
from exports import write_photograph
from PIL import Image

from core.errors import InputError
from dataset.own_classes import SupportSamples, read_support_folder

CARD = """\
names: {7: scooter, 9: bin, 20: car}
novel: [scooter, bin]
images: images
masks: masks
train: list.txt
val: none
min_pixels: 20
"""


@pytest.fixture
def folder(tmp_path):
    """a shows a scooter, a bin, a car and an unknown place; b a car alone; c a scooter, and a speck of a bin."""
    masks = {name: np.zeros((40, 60), np.uint8) for name in 'abc'}
    masks['a'][:10, :10], masks['a'][20:30, :10], masks['a'][:10, 30:40], masks['a'][30:] = 7, 9, 20, 255
    masks['b'][:10, :10] = 20
    masks['c'][5:25, 5:25], masks['c'][30, 30] = 7, 9
    for name, mask in masks.items():
        write_photograph(tmp_path / f'card/images/{name}.png', np.full((40, 60, 3), 90, np.uint8))
        (tmp_path / 'card/masks').mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f'card/masks/{name}.png')
    (tmp_path / 'card/list.txt').write_text('a\nb\nc\n')
    (tmp_path / 'card/dataset.yaml').write_text(CARD)
    return tmp_path / 'card'


def test_a_mask_of_several_classes_is_a_mask_of_each(folder):
    support, left_out = read_support_folder(folder, (40, 60))
    assert {name: [image.name for image in images] for name, images in support.items()} == {
        'scooter': ['a.png', 'c.png'], 'bin': ['a.png']
    }  # fmt: skip
    assert left_out == ['b.png, which shows no taught class', 'bin in c.png (1 pixels)']
    scooter, bin_ = (support[name][0].mask for name in ('scooter', 'bin'))
    for mask, own, other in ((scooter, slice(0, 10), slice(20, 30)), (bin_, slice(20, 30), slice(0, 10))):
        assert (mask[own, :10] == 1).all() and (mask[other, :10] == 255).all() and (mask[30:] == 255).all()
        assert (mask[:10, 30:40] == 0).all() and (mask == 1).sum() == 100
    labels = SupportSamples(support, {'scooter': 16, 'bin': 17}).read('bin/a.png')[1]
    assert np.unique(labels).tolist() == [0, 17, 255] and (labels == 17).sum() == 100


@pytest.mark.parametrize(('change', 'message'), (
    (('novel: [scooter, bin]', 'folds: [[scooter], [bin]]'), 'has 2 folds; name the classes to teach'),
    (('scooter', '..'), 'cannot name a picture'),
    (('scooter', 'a/b'), 'a/b cannot name a picture; expected names without "/"'),
    (('min_pixels: 20', 'min_pixels: 500'), 'no photograph shows 500 pixels of scooter, bin'),
    (('train: list.txt', 'train: other.txt'), 'other.txt does not exist'),
))  # fmt: skip
def test_what_is_wrong_with_a_card_is_named(folder, change, message):
    (folder / 'dataset.yaml').write_text(CARD.replace(*change))
    with pytest.raises(InputError, match=message):
        read_support_folder(folder, (40, 60))


def test_without_novel_classes_all_are_taught(folder):
    (folder / 'dataset.yaml').write_text(CARD.replace('novel: [scooter, bin]\n', ''))
    assert [*read_support_folder(folder, (40, 60))[0]] == ['scooter', 'bin', 'car']
