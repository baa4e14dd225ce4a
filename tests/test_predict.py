"""Segmenting photographs without masks."""

import errno
import json
import os
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_RESNET
from PIL import Image

from core.errors import InputError
from core.files import atomic_write
from dataset import DATASETS
from dataset.legend import spread_palette
from dataset.lists import write_ids
from dataset.masks import read_mask
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.described import described_network
from model import build_model


@pytest.fixture
def photographs(shapes, tmp_path):
    """Two images of different formats, and a file that is not an image."""
    first, second = (shapes / 'list' / 'val.txt').read_text().split()[:2]
    folder = tmp_path / 'photographs'
    folder.mkdir()
    (folder / f'{first}.JPG').write_bytes((shapes / f'JPEGImages/{first}.jpg').read_bytes())
    picture = Image.open(shapes / f'JPEGImages/{second}.jpg')
    picture.save(folder / f'{second}.png')
    (folder / 'notes.txt').write_text('no image')
    return folder, first, second


def segment(run_script, checkpoint, folder, to, *flags):
    return run_script(
        'utils/predict.py', '--restore-from', checkpoint, '--images', folder, '--save-path', to, '--base-size', '65,65',
        '--num-workers', 0, *flags,
    )  # fmt: skip


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint of an untrained network, which predicts many classes."""
    torch.manual_seed(0)
    net = build_model('resnet18', 15, 5, 32)
    network = {'backbone': 'resnet18', 'os': 32, 'base_size': [65, 65]}
    config = {'dataset': 'shapes', 'fold': 0, 'shot': 1, 'seed': 123} | network
    save_checkpoint(tmp_path / 'net.pth', net, config, 1, {})
    return tmp_path / 'net.pth'


def test_segments_as_the_evaluation_does(run_script, shapes, untrained, photographs, tmp_path):
    folder, first, second = photographs
    code, output = segment(run_script, untrained, folder, tmp_path / 'out')
    assert code == 0 and '2 of 2 images' in output and 'left out: notes.txt' in output, output
    names = {f'{i}{suffix}' for i in (first, second) for suffix in ('.png', '_overlay.jpg')} | {'legend.svg'}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == names
    code, output = run_script(
        'test.py', *TINY_RESNET, '--data-dir', shapes, '--restore-from', untrained, '--save', '--save-path', tmp_path
    )
    assert code == 0, output
    for image_id in (first, second):
        ours = read_mask(tmp_path / f'out/{image_id}.png')
        np.testing.assert_array_equal(ours, read_mask(tmp_path / f'predictions_123/{image_id}.png'))
        image = np.array(Image.open(shapes / f'JPEGImages/{image_id}.jpg').convert('RGB'))
        overlay = np.array(Image.open(tmp_path / f'out/{image_id}_overlay.jpg'))
        expected = np.where(ours[..., None] > 0, 0.4 * image + 0.6 * spread_palette()[ours], image)
        assert np.abs(overlay - expected).mean() < 12  # JPEG blurs colours at borders
        assert len(np.unique(ours)) > 1


def test_any_name_is_carried_through(run_script, shapes, untrained, tmp_path):
    """Blanks, formulas, glob patterns, both Unicode forms, bytes that are no UTF-8, and the longest name there is."""
    listed = ['IMG 1', '$x_1$ [2]', 'caf\u00e9', 'caf\udce9']
    images, masks = tmp_path / 'data/JPEGImages', tmp_path / 'data/SegmentationClassAug'
    images.mkdir(parents=True)
    masks.mkdir()
    on_disk = ['IMG 1', '$x_1$ [2]', 'cafe\u0301', 'caf\udce9']
    for source, image, mask in zip((shapes / 'list/val.txt').read_text().split(), on_disk, listed, strict=False):
        (images / f'{image}.jpg').write_bytes((shapes / f'JPEGImages/{source}.jpg').read_bytes())
        (masks / f'{mask}.png').write_bytes((shapes / f'SegmentationClassAug/{source}.png').read_bytes())
    for name in ('._IMG 1.jpg', '.DS_Store', '~$caf.png'):
        (images / name).write_bytes(b'\0\5\x16\7')
    (images / 'damaged.jpg').write_bytes((images / 'IMG 1.jpg').read_bytes()[:900])
    (masks / 'damaged.png').write_bytes((masks / 'IMG 1.png').read_bytes())
    for name in ('trainaug.txt', 'val.txt'):
        write_ids(tmp_path / 'data/list' / name, [*listed, 'damaged'])
    code, output = run_script(
        'test.py', *TINY_RESNET, '--data-dir', tmp_path / 'data', '--restore-from', untrained, '--save', '--overlay', 4,
        '--save-path', tmp_path / 'caf\udce9', '--skip-bad-images',
    )  # fmt: skip
    assert code == 0 and 'caf\\udce9/overlay_123' in output, output
    written = tmp_path / 'caf\udce9'
    assert 'Evaluated at 65x65 on 4 of 5 images; 1 could not be read' in (written / 'results.md').read_text()
    result = json.loads((written / 'results.json').read_text())['seeds']['123']
    assert (result['images'], result['listed_images']) == (4, 5)
    assert {path.name for path in (written / 'predictions_123').iterdir()} == {f'{i}.png' for i in listed}
    assert {path.stem.partition('_')[2] for path in (written / 'overlay_123').iterdir()} == set(listed)

    longest = 'x' * 242  # _overlay.jpg makes it 254
    (images / 'damaged.jpg').unlink()
    (images / f'{longest}.jpg').write_bytes((images / 'IMG 1.jpg').read_bytes())
    code, output = segment(run_script, untrained, images, tmp_path / 'out')
    assert code == 0 and '5 of 5 images' in output, output
    for image_id in [*on_disk, longest]:
        assert (tmp_path / f'out/{image_id}_overlay.jpg').is_file()
    too_long = tmp_path / f'{longest:_>256}'
    with pytest.raises(InputError, match=r'too long\. Choose a shorter name'), atomic_write(too_long):
        pass


def test_a_network_of_stage_1_predicts_base_classes_only(run_script, base_run, photographs, tmp_path):
    folder, first, _ = photographs
    code, output = segment(run_script, base_run / 'best.pth', folder, tmp_path / 'out')
    assert code == 0, output
    assert not set(np.unique(read_mask(tmp_path / f'out/{first}.png'))) & set(range(1, 6))  # novel in fold 0


def test_refuses_what_it_cannot_segment(run_script, few_shot_run, base_run, photographs, tmp_path):
    folder, first, _ = photographs
    for checkpoint, images, message in (
        (few_shot_run, folder, 'means several files'),  # several seeds
        (base_run, tmp_path / 'nothing', 'does not exist'),
        (base_run, few_shot_run, 'holds no image'),
    ):
        code, output = segment(run_script, checkpoint, images, tmp_path / 'out')
        assert code == 1 and message in output, output
    (folder / f'{first}.png').write_bytes((folder / f'{first}.JPG').read_bytes())
    code, output = segment(run_script, base_run, folder, tmp_path / 'out')
    assert code == 1 and 'same name' in output
    assert not (tmp_path / 'out').exists()


def test_takes_one_photograph_and_the_only_seed_of_a_folder(run_script, untrained, photographs, tmp_path):
    folder, first, _ = photographs
    untrained.rename(tmp_path / 'best_123.pth')
    code, output = segment(run_script, tmp_path, folder / f'{first}.JPG', tmp_path / 'out')
    assert code == 0 and '1 of 1 images' in output, output
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        f'{first}.png', f'{first}_overlay.jpg', 'legend.svg'
    }  # fmt: skip
    code, output = segment(run_script, tmp_path, folder / f'{first}.JPG', folder)
    assert code == 2 and 'overwritten' in output


def test_never_writes_over_photographs(run_script, untrained, photographs):
    folder = photographs[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, output = segment(run_script, untrained, folder, folder / '..' / folder.name)
    assert code == 2 and 'overwritten' in output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(('change', 'message'), (
    ({'dataset': 'street'}, "'street' is not built in"),
    ({'fold': 7}, 'fold 7 not supported'),
    ({'backbone': 'vgg'}, "backbone 'vgg' not supported"),
    ({'fold': -1}, '15 base and 5 novel classes; fold -1'),
    (None, 'does not say its backbone, dataset, fold, os'),
))  # fmt: skip
def test_refuses_checkpoints_of_other_classes(untrained, change, message):
    content = torch.load(untrained, weights_only=True)
    content = content['model'] if change is None else content | {'config': content['config'] | change}
    torch.save(content, untrained)
    with pytest.raises(InputError, match=re.escape(message)):
        described_network(read_checkpoint(untrained))


def test_a_checkpoint_says_its_classes_itself(untrained):
    """Whatever has become of its data set."""
    content = torch.load(untrained, weights_only=True)
    classes = DATASETS['shapes'].legend(0).classes
    classes[0][1] = 'coin'
    content['config'] |= {'classes': classes, 'dataset': 'gone'}
    torch.save(content, untrained)
    legend = described_network(read_checkpoint(untrained))[1]
    assert legend.names[1] == 'coin' and legend.classes == classes and legend.num_base == 15
    content['config']['classes'] = classes[:19]
    torch.save(content, untrained)
    with pytest.raises(InputError, match='names 19 classes, but has 15 base and 5 novel ones'):
        described_network(read_checkpoint(untrained))


def test_photographs_are_resized_to_the_size_of_the_training(run_script, untrained, photographs, tmp_path):
    folder, first, _ = photographs
    flags = ('--restore-from', untrained, '--images', folder, '--num-workers', 0, '--save-path')
    for name, more in (('default', ()), ('same', ('--base-size', '65,65')), ('other', ('--base-size', '257,257'))):
        code, output = run_script('utils/predict.py', *flags, tmp_path / name, *more)
        assert code == 0, output
    default, same, other = ((tmp_path / name / f'{first}.png').read_bytes() for name in ('default', 'same', 'other'))
    assert default == same != other


def test_skips_images_that_cannot_be_read(run_script, untrained, photographs, tmp_path):
    folder, first, second = photographs
    (folder / f'{first}.JPG').write_bytes(b'no picture')
    (folder / f'._{second}.jpg').write_bytes(b'what some systems leave beside a file')
    code, output = segment(run_script, untrained, folder, tmp_path / 'out')
    assert code == 1 and 'cannot be decoded' in output and 'Use --skip-bad-images to leave it out' in output
    code, output = segment(run_script, untrained, folder, tmp_path / 'out', '--skip-bad-images')
    assert code == 0 and 'skipped' in output and '1 of 2 images' in output, output
    assert (tmp_path / f'out/{second}.png').is_file() and not (tmp_path / f'out/{first}.png').exists()

    picture = Image.open(folder / f'{second}.png')
    grey = np.array(picture.convert('L'))
    Image.fromarray(grey / np.float32(255)).save(folder / 'depth.tif')
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / 'scan.png')
    (folder / 'lost.jpeg').write_text('<!DOCTYPE html><title>404</title>')
    picture.convert('CMYK').save(folder / 'print.jpg', quality=95)
    code, output = segment(run_script, untrained, folder, tmp_path / 'more', '--skip-bad-images')
    assert code == 0 and '2 of 6 images' in output, output
    for name, reason in (
        ('depth.tif', '32-bit floating-point'), ('scan.png', '16-bit integer'), ('lost.jpeg', 'a web page'),
    ):  # fmt: skip
        assert re.search(f'skipped: image .*{re.escape(name)} .*{reason}', output), output
    differing = read_mask(tmp_path / 'more/print.png') != read_mask(tmp_path / f'more/{second}.png')
    assert differing.mean() < 0.1  # the colours differ a little


@pytest.mark.parametrize(('kind', 'code'), (('png', errno.ENOSPC), ('jpeg', errno.ENOSPC), ('png', errno.EDQUOT)))
def test_a_full_disk_ends_the_command_with_the_name_of_the_file(
    run_script, untrained, photographs, tmp_path, monkeypatch, kind, code
):
    folder, first, _ = photographs
    save = Image.Image.save

    def fail(self, to, **options):
        save(self, to, **options)
        if options['format'] == kind:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image.Image, 'save', fail)
    status, output = segment(run_script, untrained, folder, tmp_path / 'out')
    name = {'png': f'{first}.png', 'jpeg': f'{first}_overlay.jpg'}[kind]
    assert status == 1 and f'no space left to write {tmp_path / "out" / name} ({os.strerror(code)})' in output, output
    left = {path.name for path in (tmp_path / 'out').iterdir()}
    assert left == ({f'{first}.png'} if kind == 'jpeg' else set())


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, 'utils.predict', raising=False)
    monkeypatch.setattr(sys, 'argv', ['predict', '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_module('utils.predict', run_name='__main__', alter_sys=True)
    assert not end.value.code and 'photographs' in capsys.readouterr().out
