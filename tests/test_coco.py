"""COCO's masks: both rasterisers, and the parse script on small hand-made and on real annotations."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_file import NAMES, small_file
from conftest import SHARED
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dataset.annotations.coco import read_instances
from dataset.annotations.outlines import decompress, rasterize, read_outline
from dataset.masks import read_mask


@pytest.fixture
def small_coco(tmp_path):
    """A folder of COCO with the content of `small_file` as both splits."""
    root = tmp_path / 'coco'
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / f'{split}2014').mkdir()
        (root / 'annotations' / f'instances_{split}2014.json').write_text(json.dumps(small_file()))
        for image in small_file()['images']:
            cv2.imwrite(str(root / f'{split}2014' / image['file_name']), np.zeros((30, 40, 3), np.uint8))
    return root


@pytest.fixture
def parse(small_coco, tmp_path, run_script):
    """Run the parse script on `small_coco`."""
    return lambda *flags: run_script(
        'utils/coco_parse_script.py', '--coco-root', small_coco, '--list-dir', tmp_path / 'list', '--workers', 1, *flags
    )


def test_rasterisation_rule():
    square = [2.9, 2.9, 7.9, 2.9, 7.9, 7.9, 2.9, 7.9]  # truncated to 2..7, both ends filled
    far = [20.0, 20.0, 22.0, 20.0, 22.0, 22.0, 20.0, 22.0]
    mask = rasterize(30, 40, [(3, [square, far]), (5, [[6, 6, 9, 6, 9, 9, 6, 9]])])
    expected = np.zeros((30, 40), np.uint8)
    expected[2:8, 2:8] = 3
    expected[20:23, 20:23] = 3
    expected[6:10, 6:10] = 5  # later over earlier
    assert np.array_equal(mask, expected)


def test_run_lengths_of_either_kind_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0.01, 0.5, 0.99, 1):
        for _ in range(20):
            height, width = map(int, rng.integers(1, 90, 2))
            region = (rng.random((height, width)) < density).astype(np.uint8)
            if density == 0.5:  # long runs
                region = cv2.resize(region[:3, :3], (width, height), interpolation=cv2.INTER_NEAREST)
            packed = coco_mask.encode(np.asfortranarray(region))
            runs = decompress(packed['counts'].decode()).tolist()
            for counts in (packed['counts'].decode(), runs):
                outline = read_outline({'size': [height, width], 'counts': counts}, height, width)
                if outline is None:
                    assert not region.any()
                    continue
                for rasterizer in ('opencv', 'coco'):
                    assert np.array_equal(rasterize(height, width, [(4, outline)], rasterizer), region * 4)
            size = {'size': [height, width], 'counts': runs}
            assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(size, height, width)), region)


def test_vertices_a_little_outside_are_cut_off():
    polygon = [-1.5, -2.0, 41.9, -2, 41.9, 31.5, -1.5, 31.5]
    for rasterizer in ('opencv', 'coco'):
        mask = rasterize(30, 40, [(9, read_outline([polygon], 30, 40))], rasterizer)
        assert mask.shape == (30, 40) and (mask == 9).all()
    line = [5, 5, 5, 5, 9, 5, 9, 5]  # of no area, as there are in COCO's own files
    assert (rasterize(30, 40, [(2, read_outline([line], 30, 40))]) == 2).sum() == 5


def test_real_annotations_by_both_rasterisers():
    """Masks are bit for bit those of the documented rule, and those of pycocotools."""
    annotations = SHARED / 'data/coco-mini/annotations/instances_val2014.json'
    if not annotations.is_file():
        pytest.skip(f'{annotations} is not there: real annotations are not part of the project')
    coco = COCO(str(annotations))
    position = {category['id']: i for i, category in enumerate(coco.dataset['categories'], 1)}
    instances = read_instances(annotations)
    class_ids = instances.class_ids(NAMES)
    assert [class_ids[category['name']] for category in coco.dataset['categories']] == list(range(1, 81))
    for image in coco.dataset['images']:
        own = [a for a in coco.dataset['annotations'] if a['image_id'] == image['id'] and not a['iscrowd']]
        read = instances.images[image['file_name'].removesuffix('.jpg')]
        assert [instance.number for instance in read.instances] == [annotation['id'] for annotation in own]
        exact, plain = np.zeros((2, image['height'], image['width']), np.uint8)
        for annotation in own:
            exact[coco.annToMask(annotation).astype(bool)] = position[annotation['category_id']]
            for polygon in annotation['segmentation']:
                points = np.array(
                    [[int(x), int(y)] for x, y in zip(polygon[::2], polygon[1::2], strict=True)], np.int32
                )
                cv2.fillPoly(plain, [points], position[annotation['category_id']])
        drawn = [(class_ids[instance.category], instance.outline) for instance in read.instances]
        assert np.array_equal(rasterize(read.height, read.width, drawn, 'coco'), exact)
        assert np.array_equal(rasterize(read.height, read.width, drawn, 'opencv'), plain)


def test_masks_and_lists(parse, small_coco, tmp_path):
    code, output = parse()
    assert code == 0, output
    for split in ('train', 'val'):
        masks = {path.stem: read_mask(path) for path in (small_coco / f'{split}_no_crowd').glob('*.png')}
        assert {stem: np.unique(mask).tolist() for stem, mask in masks.items()} == {'12': [0, 80], '7': [0, 17]}
        assert (masks['7'] == 17).sum() == 121
        assert (tmp_path / 'list' / f'{split}.txt').read_text() == '12\n7\n'
    assert '2 images without objects' in output and 'annotations left out: 2 crowd (annotation 502 of image 3' in output


def test_names_with_folders_of_any_system_find_their_photographs(parse, small_coco, tmp_path):
    names = {12: 'train2014\\sub\\12.jpg', 3: './3.jpg', 7: 'C:\\data\\7.jpg', 9: '/data/9.jpg'}
    content = small_file()
    for image in content['images']:
        image['file_name'] = names[image['id']]
    (small_coco / 'annotations/instances_train2014.json').write_text(json.dumps(content))
    code, output = parse('--split', 'train')
    assert code == 0 and (tmp_path / 'list/train.txt').read_text() == '12\n7\n', output


@pytest.mark.parametrize('rasterizer', ('opencv', 'coco'))
def test_nothing_is_written_if_something_is_wrong(parse, small_coco, tmp_path, rasterizer):
    path, photograph = small_coco / 'annotations/instances_val2014.json', small_coco / 'val2014/7.jpg'
    whole = photograph.read_bytes()

    def refused(*messages):
        code, output = parse('--rasterizer', rasterizer)
        assert code == 1 and all(message in output for message in messages) and 'Traceback' not in output, output
        assert not list(small_coco.glob('*_no_crowd/*')) and not (tmp_path / 'list').exists()

    photograph.unlink()
    refused('1 of 2 annotated images are missing', '7.jpg', 'val2014.zip')
    cv2.imwrite(str(photograph), np.zeros((40, 30, 3), np.uint8))
    refused(f'the size of image 7 (7.jpg) in {path} is 40x30, its image {photograph} is 30x40', '1 of 2')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 30)).save(photograph, exif=exif)
    refused(f'{photograph} is 30x40', 'EXIF orientation')
    photograph.write_bytes(whole[:20])
    refused(str(photograph))
    photograph.write_bytes(whole)
    content = small_file()
    content['categories'][-17]['name'] = 'hound'
    path.write_text(json.dumps(content))
    refused(str(path), "'hound'", "'dog'")
    content = small_file()
    content['images'][0]['file_name'] = '12.jpg.jpg'
    path.write_text(json.dumps(content))
    refused('val.txt', "cannot hold '12.jpg'")
    content = small_file()
    content['annotations'][-1]['segmentation'] = [[1, 2, 3, 4, 5]]
    path.write_text(json.dumps(content))
    refused(str(path), 'annotation 504 of image 7')
    path.unlink()
    refused(f'{path} does not exist', 'annotations_trainval2014.zip')


def test_masks_beside_data_that_is_read_only(parse, small_coco, tmp_path, run_script):
    before = sorted(small_coco.rglob('*'))
    root = tmp_path / 'masks'
    for _ in range(2):  # the second time, everything is there
        code, output = parse('--mask-root', root)
        assert code == 0, output
    assert sorted(small_coco.rglob('*')) == before
    assert sorted(path.name for path in (root / 'train_no_crowd').iterdir()) == ['12.png', '7.png']
    assert (root / 'val2014').samefile(small_coco / 'val2014')
    lists = ('--train-list', tmp_path / 'list/train.txt', '--workers', 1)
    code, output = run_script('utils/check_data.py', '--dataset', 'coco', '--data-dir', root, *lists)
    assert '2 training and 2 evaluation images' in output and 'train 12' not in output, output
    # the folder of the data itself is as good as none
    code, output = parse('--mask-root', small_coco)
    assert code == 0 and (small_coco / 'val_no_crowd/7.png').is_file()


def test_where_masks_cannot_go_is_told(parse, small_coco, tmp_path):
    (small_coco / 'train_no_crowd').write_text('in the way')
    code, output = parse()
    assert code == 1 and 'cannot write' in output and '--mask-root' in output, output
    other = tmp_path / 'other'
    (other / 'train2014').mkdir(parents=True)
    code, output = parse('--mask-root', other)
    assert code == 1 and f'{other / "train2014"} exists and is no link' in output, output
    code, output = parse('--mask-root', Path('/proc/1'))
    assert code == 1 and 'cannot link' in output and '--mask-root' in output, output
