"""Networks exported to files that are used without this code."""

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock

from core.errors import InputError
from dataset.masks import read_mask
from dataset.shapes import draw_scene
from dataset.transforms import IMAGENET_MEAN, IMAGENET_STD, resize_to_fit, to_tensors
from engine import export
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.described import described_network
from model import BACKBONES, build_model
from model.backbones import ResNet
from model.discriminants import Discriminants
from model.reference import upsample

SIZE = (65, 65)


def save_network(folder, backbone, num_novel, model='pspnet_pop', options=None):
    """A checkpoint of an untrained network, whose batch normalisations and discriminants do something."""
    torch.manual_seed(0)
    net = build_model(backbone, 15, num_novel, 32, model, options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, Discriminants):
            nn.init.normal_(module.weight)
    config = {'dataset': 'shapes', 'fold': 0, 'backbone': backbone, 'os': 32, 'base_size': SIZE, 'model': model}
    config['options'] = net.options
    save_checkpoint(folder / 'net.pth', net, config, 1, {})
    return folder / 'net.pth'


@pytest.fixture(autouse=True)
def resnet10(monkeypatch):
    """A backbone with one block per layer: tracing takes time for every operation."""
    monkeypatch.setitem(BACKBONES, 'resnet10', lambda: ResNet(BasicBlock, (1, 1, 1, 1)))


@pytest.fixture
def photographs(tmp_path):
    """Photographs of different shapes; one is stored on its side."""
    folder = tmp_path / 'photographs'
    folder.mkdir()
    for i in range(3):
        picture = Image.fromarray(draw_scene(np.random.default_rng(i), i + 1)[0]).resize((90 + 30 * i, 120))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1
        picture.save(folder / f'{i}.jpg', exif=exif)
    return folder


def test_the_documented_example_gives_the_labels_of_utils_predict(run_script, photographs, tmp_path, monkeypatch):
    for name in export.OPTIONAL:
        pytest.importorskip(name, reason=f'{name} is not installed (requirements-export.txt)')
    net = save_network(tmp_path, 'resnet10', 5)
    command = ('utils/export.py', '--restore-from', net, '--input', 'float', '--output', 'logits')
    code, output = run_script(*command, '--check', photographs)
    assert code == 0 and 'onnxruntime compared with this code on 3 of 3 photographs' in output, output
    assert '15 base and 5 novel classes, float 65x65 to logits' in output and (tmp_path / 'net.onnx').is_file()
    code, output = run_script(*command)
    assert code == 1 and 'net.onnx exists' in output
    code, output = run_script(
        'utils/predict.py', '--restore-from', net, '--images', photographs, '--save-path', tmp_path / 'out',
        '--num-workers', 0,
    )  # fmt: skip
    assert code == 0, output

    example = re.search(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for path in sorted(photographs.iterdir()):
        Path('photograph.jpg').write_bytes(path.read_bytes())
        variables = {}
        exec(example, variables)
        metadata = {key: json.loads(text) for key, text in
                    variables['session'].get_modelmeta().custom_metadata_map.items()}  # fmt: skip
        scores = variables['taps'][0] @ variables['logits'] @ variables['taps'][1].T
        predicted = read_mask(tmp_path / f'out/{path.stem}.png')
        theirs = np.array([metadata['class_ids'].index(class_id) for class_id in range(21)])[predicted]
        gap = scores.max(axis=0) - np.take_along_axis(scores, theirs[None], 0)[0]
        assert gap.max() <= export.TOLERANCE * np.abs(scores).max() and len(np.unique(predicted)) > 1
        assert (variables['labels'] == theirs).mean() > 0.999
    legend = described_network(read_checkpoint(net))[1]
    assert metadata['names'] == list(legend.names) and metadata['novel_labels'] == list(legend.novel_labels)
    np.testing.assert_array_equal(metadata['colors'], legend.colors[:21])
    nodes = importlib.import_module('onnx').load('net.onnx').graph.node
    assert {node.domain for node in nodes} == {''} and 'BatchNormalization' not in {node.op_type for node in nodes}


@pytest.mark.parametrize(
    ('model', 'options'),
    (('pspnet_joint', {'discriminants': 'added'}), pytest.param('pspnet_lda', None, marks=pytest.mark.slow)),
)
def test_a_torch_program_needs_nothing_of_this_code(run_script, tmp_path, monkeypatch, model, options):
    net = save_network(tmp_path, 'resnet10', 5, model, options)
    code, output = run_script('utils/export.py', '--restore-from', net, '--format', 'torch')
    assert code == 0 and 'on generated pictures (--check FOLDER: on photographs): labels differ at' in output, output
    assert str(ROOT).encode() not in (tmp_path / 'net.pt2').read_bytes()
    pixels = np.stack([export.canvas(draw_scene(np.random.default_rng(9), 3)[0], SIZE, torch.uint8)] * 3)
    network, legend = described_network(read_checkpoint(net))
    compared = export.Agreement()
    with monkeypatch.context() as without:
        for package in ('core', 'dataset', 'engine', 'model', 'report', 'utils'):
            for name in [package, *(name for name in sys.modules if name.startswith(f'{package}.'))]:
                without.setitem(sys.modules, name, None)  # an import raises ImportError
        extra = {export.METADATA: ''}
        program = torch.export.load(tmp_path / 'net.pt2', extra_files=extra)
        labels = program.module()(torch.from_numpy(pixels))
    assert json.loads(extra[export.METADATA])['names'] == list(legend.names) and labels.dtype == torch.uint8
    images = torch.from_numpy(pixels).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        normalised = torch.stack([to_tensors(image, image[..., 0], SIZE)[0] for image in images])
        compared.add(upsample(network.eval()(normalised), SIZE), labels)
    assert compared.holds and compared.images == 3, compared


def test_a_network_that_differs_is_not_written(run_script, photographs, tmp_path, monkeypatch):
    """By one pixel: its label is another one, or its logits are, or no numbers."""
    net = save_network(tmp_path, 'mobilenet_v2', 5)
    network, _ = described_network(read_checkpoint(net))
    image = draw_scene(np.random.default_rng(0), 1)[0]
    inference = export.InferenceNetwork(network, read_checkpoint(net).config, SIZE, labels=True)

    def changed(change, pixels):
        output = inference(torch.from_numpy(pixels)).numpy()
        output[-1, ..., -1, -1] = change(output[-1, ..., -1, -1])
        return output

    right, wrong = partial(changed, lambda label: label), partial(changed, lambda label: (label + 1) % 21)
    assert export.compare(right, network, [image] * 2, SIZE, torch.uint8).holds
    assert not export.compare(wrong, network, [image] * 2, SIZE, torch.uint8).holds
    inference.labels = False
    assert export.compare(right, network, [image], SIZE, torch.float32).holds
    for change in (lambda logits: logits + 0.1, lambda logits: np.nan * logits):
        assert not export.compare(partial(changed, change), network, [image], SIZE, torch.float32).holds
    inference.labels = True
    monkeypatch.setitem(export.FORMATS, 'torch', lambda *_: (b'content', wrong))
    code, output = run_script(
        'utils/export.py', '--restore-from', net, '--format', 'torch', '--check', photographs / '0.jpg'
    )
    assert code == 1 and 'net.pt2 has not been written' in output and not (tmp_path / 'net.pt2').exists(), output


def test_an_image_is_fitted_as_in_an_evaluation():
    image = draw_scene(np.random.default_rng(0), 1)[0][:, :70]
    small, mask = resize_to_fit(image, image[..., 0], SIZE)
    expected = to_tensors(small, mask, SIZE)[0]
    pixels = export.canvas(image, SIZE, torch.float32).transpose(1, 2, 0)
    np.testing.assert_array_equal((pixels - IMAGENET_MEAN) / IMAGENET_STD, expected.permute(1, 2, 0))
    rounded = export.canvas(image, SIZE, torch.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(rounded[: small.shape[0], : small.shape[1]], small)
    np.testing.assert_array_equal(rounded[:, -1], [(124, 116, 104)] * 65)


def test_says_what_it_needs(run_script, tmp_path, monkeypatch):
    net = save_network(tmp_path, 'resnet10', 0)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    code, output = run_script('utils/export.py', '--restore-from', net)
    assert code == 1 and output.count('\n') == 1 and 'pip install -r requirements-export.txt' in output, output
    code, output = run_script('utils/export.py', '--restore-from', net, '--out', 'net.pt2')
    assert code == 2 and 'ends with .onnx' in output
    network, _ = described_network(read_checkpoint(net))
    network.POSITIONWISE = False
    with pytest.raises(InputError, match='POP cannot be exported'):
        export.InferenceNetwork(network, {}, SIZE, labels=True)
