"""Fixtures: small embedded data, the real data beside the project where it is, and scripts run as a user runs them."""

import fcntl
import os
import runpy
import shutil
import sys
from functools import partial

import pytest
import torch
from forked import ROOT, run_process
from torch import nn

from dataset.shapes import make_shapes

SHARED = ROOT.parent / 'shared'


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A small embedded data set: 120 training and 8 validation images."""
    folder = tmp_path_factory.mktemp('shapes')
    make_shapes(folder, seed=1, train_images=120, val_images=8)
    return folder


@pytest.fixture(scope='session')
def voc_mini():
    """Real photographs with palette masks."""
    folder = SHARED / 'data' / 'voc-mini'
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there: real photographs are not part of the project')
    return folder


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run one of the project's scripts in this process with a command line; returns (exit code, output)."""

    def run(script, *flags):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def imported(run_script, tmp_path):
    """Run utils.import_annotations on folder `export` with `--out data`; returns (exit code, output)."""
    return lambda kind, *flags: run_script(
        'utils/import_annotations.py', '--format', kind, '--annotations', tmp_path / 'export', '--out',
        tmp_path / 'data', '--workers', 1, *flags,
    )  # fmt: skip


# the cheapest network and sizes that still go through everything
TINY = ('--dataset', 'shapes', '--backbone', 'mobilenet_v2', '--os', 32, '--base-size', '65,65', '--num-workers', 0)
TINY_RESNET = (*TINY, '--backbone', 'resnet18')  # with random weights, it tells more labels apart
TINY_TRAINING = ('--input-size', '65,65', '--print-frequency', 1)


def made_once(tmp_path_factory, name, make):
    """A folder with what `make(folder)` writes into it: made by the first test process, copied by the others."""
    own = tmp_path_factory.mktemp(name)
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        make(own)
        return own
    first = tmp_path_factory.getbasetemp().parent / name  # the folder of all test processes
    with open(first.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not first.is_dir():
            unfinished = first.with_suffix('.unfinished')
            make(unfinished)
            unfinished.rename(first)
    shutil.copytree(first, own, dirs_exist_ok=True, copy_function=_link_or_copy)
    return own


def _link_or_copy(source, target):
    """Checkpoints are replaced, never changed in place, so that links save their gigabytes."""
    (os.link if source.endswith('.pth') else shutil.copy2)(source, target)


@pytest.fixture(scope='session')
def base_run(shapes, tmp_path_factory):
    """A snapshot folder of stage 1, trained for two short epochs."""

    def train(folder):
        code, output = run_process(
            'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', 'none',
            '--snapshot-dir', folder, '--num-epoch', 2, '--batch-size', 32, '--save-pred-every', 1,
        )  # fmt: skip
        assert code == 0, output

    return made_once(tmp_path_factory, 'base', train)


@pytest.fixture(scope='session')
def few_shot_run(shapes, base_run, tmp_path_factory):
    """A snapshot folder of stage 2: one shot, two seeds, two epochs."""
    code, output = run_process(
        '-m', 'utils.gen_fs_list', '--dataset', 'shapes', '--data-dir', shapes, '--shot', 1, 2,
        '--seed', 123, 234,
    )  # fmt: skip
    assert code == 0, output

    def train(folder):
        code, output = run_process(
            'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run,
            '--snapshot-dir', folder, '--num-epoch', 2, '--random-seed', '123,234', '--update-base',
        )  # fmt: skip
        assert code == 0, output

    return made_once(tmp_path_factory, 'few_shot', train)


class Tiny(nn.Module):
    """A backbone that costs nothing."""

    out_channels, middle_channels = 16, 8

    def __init__(self):
        super().__init__()
        self.stem, self.layer3, self.layer4 = (
            nn.Sequential(nn.Conv2d(*sizes, stride=stride, padding=1, bias=False), nn.BatchNorm2d(sizes[1]), nn.ReLU())
            for sizes, stride in (((3, 8, 3), 8), ((8, 8, 3), 2), ((8, 16, 3), 2))
        )

    @property
    def dilatable_layers(self):
        return self.layer3, self.layer4

    def middle(self, images):
        return self.layer3(self.stem(images))

    def forward(self, images):
        return self.layer4(self.middle(images))


@pytest.fixture
def tiny(monkeypatch):
    """Makes `build_model` and the scripts build small networks; the name of a backbone."""
    import model  # here: tests that need no network start without it

    monkeypatch.setitem(model.BACKBONES, 'tiny', Tiny)
    monkeypatch.setattr(model, 'PSP', partial(model.PSP, channels=32))
    return 'tiny'


def stage_1(shapes, folder, *flags):
    """A command of stage 1 that saves within its two epochs."""
    return (
        'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', 'none', '--snapshot-dir',
        folder, '--num-epoch', 2, '--batch-size', 24, '--save-every-steps', 3, '--no-memory', *flags,
    )  # fmt: skip


def stage_2(shapes, base_run, folder, *flags):
    """A command of stage 2 that saves within its two epochs, for two seeds."""
    return (
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir',
        folder, '--num-epoch', 2, '--random-seed', '123,234', '--update-base', '--batch-size', 4, '--save-every-steps',
        7, *flags,
    )  # fmt: skip


def same_results(one, other, names):
    """Assert that two runs ended with the same checkpoints and metrics, bit for bit."""
    for name in names:
        a, b = (torch.load(folder / f'{name}.pth', weights_only=True) for folder in (one, other))
        assert all(torch.equal(a['model'][key], b['model'][key]) for key in a['model']), name
        assert str(a['metrics']) == str(b['metrics']) and a['epoch'] == b['epoch']  # NaN is not equal to itself
    assert (one / 'metrics.jsonl').read_bytes() == (other / 'metrics.jsonl').read_bytes()


@pytest.fixture(scope='session')
def whole(shapes, tmp_path_factory):
    """Runs of stage 1 that nothing happened to, by number of processes; each made once."""
    folders = {}

    def run(processes):
        if processes not in folders:

            def train(folder):
                code, output = run_process(*stage_1(shapes, folder), processes=processes)
                assert code == 0, output

            folders[processes] = made_once(tmp_path_factory, f'whole_{processes}', train)
        return folders[processes]

    return run


@pytest.fixture(scope='session')
def remembered(shapes, base_run, tmp_path_factory):
    """The base network with a small memory, which `utils.memory` made."""
    from utils import memory  # here: tests that need no network start without it

    folder = tmp_path_factory.mktemp('remembered')
    shutil.copy(base_run / 'best.pth', folder)
    args = ('--restore-from', folder, '--data-dir', shapes, '--memory-mb', 1)
    memory.main(memory.parse_args([str(arg) for arg in args]))
    return folder
