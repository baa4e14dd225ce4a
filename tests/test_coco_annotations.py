"""COCO instances files: what is read, left out and refused."""

import json

import numpy as np
import pytest
from coco_file import NAMES, SQUARE, small_file
from pycocotools import mask as coco_mask

from core.errors import InputError
from dataset.annotations.coco import read_instances
from dataset.annotations.entries import Fault
from dataset.annotations.outlines import read_outline


@pytest.fixture
def read(tmp_path):
    """Write the content of a file and read it; `change` is called with the content before."""

    def write_and_read(change=lambda content: None):
        content = small_file()
        change(content)
        path = tmp_path / 'instances.json'
        path.write_text(json.dumps(content))
        return read_instances(path)

    return write_and_read


def test_left_out_annotations_are_counted(read):
    bare = [[], [[]], None, {'size': [30, 40], 'counts': [1200]}]

    def boxes(content):
        for k, segmentation in enumerate(bare):
            content['annotations'].append({**content['annotations'][0], 'id': k, 'segmentation': segmentation})
        content['annotations'].append({**content['annotations'][3], 'id': 9})
        del content['annotations'][-1]['segmentation'], content['annotations'][-1]['iscrowd']

    instances = read(boxes)
    assert instances.left_out['without outline'] == [
        *(f'annotation {k} of image 12' for k in range(4)), 'annotation 9 of image 7'
    ]  # fmt: skip
    assert '5 without outline (annotation 0 of image 12' in instances.describe_left_out()
    assert {i: len(image.instances) for i, image in instances.images.items()} == {'12': 1, '3': 0, '7': 1, '9': 0}
    for annotations in ([], small_file()['annotations'][1:3], [{**small_file()['annotations'][0], 'segmentation': []}]):
        with pytest.raises(InputError, match='has nothing to draw'):
            read(lambda content: content.update(annotations=annotations))  # noqa: B023 (called at once)


def entry(kind, place=-1, **fields):
    """A change that sets fields of an entry; a field that is `...` is removed."""

    def change(content):
        content[kind][place].update(fields)
        for name in [name for name, value in fields.items() if value is ...]:
            del content[kind][place][name]

    return change


def outline(segmentation):
    return entry('annotations', segmentation=segmentation)


def runs(counts, size=(30, 40)):
    return outline({'size': list(size), 'counts': counts})


COUNTS = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))['counts'].decode()
THIS = 'annotation 504 of image 7'
REFUSED = {
    'iscrowd true': (entry('annotations', iscrowd=True), 'iscrowd must be 0 or 1', f'{THIS} has true'),
    'iscrowd 2': (entry('annotations', iscrowd=2), 'iscrowd must be 0 or 1', f'{THIS} has 2'),
    'iscrowd 0.0': (entry('annotations', iscrowd=0.0), 'iscrowd must be 0 or 1', f'{THIS} has 0.0'),
    'iscrowd null': (entry('annotations', iscrowd=None), 'iscrowd must be 0 or 1', f'{THIS} has null'),
    'annotation id twice': (entry('annotations', id=503), 'annotation ids must differ', 'annotation 503 of image 7'),
    'no annotation id': (entry('annotations', id=...), 'id must be an integer', 'annotations[3] has no id'),
    'annotation id as text': (entry('annotations', id='504'), 'id must be an integer', 'annotations[3] has "504"'),
    'image id twice': (entry('images', id=12), 'image ids must differ', 'image 12'),
    'image id as text': (entry('annotations', image_id='7'), 'image_id must be an integer', '504 of image "7" has "7"'),
    'image id as fraction': (entry('annotations', image_id=7.0), 'image_id must be an integer', 'has 7.0'),
    'unknown image': (entry('annotations', image_id=8), 'image_id must be the id of an entry', '504 of image 8 has 8'),
    'unknown category': (entry('annotations', category_id=17), 'category_id must be the id of an', f'{THIS} has 17'),
    'no category id': (entry('annotations', category_id=...), 'category_id must be', f'{THIS} has no category_id'),
    'category id twice': (entry('categories', id=999), 'category ids must differ', 'category 999'),
    'category name twice': (entry('categories', name='dog'), 'category names must differ', 'have "dog"'),
    'category name as number': (entry('categories', name=5), 'name must be a text', 'category 1000 has 5'),
    'category without name': (entry('categories', name=' '), 'name must be a text', 'category 1000 has " "'),
    'no height': (entry('images', height=...), 'height must be an integer > 0', 'image 9 has no height'),
    'height 0': (entry('images', height=0), 'height must be an integer > 0', 'image 9 has 0'),
    'width as text': (entry('images', width='40'), 'width must be an integer > 0', 'image 9 has "40"'),
    'width as fraction': (entry('images', width=40.0), 'width must be an integer > 0', 'image 9 has 40.0'),
    'file name as number': (entry('images', file_name=9), 'file_name must be the name of a file', 'image 9 has 9'),
    'file name of a folder': (entry('images', file_name='x/..'), 'file_name must be the name', 'image 9 has "x/.."'),
    'file name empty': (entry('images', file_name=''), 'file_name must be the name of a file', 'image 9 has ""'),
    'same name, Windows folder': (entry('images', file_name='val\\7.jpg'), 'must differ', 'image 7 (7.jpg) have "7"'),
    'same name, other suffix': (entry('images', file_name='/data/12.png'), 'must differ', 'image 12 (12.jpg) have'),
    'entry no object': (lambda content: content['images'].append(9), 'must be an object', 'images[4] has 9'),
    'box as polygon': (outline([[10, 10, 20, 20]]), 'an even number of coordinates, at least 6', f'{THIS} has 4'),
    'point beside polygon': (outline([*SQUARE, [20, 15]]), 'an even number of coordinates', f'{THIS} has 2'),
    'nothing beside polygon': (outline([*SQUARE, []]), 'an even number of coordinates', f'{THIS} has 0'),
    'pairs': (outline([[[10, 10], [20, 10], [20, 20]]]), 'a polygon must hold numbers', f'{THIS} has [[10, 10]'),
    'objects': (outline([[{'x': 1, 'y': 2}] * 6]), 'a polygon must hold numbers', THIS),
    'texts': (outline([['1', '2', '3', '4', '5', '6']]), 'a polygon must hold numbers', f'{THIS} has ["1"'),
    'truth values': (outline([[1, 2, True, 4, 9, 9]]), 'a polygon must hold numbers', THIS),
    'outline as text': (outline('10 10 20 10 20 20'), 'segmentation must be a list of polygons', THIS),
    'NaN': (outline([[10, 10, 20, float('nan'), 20, 20]]), 'a polygon must lie in its image', f'{THIS} has y = NaN'),
    'infinite': (outline([[10, 10, float('inf'), 10, 20, 20]]), 'must lie in its image', 'x = Infinity'),
    'other size': (outline([[100, 100, 200, 100, 200, 250]]), 'must lie in its image', 'x = 100, expected 0..40'),
    'swapped axes': (outline([[5, 38, 9, 38, 9, 30]]), 'must lie in its image', 'y = 38, expected 0..30'),
    'negative': (outline([[-5, 3, 9, 3, 9, 9]]), 'must lie in its image', 'x = -5, expected 0..40'),
    'short': (runs([600, 100]), 'must cover all pixels', f'{THIS} has 700 of 30 x 40 = 1200'),
    'long': (runs([600, 1000]), 'must cover all pixels', '1600 of'),
    'no runs': (runs([]), 'must cover all pixels', '0 of'),
    'negative run': (runs([1300, -100]), 'must be integers >= 0', f'{THIS} has [1300, -100]'),
    'fractional run': (runs([600.0, 600]), 'must be integers >= 0', '[600.0, 600]'),
    'runs without counts': (outline({'size': [30, 40]}), 'must be integers >= 0', 'null'),
    'runs of width and height': (runs(COUNTS, (40, 30)), "must be the image's", 'has [40, 30], image [30, 40]'),
    'runs of another size': (runs(COUNTS, (60, 80)), "must be the image's", 'has [60, 80]'),
    'compressed, cut': (runs(COUNTS[:-1] + 'o'), 'must be one that pycocotools writes', THIS),
    'compressed, half': (runs(COUNTS[: len(COUNTS) // 2]), 'must cover all pixels', THIS),
    'compressed, empty': (runs(''), 'must be one that pycocotools writes', f'{THIS} has ""'),
    'compressed, other text': (runs('eJxLTCtKzU1MzigtAgAVVQPx'), 'run lengths', THIS),
    'compressed, not ASCII': (runs('1é2'), 'must be one that pycocotools writes', THIS),
}


@pytest.mark.parametrize('name', REFUSED)
def test_entries_that_do_not_follow_the_format_are_named(read, name):
    change, *messages = REFUSED[name]
    with pytest.raises(InputError) as error:
        read(change)
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert 'instances.json does not follow the COCO format' in str(error.value)
    assert sum(line.startswith('  ') for line in str(error.value).splitlines()) == 1  # one fault, and none that follows


def test_all_faults_are_in_one_message(read):
    def change(content):
        content['annotations'] += [{**content['annotations'][0], 'id': i, 'iscrowd': 'no'} for i in range(9)]
        content['annotations'] += [{**content['annotations'][0], 'id': i, 'segmentation': [[i]]} for i in (10, 11)]

    with pytest.raises(InputError) as error:
        read(change)
    first, second = str(error.value).splitlines()[1:]
    assert first.endswith('annotation 3 of image 12 has "no" and 5 more')
    assert second.endswith(
        'annotation 10 of image 12 has 1 of them, [10], annotation 11 of image 12 has 1 of them, [11]'
    )


def test_random_strings_are_no_run_lengths():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        counts = ''.join(map(chr, rng.integers(32, 127, rng.integers(0, 30))))
        with pytest.raises(Fault):
            read_outline({'size': [123, 457], 'counts': counts}, 123, 457)


def test_fractions_of_the_image_are_no_coordinates(read):
    def shrink(content, largest):
        for annotation in content['annotations']:
            annotation['segmentation'] = [[0.1, 0.2, largest, 0.2, 0.9, 0.7]]

    with pytest.raises(InputError, match='fractions of the image'):
        read(lambda content: shrink(content, 1.0))
    assert len(read(lambda content: shrink(content, 1.1)).images['7'].instances) == 1


def test_class_ids_follow_from_names(read):
    few = read(lambda content: content.update(categories=[content['categories'][k] for k in (-17, 0)]))
    assert few.class_ids(NAMES) == {'dog': 17, 'toothbrush': 80}
    for name, absent in (('Dog', 'dog'), ('dog ', 'dog'), ('chien', 'dog')):
        renamed = read(entry('categories', -17, name=name))
        with pytest.raises(InputError) as error:
            renamed.class_ids(NAMES)
        assert repr(name) in str(error.value) and f'file: {absent!r}.' in str(error.value)
    with pytest.raises(InputError, match="78 categories that are no classes of this data set: 'hair drier'"):
        read().class_ids(('dog', 'toothbrush'))


TEXT = json.dumps(small_file())
NOT_JSON = {
    'empty': (b'  \n', 'it is empty'),
    'cut in a number': (TEXT[: TEXT.index('30, "width"') + 1].encode(), 'it ends in the middle'),
    'cut in a text': (TEXT[: TEXT.index('jpg')].encode(), 'it ends in the middle'),
    'cut after an entry': (TEXT[: TEXT.index('}') + 1].encode(), 'it ends in the middle'),
    'zeros at the end': (TEXT[:500].encode() + bytes(500), 'it ends in the middle'),
    'zeros': (bytes(5000), 'it is no JSON'),
    'web page': (b'<!DOCTYPE html><html></html>', "it begins with b'<!DOCTYPE html>"),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\n', "it begins with b'version https://git-lfs"),
    'archive': (b'PK\3\4' + bytes(range(128, 256)), 'it is no'),
    'Latin-1': (TEXT.replace('toothbrush', 'brosse à dents').encode('latin-1'), 'it is no UTF-8 text'),
    'Python': (b"{'images': []}", 'it is no JSON'),
    'deep': (b'[' * 100_000 + b']' * 100_000, 'it is no JSON'),
    'list of results': (b'[{"image_id": 7, "score": 0.5}]', 'it holds [{"image_id": 7, "score": 0.5}]'),
    'text': (b'"images"', 'it holds "images"'),
    'no categories': (json.dumps({'images': [], 'annotations': []}).encode(), 'an object of images, annotations'),
    'table of annotations': (b'{"images": [], "categories": [], "annotations": {"7": 1}}', 'each a list'),
    'key twice': (TEXT.replace('"image_id": 3,', '"image_id": 3, "image_id": 4,').encode(), '"image_id" occurs twice'),
    'list twice': (TEXT.replace('{"images"', '{"annotations": [], "images"').encode(), '"annotations" occurs twice'),
}


@pytest.mark.parametrize('name', NOT_JSON)
def test_files_that_are_something_else_are_named(tmp_path, name):
    content, message = NOT_JSON[name]
    path = tmp_path / 'instances.json'
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_instances(path)
    assert message in str(error.value) and str(path) in str(error.value), str(error.value)


@pytest.mark.parametrize('encoding', ('utf-8-sig', 'utf-16', 'utf-32'))
def test_files_in_other_unicode_encodings_are_read(tmp_path, encoding):
    (tmp_path / 'instances.json').write_bytes(TEXT.replace('"12.jpg"', '"Straße 12.jpg"').encode(encoding))
    assert list(read_instances(tmp_path / 'instances.json').annotated) == ['7', 'Straße 12']
