"""Views of photographs: sliding windows, mirrored views and several scales."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RESNET
from PIL import Image
from torch import nn

from dataset import DATASETS, transforms
from dataset.annotations.coco import read_instances
from dataset.annotations.outlines import rasterize
from dataset.annotations.regions import find_regions, polygon_of
from dataset.masks import read_mask
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.evaluation import visible_logits
from engine.sliding import Axis, Blended, View, Views, WindowLogits, segment_views
from model import Network, build_model
from model.kernels import predict

CPU = torch.device('cpu')
SIZE = (65, 33)


class Small(Network):
    """One convolution, whose features are the logits: fast, and every label wins somewhere."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 9, stride=8, padding=4), nn.Identity(), 2, 2)
        self.backbone.weight.data -= self.backbone.weight.data.mean(dim=(1, 2, 3), keepdim=True)

    def classify(self, maps, constants=None):
        return 5 * maps['features']


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    return Small().eval()


@pytest.fixture(scope='module')
def photograph():
    noise = np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)
    return cv2.resize(noise, (113, 160), interpolation=cv2.INTER_CUBIC)


def views_of(net, photograph, views, batch_size=1):
    with torch.no_grad():
        network = WindowLogits(net, CPU, torch.float32, batch_size)
        return segment_views(network, photograph, views.of(photograph.shape[:2], SIZE))


@pytest.mark.parametrize(('length', 'canvas'), ((1, 1), (7, 7), (8, 7), (7, 70), (100, 7), (100, 33), (56, 33), (9, 1)))
def test_weights_of_windows_sum_to_one_everywhere(length, canvas):
    axis = Axis.over(length, View(1.0, (canvas, canvas), (canvas, canvas), False), 0)
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights.numpy(), strict=True):
        assert weights.min() > 0
        total[start : start + axis.side] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.side == length
    assert max(np.diff(axis.starts), default=0) <= max(2 * canvas // 3, 1)


def plain_probabilities(net, photograph, views):
    """The mean of the views' probabilities, [K, H, W], with a loop over windows that are upsampled one by one."""
    height, width = photograph.shape[:2]
    total = 0
    for view in views.of((height, width), SIZE):
        rows, columns = (Axis.over(photograph.shape[axis], view, axis) for axis in (0, 1))
        logits, weights = torch.zeros(net.num_logits, height, width), torch.zeros(height, width)
        distance = [torch.minimum(torch.arange(n) + 1, n - torch.arange(n)) for n in (rows.side, columns.side)]
        tent = distance[0][:, None] * distance[1]
        for top in rows.starts:
            for left in columns.starts:
                place = np.s_[top : top + rows.side, left : left + columns.side]
                window = cv2.resize(photograph[place], (columns.seen, rows.seen))
                window = np.ascontiguousarray(window[:, ::-1]) if view.mirrored else window
                image, _ = transforms.to_tensors(window, np.zeros(window.shape[:2], np.uint8), view.window)
                scores = F.interpolate(net(image[None]), view.canvas, mode='bilinear', align_corners=True)[0]
                scores = scores[:, : rows.side, : columns.side]
                logits[(slice(None), *place)] += tent * (scores.flip(2) if view.mirrored else scores)
                weights[place] += tent
        total = total + (logits / weights).softmax(dim=0)
    return total / len(views.of((height, width), SIZE))


@pytest.mark.parametrize('views', (
    Views(), Views(flip=True), Views(scales=(0.5, 1.5)), Views(scale=1.0), Views(scale=0.45, flip=True),
    Views(scale=0.6, scales=(0.75, 1.25), flip=True), Views(scale=3.0, scales=(0.1,)),
))  # fmt: skip
def test_views_are_averaged_as_a_plain_loop_over_windows_does(net, photograph, views):
    with torch.no_grad():
        expected = plain_probabilities(net, photograph, views)
    labels, confidence = views_of(net, photograph, views)
    assert labels.dtype == confidence.dtype == torch.uint8
    best, second = expected.topk(2, dim=0).values
    clear = best - second > 1e-4
    assert torch.equal(labels.long()[clear], expected.argmax(dim=0)[clear]) and clear.float().mean() > 0.95
    assert (confidence.float() - 255 * best).abs().max() < 0.6
    assert len(labels.unique()) > 2
    several, their_confidence = views_of(net, photograph, views, batch_size=5)
    assert torch.equal(several[clear], labels[clear])
    assert (their_confidence.int() - confidence.int()).abs().max() <= 1


@pytest.mark.parametrize('shape', ((65, 33), (40, 33), (65, 20), (111, 23), (30, 15)))
def test_a_photograph_that_fits_one_window_is_segmented_as_in_one_pass(net, photograph, shape):
    photograph = np.ascontiguousarray(photograph[: shape[0], : shape[1]])
    resized = transforms.resize_to_fit(photograph, np.zeros(shape, np.uint8), SIZE)
    image, _ = transforms.to_tensors(*resized, SIZE)
    with torch.no_grad():
        canvas = transforms.canvas_of(shape, SIZE)
        logits = visible_logits(net, net.maps(image[None]), net.constants(), canvas, shape)
        expected = predict(logits, canvas, shape)[0]
    for views in (Views(), Views(scale=transforms.fit_factor(shape, SIZE))):
        labels, _ = views_of(net, photograph, views)
        assert (labels == expected).float().mean() > 0.999  # ties
    assert len(expected.unique()) > 1 or min(shape) < 20


def test_only_the_windows_of_the_present_rows_are_in_memory():
    class Flat(nn.Module):
        """Gives zeros, and remembers for how many windows."""

        device, batch_size, windows = CPU, 3, 0

        def forward(self, images, canvas, shape):
            self.windows += len(images)
            return torch.zeros(len(images), 2, 3, 3)

    network = Flat()
    view = View(1.0, (30, 30), (30, 30), False)
    bar = type('Bar', (), {'update': lambda self, count: None})()
    blended = Blended(network, np.zeros((3000, 50, 3), np.uint8), view, bar)
    seen = []
    for top in range(0, 3000, 10):
        assert blended.band(top, top + 10).shape == (2, 10, 50)
        assert len(blended._open) <= 3
        seen.append(network.windows)
    assert seen[0] <= 3 and seen[-1] == len(blended)
    assert max(np.diff(seen)) <= 6


def test_regions_cover_the_labels_once():
    labels = np.random.default_rng(0).choice(np.array([0, 0, 0, 3, 255], np.uint8), (23, 31))
    labels[5:9, 4:11] = 3
    labels[-1] = 7
    labels[9:20, 9:20] = 4
    labels[11:18, 11:18] = 0
    labels[13:15, 13:15] = 4
    for labelled in (labels, np.full((4, 5), 2, np.uint8), np.zeros((4, 5), np.uint8)):
        regions = list(find_regions(labelled))
        for outlines in ([region.counts for region in regions], [[polygon_of(region)] for region in regions]):
            objects = [(region.label, outline) for region, outline in zip(regions, outlines, strict=True)]
            np.testing.assert_array_equal(rasterize(*labelled.shape, objects, 'coco'), labelled)
        assert sum(region.area for region in regions) == np.count_nonzero(labelled)
        for label in np.unique(labelled[labelled > 0]):
            count = cv2.connectedComponents((labelled == label).astype(np.uint8))[0] - 1
            assert sum(region.label == label for region in regions) == count
        for region in regions:
            own = rasterize(*labelled.shape, [(1, region.counts)])
            assert region.area == own.sum() == region.counts[1::2].sum()
            assert region.box == cv2.boundingRect(own)
            assert region.counts[1:].min(initial=1) > 0
            x, y = np.array(polygon_of(region)).reshape(-1, 2).T
            assert (
                region.area == (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
            )  # holes are run round the other way


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of an untrained network for the embedded data, trained at 0.9 to 1.3 times the original size."""
    torch.manual_seed(3)  # predicts many classes
    net = build_model('resnet18', 15, 5, 32)
    for mlp in (net.classifier, net.classifier_n):
        mlp[-1].weight.data *= 1000  # rounding decides nothing
    config = {
        'dataset': 'shapes', 'fold': 0, 'shot': 1, 'seed': 123, 'backbone': 'resnet18', 'os': 32, 'base_size': [65, 65],
        'scale_range': [0.9, 1.3],
    }  # fmt: skip
    save_checkpoint(tmp_path / 'net.pth', net, config, 1, {})
    return tmp_path / 'net.pth'


def test_predictions_of_views_and_their_annotations(run_script, shapes, checkpoint, tmp_path):
    """Both scripts, the default scale, confidences, and COCO annotations that give back the masks."""
    folder = tmp_path / 'photographs'
    folder.mkdir()
    ids = (shapes / 'list/val.txt').read_text().split()[:2]
    for image_id, suffix in zip(ids, ('.PNG', '.tiff'), strict=True):
        Image.open(shapes / f'JPEGImages/{image_id}.jpg').save(folder / f'{image_id}{suffix}')
    flags = ('--restore-from', checkpoint, '--images', folder, '--num-workers', 1, '--slide', '--flip')
    for name, *more in (
        ('all', '--probabilities', '--format', 'coco'),
        ('same', '--scale', 1.1, '--test-batch-size', 4, '--format', 'coco-polygons'),
        ('other', '--scale', 0.8, '--scales', '0.5,1'),
    ):
        code, output = run_script('utils/predict.py', *flags, '--save-path', tmp_path / name, *more)
        assert code == 0 and '2 of 2 images' in output, output
    code, output = run_script(
        'test.py', *TINY_RESNET, '--data-dir', shapes, '--restore-from', checkpoint, '--save', '--slide', '--flip',
        '--save-path', tmp_path, '--overlay', 1,
    )  # fmt: skip
    assert code == 0 and 'Views: windows at scale 1.1, mirrored too.' in output, output
    assert json.loads((tmp_path / 'results.json').read_text())['seeds']['123']['views'].startswith('windows')
    assert len(list((tmp_path / 'overlay_123').iterdir())) == 1

    Image.open(folder / f'{ids[0]}.PNG').save(folder / f'{ids[0]}_confidence.bmp')
    code, output = run_script('utils/predict.py', *flags, '--save-path', tmp_path / 'clash', '--probabilities')
    assert code == 1 and f'also a photograph {ids[0]}_confidence' in output, output
    masks = {image_id: read_mask(tmp_path / f'all/{image_id}.png') for image_id in ids}
    written = [read_instances(tmp_path / f'{name}/instances.json') for name in ('all', 'same')]
    class_of = {name: class_id for class_id, name in DATASETS['shapes'].legend(0).classes}
    for image_id, mask in masks.items():
        for instances in written:
            assert set(instances.images) == set(ids) and set(instances.categories) == set(class_of)
            image = instances.images[image_id]
            assert (folder / image.file_name).is_file() and (image.height, image.width) == mask.shape
            objects = [(class_of[instance.category], instance.outline) for instance in image.instances]
            np.testing.assert_array_equal(rasterize(*mask.shape, objects, 'coco'), mask)
            assert len(np.unique(mask)) > 1 and len(objects) > 1
        np.testing.assert_array_equal(read_mask(tmp_path / f'same/{image_id}.png'), mask)
        np.testing.assert_array_equal(read_mask(tmp_path / f'predictions_123/{image_id}.png'), mask)
        assert (read_mask(tmp_path / f'other/{image_id}.png') != mask).any()
        confidence = np.array(Image.open(tmp_path / f'all/{image_id}_confidence.png'))
        assert confidence.shape == mask.shape and confidence.min() >= 255 // 21 and len(np.unique(confidence)) > 1


def test_checkpoints_say_their_scale_and_what_happens_without(run_script, shapes, base_run, checkpoint, tmp_path):
    assert read_checkpoint(base_run / 'best.pth').config['scale_range'] == [0.9, 1.1]
    content = torch.load(checkpoint, weights_only=True)
    del content['config']['scale_range']
    torch.save(content, checkpoint)
    image_id = (shapes / 'list/val.txt').read_text().split()[0]
    flags = (
        'utils/predict.py', '--restore-from', checkpoint, '--images', shapes / f'JPEGImages/{image_id}.jpg',
        '--save-path', tmp_path / 'out',
    )  # fmt: skip
    code, output = run_script(*flags, '--slide')
    assert code == 0 and re.search(r'note: .* does not say .* takes 1, the middle', output), output
    content['config'] |= {'dataset': 'gone', 'classes': DATASETS['shapes'].legend(0).classes}
    torch.save(content, checkpoint)
    code, output = run_script(*flags, '--slide')
    assert code == 1 and 'Give --scale' in output, output
    for wrong, message in (
        (('--scale', 1), '--scale needs --slide'), (('--scales', '1,0'), 'different factors > 0'),
        (('--slide', '--scale', '0.5,1'), 'expected one factor'), (('--slide', '--scale', 'inf'), 'factors > 0'),
    ):  # fmt: skip
        code, output = run_script(*flags, *wrong)
        assert code == 2 and message in output, output
