"""Classes of one's own: what is read, what is learned from it, the memory, and the commands."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from core.errors import InputError
from dataset.masks import read_binary_mask, read_mask
from dataset.own_classes import (
    SupportImage,
    SupportSamples,
    doubts,
    find_support,
    read_support,
    support_positions,
)
from engine import teaching
from utils import teach as teach_command

FAST = ('--steps', 3, '--views', 4)


@pytest.fixture
def photographs(shapes, tmp_path):
    """Fold 0's novel classes 1 and 2 under names of one's own: three JPEGs, and a PNG with its mask."""
    ids = (shapes / 'list/trainaug.txt').read_text().split()
    folder = tmp_path / 'photographs'
    (folder / 'scooter').mkdir(parents=True)
    (folder / 'bin').mkdir()
    for image_id in ids[0:60:20]:  # the first classes of the images take turns
        shutil.copy(shapes / f'JPEGImages/{image_id}.jpg', folder / 'scooter')
        shown = read_mask(shapes / f'SegmentationClassAug/{image_id}.png') == 1
        Image.fromarray(shown).save(folder / f'scooter/{image_id}.png')  # of one bit
    image_id = ids[1]
    Image.open(shapes / f'JPEGImages/{image_id}.jpg').save(folder / 'bin/photo.png')
    shown = read_mask(shapes / f'SegmentationClassAug/{image_id}.png') == 2
    Image.fromarray((shown * 7).astype(np.uint8)).save(folder / 'bin/photo_mask.png')
    (folder / 'notes.txt').write_text('no photograph')
    (folder / 'bin/.DS_Store').write_bytes(b'\0')
    return folder


@pytest.fixture
def teach(run_script, tmp_path):
    """Run utils.teach with few steps; returns (exit code, output, folder)."""

    def run(source, out, *flags):
        out = tmp_path / out
        code, output = run_script(
            'utils/teach.py', '--restore-from', source, '--out', out, '--device', 'cpu', *FAST, *flags
        )
        return code, output, out

    return run


def checkpoint(folder):
    return torch.load(folder / 'best.pth', weights_only=True)


def test_teaches_again_and_again_and_forgets(teach, run_script, shapes, remembered, photographs, tmp_path, monkeypatch):
    code, output, first = teach(remembered, 'first', '--support', photographs)
    assert code == 0 and 'left out: notes.txt' in output and 'base mIoU on the ' in output, output
    assert f'python -m utils.predict --restore-from {first} ' in output
    assert {path.name for path in first.iterdir()} == {'best.pth', 'memory.pt', 'teach.json', 'panels'}
    assert {path.name for path in (first / 'panels').iterdir()} == {'scooter.png', 'bin.png'}
    told = json.loads((first / 'teach.json').read_text())['classes']
    assert {name: (each['photographs'], each['class_id']) for name, each in told.items()} == {
        'bin': (1, 21), 'scooter': (3, 22)
    }  # fmt: skip
    assert told['bin']['left_out_iou'] is None and 0 <= told['scooter']['left_out_iou'] <= 100
    before, taught = checkpoint(remembered), checkpoint(first)
    assert taught['config']['classes'] == [*before['config']['classes'][:15], [21, 'bin'], [22, 'scooter']]
    assert all(torch.equal(value, taught['model'][key]) for key, value in before['model'].items())
    assert taught['config']['scale_range'] == before['config']['scale_range']  # for --slide

    code, output = run_script(
        'utils/predict.py', '--restore-from', first, '--images', next(photographs.glob('scooter/*.jpg')), '--save-path',
        tmp_path / 'segmented', '--num-workers', 0,
    )  # fmt: skip
    assert code == 0 and 'scooter' in (tmp_path / 'segmented/legend.svg').read_text(), output
    code, output = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', first)
    assert code == 1 and 'was taught bin, scooter, no class of' in output and 'utils.predict' in output, output

    (photographs / 'scooter').rename(tmp_path / 'aside')
    (photographs / 'bin').rename(photographs / 'lamp')
    starts, learn = [], teaching.learn
    monkeypatch.setattr(
        teaching, 'learn', lambda net, *rest: starts.append(net.novel_emb.detach().clone()) or learn(net, *rest)
    )
    code, output, second = teach(first, 'second', '--support', photographs, '--forget', 'bin')
    assert code == 0, output
    monkeypatch.undo()
    assert torch.equal(starts[0][0], taught['model']['novel_emb'][1]) and len(starts) == 1 + 3
    # no earlier lesson has seen what is left out
    channels = before['model']['base_emb'].shape[1]
    assert starts[0][0, channels:].any() and not any(start[:, channels:].any() for start in starts[1:])
    taught, again = taught['model'], checkpoint(second)
    assert again['config']['classes'][15:] == [[22, 'scooter'], [23, 'lamp']]
    told = json.loads((second / 'teach.json').read_text())['classes']
    assert {name: (each['photographs'], each['new']) for name, each in told.items()} == {
        'scooter': (3, False), 'lamp': (1, True)
    }  # fmt: skip
    start, now = taught['novel_emb'][1], again['model']['novel_emb'][0]
    assert 0 < (start - now).norm() < 0.5 * start.norm()  # trained on, from where it was

    code, output, third = teach(second, 'third', '--forget', 'scooter')
    assert code == 0, output
    left = checkpoint(third)['model']
    for key, value in again['model'].items():
        assert torch.equal(left[key], value[1:] if key in ('novel_emb', 'novel_offset') else value), key
    code, output, _ = teach(third, 'fourth', '--forget', 'lamp')
    assert code == 1 and 'nothing is left but the base network' in output
    code, output, _ = teach(third, 'fourth', '--forget', 'scooter')
    assert code == 1 and 'was taught lamp' in output


def test_stopped_while_photographs_are_left_out_the_network_is_complete(
    teach, remembered, photographs, tmp_path, monkeypatch
):
    (tmp_path / 'out/panels').mkdir(parents=True)
    for name in ('best.pth', 'teach.json', 'panels/cat.png'):  # of an earlier network
        (tmp_path / 'out' / name).write_text('')

    def stopped(teacher):
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching.Teacher, 'left_out', stopped)
    code, output, folder = teach(remembered, 'out', '--support', photographs, '--overwrite')
    assert code == 130 and f'{folder / "best.pth"} is complete; only what to expect' in output, output
    assert {path.name for path in folder.rglob('*') if path.is_file()} == {'best.pth', 'memory.pt'}
    assert checkpoint(folder)['config']['taught'] == {'bin': 1, 'scooter': 3}


def test_of_one_photograph_each_discriminants_count(teach, remembered, photographs, tmp_path):
    _, *others = sorted((photographs / 'scooter').glob('*.jpg'))
    (tmp_path / 'more').mkdir()
    for path in others:
        for part in (path, path.with_suffix('.png')):
            part.rename(tmp_path / 'more' / part.name)

    def taught(source, out, *flags):
        code, output, folder = teach(source, out, *flags, '--no-leave-out')
        assert code == 0, output
        state = checkpoint(folder)
        return folder, state['config']['options']['discriminants'], state['model'].get('discriminants.weight')

    first, choice, weight = taught(remembered, 'first', '--support', photographs)
    assert choice == 'added' and weight.shape[0] == 1 + 15 + 2 and weight.abs().sum(dim=1).all()
    second, choice, left = taught(first, 'second', '--forget', 'bin')
    assert choice == 'added' and torch.equal(left, weight[[*range(16), 17]])
    (photographs / 'scooter').rename(tmp_path / 'aside')
    third, choice, again = taught(second, 'third', '--support', photographs)  # the bin again, now the last class
    assert choice == 'added' and torch.allclose(again, weight[[*range(16), 17, 16]], rtol=1e-4, atol=1e-5)
    (tmp_path / 'more').rename(photographs / 'lamp')
    shutil.rmtree(photographs / 'bin')
    assert taught(third, 'fourth', '--support', photographs)[1:] == ('none', None)


def test_the_same_seed_gives_the_same_weights_from_memory_and_from_data(
    teach, run_script, shapes, remembered, base_run, photographs, tmp_path
):
    runs = {}
    data = ('--data-dir', shapes, '--memory-mb', 1)
    for name, flags in (('a', ()), ('b', data), ('c', ('--seed', 5))):
        code, output, out = teach(remembered, name, '--support', photographs, '--no-leave-out', *flags)
        assert code == 0, output
        runs[name] = checkpoint(out)['model']
    assert all(torch.equal(runs['a'][key], runs['b'][key]) for key in runs['a'])
    assert not torch.equal(runs['a']['novel_emb'], runs['c']['novel_emb'])

    small, whole = (torch.load(folder / 'memory.pt', weights_only=True) for folder in (remembered, base_run))
    assert small['network'] == whole['network'] and (remembered / 'memory.pt').stat().st_size < 1.2e6
    assert len(whole['rows']) == 15 * 20 > len(small['rows']) == 15 * (len(small['rows']) // 15) > 0
    code, output = run_script(
        'utils/memory.py', '--restore-from', remembered, *data[:2], '--memory-mb', 0.01, '--out', tmp_path / 'memory.pt'
    )
    assert code == 1 and 'take --memory-mb 1' in output


def test_classes_of_the_data_set_are_evaluated(teach, run_script, shapes, remembered, photographs):
    (photographs / 'scooter').rename(photographs / 'plain disc')
    shutil.rmtree(photographs / 'bin')
    code, output, out = teach(remembered, 'out', '--support', photographs, '--no-leave-out')
    assert code == 0 and checkpoint(out)['config']['classes'][15:] == [[1, 'plain disc']], output
    code, output = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', out)
    assert code == 0 and 'pinstriped disc, striped disc' in output and 'are background' in output, output
    assert 'shapes fold 0, support images chosen by hand' in output
    confusion = np.load(out / 'confusion_123.npy')
    masks = [read_mask(shapes / f'SegmentationClassAug/{i}.png') for i in (shapes / 'list/val.txt').read_text().split()]
    counts = sum(np.bincount(mask.flatten(), minlength=256) for mask in masks)
    assert confusion.sum(axis=1).tolist() == [counts[0] + counts[2:6].sum(), *counts[6:21], counts[1]]


def save(path, *size, value=200, mode='L', **options):
    Image.new(mode, size, value).save(path, **options)


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 20)).save(folder / 'scooter/turned.jpg', exif=exif)
    save(folder / 'scooter/turned.png', 40, 20)


def tiny_object(folder):
    Image.new('RGB', (4000, 3000)).save(folder / 'scooter/large.jpg')
    mask = Image.new('L', (4000, 3000))
    mask.putpixel((1, 1), 255)
    mask.save(folder / 'scooter/large.png')


MISTAKES = (
    ('photograph .*new.jpg has no mask; expected .*new.png or', lambda f: save(f / 'scooter/new.jpg', 40, 20)),
    ('new.png is alone', lambda f: save(f / 'scooter/new.png', 40, 20)),
    ('mask .*photo_mask.png is empty', lambda f: save(f / 'bin/photo_mask.png', *Image.open(f / 'bin/photo.png').size,
                                                      value=0)),
    ('photo_mask.png is 40x20, its image .*photo.png is', lambda f: save(f / 'bin/photo_mask.png', 40, 20)),
    ('displayed rotated by 90 degrees', turned),
    ('1 pixels, of which none is left', tiny_object),
    ('photo.png cannot be decoded: .*web page', lambda f: (f / 'bin/photo.png').write_text('<html>404')),
    ('photo_mask.png is a JPEG file', lambda f: save(f / 'bin/photo_mask.png', 9, 9, format='JPEG')),
    ('differ by their suffix only', lambda f: save(f / 'bin/photo.webp', 9, 9)),
    ('photo_mask.png has no pixel that is zero', lambda f: save(f / 'bin/photo_mask.png',
                                                                *Image.open(f / 'bin/photo.png').size, value=1)),
    ('holds no photograph', lambda f: (f / 'empty').mkdir()),
    ('holds no folder of a class, but photo.jpg', lambda f: [shutil.rmtree(f), f.mkdir(), save(f / 'photo.jpg', 9, 9)]),
    ('No such file or directory; expected FOLDER/CLASS/IMG.jpg', shutil.rmtree),
)  # fmt: skip


@pytest.mark.parametrize(('message', 'mistake'), MISTAKES)
def test_mistakes_are_named(photographs, message, mistake):
    mistake(photographs)
    with pytest.raises(InputError, match=message):
        for pairs in find_support(photographs)[0].values():
            for pair in pairs:
                read_support(*pair, (65, 65))


def test_the_folder_of_the_network_is_not_written_to(tmp_path, capsys):
    (tmp_path / 'base').mkdir()
    for source, out in ((tmp_path / 'base', tmp_path / 'base'), (tmp_path / 'base/best.pth', tmp_path / 'base')):
        with pytest.raises(SystemExit):
            teach_command.parse_args(['--restore-from', str(source), '--out', str(out), '--support', 'photographs'])
        assert 'is the folder of --restore-from' in capsys.readouterr().err
    teach_command.parse_args(
        ['--restore-from', str(tmp_path / 'base'), '--out', str(tmp_path), '--support', 'photographs']
    )


def test_nothing_is_written_where_something_is_wrong(photographs, teach, remembered):
    (photographs / 'bin').rename(photographs / 'Pinstriped Star')
    code, output, out = teach(remembered, 'out', '--support', photographs)
    assert code == 1 and not out.exists()
    assert "'Pinstriped Star': the network has the class 'pinstriped star' already; rename it" in output


def test_what_looks_like_a_mistake_is_said():
    image = np.zeros((10, 10, 3), np.uint8)
    small, large = np.zeros((10, 10), np.uint8), np.ones((10, 10), np.uint8)
    small[0], large[0, 0] = 1, 0
    around = np.ones((10, 10), np.uint8)
    around[2:8, 2:8] = 0
    support = {
        'dotted dics': [SupportImage('a.jpg', image, small, [1, 15, 255])],
        'lamp': [SupportImage('b.jpg', image, large, [7]), SupportImage('c.jpg', image, around, range(1, 200))],
    }
    assert doubts(support, ['dotted disc', 'lamp']) == [
        "'dotted dics' is a class of its own; the data set has 'dotted disc'",
        'the mask of dotted dics/a.jpg has the values 1, 15, 255; all of them count as dotted dics',
        'the mask of lamp/b.jpg covers 99% of the photograph: is it inverted?',
        "the mask of lamp/c.jpg covers 100% of the photograph's border: is it inverted?",
    ]
    classes = {'a': {'new': True, 'trained_iou': 3.0}, 'b': {'new': True, 'trained_iou': 60.0}}
    assert [note.split()[0] for note in teach_command.disappointments(classes, 0.5)] == ['a']
    assert 'fell by 9.0 points' in teach_command.disappointments({}, 9.0)[0]


def test_masks_of_any_kind(tmp_path):
    path, shown = tmp_path / 'mask.png', np.zeros((4, 6), bool)
    shown[1:3, 2:5] = True
    grey = shown * np.uint8(1)
    white_first = Image.fromarray(1 - grey)
    white_first.putpalette([0, 0, 0, 255, 255, 255][::-1])  # 0 is white, 1 is black
    transparent = np.stack([np.full((4, 6), 255, np.uint8)] * 3 + [grey * 255], axis=2)
    for picture in (
        Image.fromarray(grey), Image.fromarray(shown), Image.fromarray(grey * 255), white_first.convert('RGB'),
        Image.fromarray(grey.astype(np.uint16) * 256), Image.fromarray(transparent),
        Image.fromarray(grey * 9).convert('LA'),
    ):  # fmt: skip
        picture.save(path)
        assert np.array_equal(read_binary_mask(path)[0], shown), picture.mode
    reordered = Image.fromarray(1 - grey)
    reordered.putpalette([250, 250, 250, 0, 0, 0])
    reordered.save(path)
    assert np.array_equal(read_binary_mask(path)[0], shown)
    Image.fromarray(grey * np.arange(6, dtype=np.uint8)).save(path)
    assert read_binary_mask(path)[1] == [2, 3, 4]
    black = Image.fromarray(grey * np.arange(6, dtype=np.uint8))
    black.putpalette([0, 0, 0] * 4 + [255, 255, 255])
    black.save(path)
    assert read_binary_mask(path)[1] == [4]  # what is black shows nothing


def test_photographs_are_read_as_they_are_displayed(tmp_path):
    """A phone's photograph of 12 megapixels, stored on its side; its mask is as it is displayed."""
    folder = tmp_path / 'support/scooter'
    folder.mkdir(parents=True)
    stored = np.zeros((3000, 4000, 3), np.uint8)
    stored[:1500] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the upper half is displayed on the right
    Image.fromarray(stored).save(folder / 'IMG_1.JPG', exif=exif)
    mask = np.zeros((4000, 3000), np.uint8)
    mask[:, 1500:] = 255
    Image.fromarray(mask).save(folder / 'IMG_1.png')
    classes, _ = find_support(tmp_path / 'support')
    support = read_support(*classes['scooter'][0], (80, 80))
    assert support.image.shape == (80, 60, 3) and support.name == 'IMG_1.JPG'
    assert support.mask[:, 31:].all() and not support.mask[:, :29].any()
    assert (support.image[:, 31:, 0] > 200).all() and (support.image[:, :29, 0] < 50).all()


def images(count):
    return [SupportImage(f'{i}.jpg', np.zeros((4, 4, 3), np.uint8), np.eye(4, dtype=np.uint8)) for i in range(count)]


def test_each_class_has_as_many_views():
    samples = SupportSamples({'a': images(1), 'b': images(3)}, {'a': 16, 'b': 17})
    labels = [samples.label(samples.ids[position]) for position in support_positions(samples, 5)]
    assert labels == [16] * 5 + [17] * 5
    assert support_positions(samples, 2) == [0, 0, 1, 2, 3]  # every image once at least
    assert samples.read('b/2.jpg')[1].tolist() == (17 * np.eye(4, dtype=int)).tolist()
