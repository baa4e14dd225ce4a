"""Annotations of other tools that cannot be imported: what is wrong is named, and nothing is written."""

import base64

import cv2
import numpy as np
import pytest
from exports import rectangle, small_coco, small_labelme, write_colors, write_json, write_photograph

CAR = ('car', [rectangle(1, 1, 9, 9)])
BOX = ('car', 'rectangle', [[1, 1], [9, 9]])


def _labelmap(text):
    def write(folder):
        write_colors(folder, [])
        (folder / 'labelmap.txt').write_text(text)
        write_photograph(folder / 'JPEGImages/a.jpg', np.zeros((30, 40, 3), np.uint8))
        mask = np.zeros((30, 40, 3), np.uint8)
        mask[3:5, 7:9] = 1, 2, 3
        write_photograph(folder / 'SegmentationClass/a.png', mask)

    return write


COCO_REFUSED = {
    'polygon of two points': (lambda f: small_coco(f, CAR, ('car', [[1, 1, 9, 9]])), 'annotation 91 of image 0'),
    'other size': (lambda f: small_coco(f, CAR, width=50), 'image 0 (a.png) of'),
    'no such photograph': (lambda f: small_coco(f, CAR, file_name='b.png'), 'missing in', 'b.png', '--images'),
    'other suffix': (lambda f: small_coco(f, CAR, file_name='a.jpg'), 'a.jpg (there is a.png)'),
    'names twice': (lambda f: small_coco(f, CAR, ('Car', CAR[1]), names=('car', 'Car')), "'car', 'Car'", 'capit'),
    'control character': (lambda f: small_coco(f, ('a\tb', CAR[1]), names=('a\tb',)), "'a\\tb'"),
    'nothing': (lambda f: small_coco(f), '0 classes'),
    'no file': (lambda f: f.mkdir(), 'no COCO instances file'),
}
LABELME_REFUSED = {
    'damaged JSON': (lambda f: (f.mkdir(), (f / 'b.json').write_text('{"shapes": [')), 'b.json is not one of'),
    'no labelme file': (lambda f: write_json(f / 'b.json', {'images': []}), 'no file of labelme'),
    'outside': (lambda f: small_labelme(f, BOX, ('car', 'rectangle', [[1, 1], [90, 9]])), 'shape 1 (car) of', 'x = 90'),
    'two points': (lambda f: small_labelme(f, ('car', 'polygon', [[1, 1], [9, 9]])), 'shape 0 (car)', 'at least 6'),
    'three corners': (lambda f: small_labelme(f, ('car', 'circle', [[1, 1]] * 3)), 'a circle must have 2 points'),
    'no label': (lambda f: small_labelme(f, (None, 'circle', [[1, 1]] * 2)), 'shape 0 of', 'label must be a text'),
    'unknown shape': (lambda f: small_labelme(f, ('car', 'blob', [])), 'shape_type must be one of', '"blob"'),
    'points as texts': (lambda f: small_labelme(f, ('car', 'polygon', [['1', '2']] * 3)), 'a list of points'),
    'mask without picture': (lambda f: small_labelme(f, ('car', 'mask', BOX[2])), 'must have its picture'),
    'no size': (lambda f: small_labelme(f, BOX, imageHeight='30'), 'imageHeight must be an integer > 0'),
    'no photograph inside': (
        lambda f: small_labelme(f, BOX, imagePath='b.png', imageData='aGVsbG8='),
        'a.json',
        'cannot be dec',
    ),
    'no image': (lambda f: (small_labelme(f, BOX, imagePath='a.gif'), (f / 'a.gif').write_bytes(b'GIF')), 'convert'),
    'no photograph': (lambda f: small_labelme(f, BOX, imagePath='x/b.png'), 'missing', 'x/b.png'),
    'damaged photograph': (lambda f: small_labelme(f, BOX, imagePath='b.png', imageData='*'), 'base64'),
    'other photograph': (
        lambda f: small_labelme(
            f,
            BOX,
            imagePath='b.png',
            imageWidth=50,
            imageData=base64.b64encode(cv2.imencode('.png', np.zeros((30, 40), np.uint8))[1]).decode(),
        ),
        'is 50x30',
        '40x30',
    ),
}
COLORS_REFUSED = {
    'unknown colour': (_labelmap('background:0,0,0::\ncar:1,2,4::'), 'a.png', '(1, 2, 3) at x = 7, y = 3', '4, of 1'),
    'colour twice': (_labelmap('a:1,2,3::\nb:1,2,3::'), 'line 2: line 1 has the same colour'),
    'name twice': (_labelmap('a:1,2,3::\n\na:1,2,4::'), 'line 3: line 1 has the same name'),
    'no colour': (_labelmap('background:0,0,0::\ncar:::'), "line 2: got 'car:::'"),
    'colour of 300': (_labelmap('car:300,0,0::'), 'line 1', '0..255'),
    'no line': (_labelmap('# label:color_rgb:parts:actions\n'), 'holds no class'),
    'no table': (lambda f: f.mkdir(), 'labelmap.txt does not exist'),
}
REFUSED = {
    **{name: ('coco', *case) for name, case in COCO_REFUSED.items()},
    **{name: ('labelme', *case) for name, case in LABELME_REFUSED.items()},
    **{name: ('colors', *case) for name, case in COLORS_REFUSED.items()},
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_wrong_is_named_and_nothing_is_written(imported, tmp_path, name):
    kind, write, *messages = REFUSED[name]
    write(tmp_path / 'export')
    code, output = imported(kind)
    assert code == 1 and all(message in output for message in messages) and 'Traceback' not in output, output
    assert not list((tmp_path / 'data').rglob('*.png')) and not (tmp_path / 'data/dataset.yaml').exists()


@pytest.mark.parametrize(
    'flags, message',
    (
        (('--classes', 'car', 'tre'), "'tre': nothing is annotated so; there is tree"),
        (('--novel', 'dog'), "--novel 'dog'"),
        (('--novel', 'car', 'tree'), 'at least one must be a base class'),
        (('--ignore', 'edge'), "--ignore 'edge'"),
        (
            ('--classes', 'car', '--ignore', 'car'),
            "'car' cannot be a class: it is the background, or --ignore names it",
        ),
        (('--novel', 'car', 'car'), "--novel names 'car' twice"),
        (('--classes', 'tree', 'car', 'tree'), "--classes names 'tree' twice"),
        (('--images', 'nowhere'), 'folder nowhere of the photographs does not exist'),
        (('--val-fraction', '1'), 'expected a number of 0..1'),
    ),
)
def test_flags_that_do_not_fit(imported, tmp_path, flags, message):
    small_coco(tmp_path / 'export', CAR, ('tree', [rectangle(9, 9, 12, 12)]))
    code, output = imported('coco', *flags)
    assert code in (1, 2) and message in output and not (tmp_path / 'data/dataset.yaml').exists(), output
