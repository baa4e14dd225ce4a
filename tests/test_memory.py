"""memory.pt: it belongs to one network, is read whole or not at all, and has a size limit."""

import shutil

import pytest
import torch

from core.errors import InputError
from engine import memory as memory_file
from engine.checkpoint import read_checkpoint
from engine.described import described_network
from engine.feature_store import digest
from engine.memory import teachable, views_per_class
from model import build_model


def test_a_memory_belongs_to_its_network(remembered, tmp_path):
    net = teachable(described_network(read_checkpoint(remembered / 'best.pth'))[0])
    network, path = digest(net.state_dict()), tmp_path / 'memory.pt'
    whole = (remembered / 'memory.pt').read_bytes()
    changed = torch.load(remembered / 'memory.pt', weights_only=True)
    beyond = changed['arrays']['mask'].clone()
    beyond[0, 0] = 16
    assert memory_file.read_memory(remembered / 'memory.pt', net, network, torch.device('cpu')).support == {}
    with pytest.raises(InputError, match='copy it back, or teach the base network again'):
        memory_file.read_memory(tmp_path / 'none.pt', net, network, torch.device('cpu'), taught=True)
    for content, message in (
        (None, 'there is no .*utils.memory'),
        (whole[: len(whole) // 2], 'is damaged'),
        (whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:], 'is damaged'),
        ((remembered / 'best.pth').read_bytes(), 'is no memory of a network'),
        (changed | {'version': 0}, 'is of version 0'),
        (changed | {'network': 'another'}, 'memory of another network'),
        (changed | {'arrays': {name: array[:, :2] for name, array in changed['arrays'].items()}}, 'is damaged'),
        (changed | {'arrays': changed['arrays'] | {'mask': beyond}}, 'labels beyond those of 15 base classes'),
        (changed | {'support': {'scooter': [('a.jpg', 3, 4)]}}, 'is damaged'),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        with pytest.raises(InputError, match=message):
            memory_file.read_memory(path, net, network, torch.device('cpu'))


def test_a_memory_that_cannot_be_written_is_named(remembered, tmp_path, monkeypatch):
    net = teachable(described_network(read_checkpoint(remembered / 'best.pth'))[0])
    known = memory_file.read_memory(remembered / 'memory.pt', net, digest(net.state_dict()), torch.device('cpu'))

    def full(*_):
        raise RuntimeError('[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(InputError, match=r'cannot write .*memory.pt \(\d+ MB are free'):
        memory_file.write_memory(tmp_path / 'memory.pt', known)
    assert not list(tmp_path.iterdir())


def test_a_memory_has_a_size_limit():
    net = teachable(build_model('resnet18', 15, output_stride=8))
    each = 60 * 60 * 2 * (15 + 512 + 1) + 30 * 30 * 2 * (512 + 256) + 473 * 473
    assert views_per_class(net, (473, 473), 300) == 300_000_000 // (15 * each) == 3
    assert views_per_class(net, (65, 65), 300) == 20
    many = teachable(build_model('resnet50', 60, output_stride=8))
    assert views_per_class(many, (473, 473), None) == 1  # takes 593 MB
    assert views_per_class(net, (473, 473), None) == 3
    with pytest.raises(InputError, match='--memory-mb 82'):
        views_per_class(net, (473, 473), 50)
    many.num_base = 150
    with pytest.raises(InputError, match='more than the 1000 MB'):
        views_per_class(many, (473, 473), None)


def test_the_memory_of_another_network_is_not_replaced_by_accident(run_script, shapes, remembered, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(remembered, folder)
    content = torch.load(folder / 'best.pth', weights_only=True)
    content['model']['base_emb'] += 1
    torch.save(content, folder / 'last.pth')
    before, flags = (folder / 'memory.pt').read_bytes(), ('--data-dir', shapes, '--memory-mb', 1)
    code, output = run_script('utils/memory.py', '--restore-from', folder / 'last.pth', *flags)
    assert code == 1 and 'is the memory of another network than' in output and '--overwrite' in output, output
    assert (folder / 'memory.pt').read_bytes() == before
    code, output = run_script('utils/memory.py', '--restore-from', folder / 'last.pth', *flags, '--overwrite')
    assert code == 0 and (folder / 'memory.pt').read_bytes() != before, output
    content = torch.load(folder / 'memory.pt', weights_only=True)
    torch.save(content | {'support': {'scooter': []}}, folder / 'memory.pt')
    code, output = run_script('utils/memory.py', '--restore-from', folder / 'last.pth', *flags)
    assert code == 1 and 'photographs of scooter' in output and '--overwrite' in output, output
