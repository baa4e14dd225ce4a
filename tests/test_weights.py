"""Weights of others: wrappers, formats, objects beside the weights, and files that are none. Ours, written alone."""

import argparse
import contextlib
import gzip
import io
import pathlib
import pickle
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from core.errors import InputError
from engine.checkpoint import read_checkpoint, read_state
from engine.placeholders import extract
from engine.weights import read_content
from model import build_model

WEIGHTS = {'base_emb': torch.arange(8.0).view(2, 4), 'backbone.conv1.weight': torch.ones(2, 3)}


def equal_weights(checkpoint, expected=WEIGHTS):
    assert checkpoint.state.keys() == expected.keys()
    return all(torch.equal(checkpoint.state[key], value) for key, value in expected.items())


@pytest.mark.parametrize('prefix', (
    'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'model.', 'net.module.module.', 'model.net.',
    '_forward_module.', 'module.model._orig_mod.',
))  # fmt: skip
def test_names_of_wrappers_are_taken_off(tmp_path, prefix):
    torch.save({prefix + key: value for key, value in WEIGHTS.items()}, tmp_path / 'w.pth')
    assert equal_weights(read_checkpoint(tmp_path / 'w.pth'))


def test_wrappers_of_parts_and_their_own_buffers_are_taken_off(tmp_path):
    state = {key.replace('conv1', '_orig_mod.conv1'): value for key, value in WEIGHTS.items()}
    torch.save({**state, 'n_averaged': torch.tensor(3)}, tmp_path / 'w.pth')  # of torch.optim.swa_utils.AveragedModel
    assert equal_weights(read_checkpoint(tmp_path / 'w.pth'))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({**WEIGHTS, 'module.base_emb': torch.zeros(2, 4)}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r'two tensors for base_emb; one of them is called module\.base_emb'):
        read_checkpoint(tmp_path / 'w.pth')


OPTIMIZER = {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': [{'lr': 0.1}]}


@pytest.mark.parametrize('content', (
    {'model': WEIGHTS, 'optimizer': OPTIMIZER, 'rng_state': torch.zeros(4)},
    {'model': {'state_dict': WEIGHTS}, 'ema': WEIGHTS},
    {'segmentor': WEIGHTS, 'optimizer': OPTIMIZER, 'epoch': 3, 'rng_state': torch.zeros(4)},
    {**WEIGHTS, 'epoch': 3, 'name': 'x'},
    {'net': {key: value.numpy() for key, value in WEIGHTS.items()}},
    {'model': WEIGHTS, 'args': argparse.Namespace(lr=0.1, path=Path('x'), device=torch.device('cpu'))},
    {'model': WEIGHTS, 'best': np.float64(0.5), 'history': np.arange(3), 'names': np.array(['a', None], object)},
), ids=range(7))  # fmt: skip
@pytest.mark.parametrize('zipped', (True, False))
def test_weights_are_found_beside_plain_values(tmp_path, content, zipped):
    torch.save(content, tmp_path / 'w.pth.tar', _use_new_zipfile_serialization=zipped)
    assert equal_weights(read_checkpoint(tmp_path / 'w.pth.tar'))


def test_one_of_several_sets_of_weights_is_chosen(tmp_path):
    torch.save({'student': {'a.b': torch.zeros(1)}, 'teacher': WEIGHTS}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r'several sets of weights: student, teacher.* --entry student'):
        read_checkpoint(tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r"no entry 'pupil' with weights; it has student, teacher"):
        read_checkpoint(tmp_path / 'w.pth', entry='pupil')
    assert equal_weights(read_checkpoint(tmp_path / 'w.pth', entry='teacher'))


class Config(dict):
    """Stands for OmegaConf's DictConfig and the like, whose libraries may be missing where a file is read."""


def foreign_files():
    """What makes files that only --extract reads: name -> function of a path."""
    net = nn.Sequential()
    net.add_module('backbone', nn.Sequential())
    net.backbone.add_module('conv1', nn.Linear(3, 2, bias=False))
    net.backbone.conv1.weight.data.fill_(1)
    net.backbone.conv1.register_buffer('grid', torch.zeros(5), persistent=False)
    net.register_buffer('base_emb', WEIGHTS['base_emb'].clone())
    config = Config(lr=0.1)
    config.self = config
    wrapped = nn.DataParallel(net)
    return {
        'object': lambda path: torch.save({'state_dict': WEIGHTS, 'cfg': config}, path),
        'older format': lambda path: torch.save(
            {'state_dict': WEIGHTS, 'cfg': config}, path, _use_new_zipfile_serialization=False
        ),
        'protocol 4': lambda path: torch.save({'state_dict': WEIGHTS, 'cfg': config}, path, pickle_protocol=4),
        'module': lambda path: torch.save(net, path),
        'wrapped module': lambda path: torch.save({'model': wrapped, 'epoch': 3}, path),
        'plain pickle': lambda path: path.write_bytes(pickle.dumps(WEIGHTS)),
        'plain pickle of arrays': lambda path: path.write_bytes(
            pickle.dumps({'model': {key: value.numpy() for key, value in WEIGHTS.items()}})
        ),
    }


@pytest.mark.parametrize('kind', foreign_files())
def test_weights_are_extracted_from_among_python_objects_without_their_code(tmp_path, monkeypatch, run_script, kind):
    path, to = tmp_path / 'it is.pth', tmp_path / 'weights.safetensors'
    foreign_files()[kind](path)
    monkeypatch.delattr('test_weights.Config')  # its library is not installed
    with pytest.raises(InputError, match=r'holds Python objects|is a pickle') as error:
        read_checkpoint(path)
    assert 'damaged' not in str(error.value)
    command = shlex.split(str(error.value).partition('alone: ')[2])
    assert command[:4] == ['python', '-m', 'utils.checkpoint', str(path)]
    code, output = run_script('utils/checkpoint.py', *command[3:-1], to)
    assert code == 0, output
    assert equal_weights(read_checkpoint(to)) and equal_weights(read_checkpoint(to, placeholders=True))


@pytest.mark.parametrize('target', (argparse.Namespace, pathlib.PurePosixPath, torch._utils._rebuild_tensor_v2))
def test_a_file_cannot_change_the_classes_and_functions_that_make_its_values(tmp_path, target):
    module, name = target.__module__, target.__qualname__
    # GLOBAL, then BUILD with (None, {'changed': '1'}), which sets this attribute
    pickled = f"c{module}\n{name}\n(N(S'changed'\nS'1'\ndtb.".encode()
    (tmp_path / 'a.pth').write_bytes(b'\x80\x02' + pickled)
    with contextlib.suppress(InputError):
        extract(tmp_path / 'a.pth')
    assert not hasattr(target, 'changed')


def archive(kind, names):
    """A function that writes an archive with such files."""

    def write(path):
        with zipfile.ZipFile(path, 'w') if kind == 'zip' else tarfile.open(path, 'w') as file:
            for name in names:
                if kind == 'zip':
                    file.writestr(name, b'x' * 100)
                else:
                    file.addfile(tarfile.TarInfo(name), io.BytesIO())

    return write


OTHER_FILES = {
    'is empty': lambda path: path.touch(),
    'pointer of Git LFS.*git lfs pull': lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\n'),
    'an image': lambda path: Image.new('RGB', (9, 9)).save(path, 'JPEG'),
    'a web page': lambda path: path.write_text('\n<!DOCTYPE html>\n<html><title>Quota exceeded</title>'),
    'an index of weights that are in several files': lambda path: path.write_text('{"metadata": {}, "weight_map": {}}'),
    'a text file': lambda path: path.write_text('404: Not Found\nSorry'),
    'begins with zeros': lambda path: path.write_bytes(bytes(9999)),
    'a compressed file': lambda path: path.write_bytes(gzip.compress(b'x')),
    'zip archive that holds net/best.pth.*Unpack it': archive('zip', ['net/best.pth', 'net/readme']),
    'no checkpoint but a zip archive of word/document.xml': archive('zip', ['word/document.xml']),
    'oldest format of torch.save.*--extract': archive('tar', ['sys_info', 'pickle', 'storages', 'tensors']),
    'tar archive that holds best.pth': archive('tar', ['best.pth']),
    r'a NumPy \(.npz\) archive': lambda path: np.savez(path.open('wb'), a=np.ones(3)),
    'TorchScript.*torch.jit.load': lambda path: torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path),
    'damaged: it ends early': lambda path: (torch.save(WEIGHTS, path), path.write_bytes(path.read_bytes()[:-50])),
    'damaged: the checksum': lambda path: (
        torch.save(WEIGHTS, path), path.write_bytes(path.read_bytes().replace(b'\x80\x3f', b'\x80\x40'))
    ),
    r'damaged \(': lambda path: (save_file(WEIGHTS, path), path.write_bytes(path.read_bytes()[:-5])),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', OTHER_FILES)
def test_other_files_are_called_what_they_are(tmp_path, kind):
    OTHER_FILES[kind](tmp_path / 'f.pth')
    for placeholders in (False, True):
        with pytest.raises(InputError, match=f'{kind}|damaged' if placeholders else kind):
            read_checkpoint(tmp_path / 'f.pth', placeholders=placeholders)


def _compressed(path):
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize('write', (
    lambda path: torch.save(WEIGHTS, path), lambda path: save_file(WEIGHTS, path), _compressed,
    lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    lambda path: path.write_bytes(pickle.dumps({'a': [1, 2]})), OTHER_FILES['oldest format of torch.save.*--extract'],
), ids=('zip', 'safetensors', 'compressed', 'before zip', 'pickle', 'tar'))  # fmt: skip
def test_a_changed_file_is_read_or_refused_with_a_message(tmp_path, write):
    """Libraries raise errors of many types for damaged files."""
    path = tmp_path / 'f.pth'
    write(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        reach = len(content) if rng.random() < 0.5 else min(300, len(content))
        for place in rng.integers(reach, size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            read_content(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize('suffix', ('.safetensors', '.pth'))
def test_written_weights_are_those_of_the_run_and_load_again(run_script, base_run, tmp_path, suffix):
    to = tmp_path / f'caf\udce9{suffix}'
    code, output = run_script('utils/checkpoint.py', base_run / 'last.pth', '--to', to)
    assert code == 0, output
    for text in ('POP, stage 1: 15 base and 0 novel classes', 'dotted disc (6)', 'mobilenet_v2', 'shapes', '65,65',
                 'on 8 of 8 images', 'training (dict)'):  # fmt: skip
        assert text in output, output
    ours, theirs = read_checkpoint(base_run / 'last.pth'), read_checkpoint(to)
    assert equal_weights(theirs, ours.state) and (theirs.config, theirs.epoch) == (ours.config, ours.epoch)
    assert str(theirs.metrics) == str(ours.metrics) and 'training' not in theirs.entries
    assert theirs.load_into(build_model('mobilenet_v2', 15, output_stride=32), {'fold': 0, 'dataset': 'shapes'}) == []
    with pytest.raises(InputError, match='fold is 0, expected 1'):
        theirs.load_into(build_model('mobilenet_v2', 15, output_stride=32), {'fold': 1})
    with pytest.raises(InputError, match='no checkpoint that training can resume from'):
        read_state(to)
    code, output = run_script('utils/checkpoint.py', to, '--to', to)
    assert code == 1 and 'exists' in output and '--overwrite' in output
    code, output = run_script('utils/checkpoint.py', to, '--to', tmp_path / 'x.onnx')
    assert code == 2 and 'ends with .safetensors or .pth' in output
