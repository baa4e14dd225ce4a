"""Fixtures: small embedded data, the real data beside the project where it is, and scripts run as a user runs them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
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


def run_process(*command, env=None, cwd=ROOT, timeout=240):
    """Run a command in a process of its own; returns (exit code, output)."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, timeout=timeout, capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


# the cheapest network and sizes that still go through everything
TINY = ('--dataset', 'shapes', '--backbone', 'resnet18', '--os', 32, '--base-size', '65,65', '--num-workers', 0)
TINY_TRAINING = ('--input-size', '65,65', '--print-frequency', 1)


@pytest.fixture(scope='session')
def base_run(shapes, tmp_path_factory):
    """A snapshot folder of stage 1, trained for two short epochs."""
    folder = tmp_path_factory.mktemp('base')
    code, output = run_process(
        sys.executable, 'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', 'none',
        '--snapshot-dir', folder, '--num-epoch', 2, '--batch-size', 32, '--save-pred-every', 1,
    )  # fmt: skip
    assert code == 0, output
    return folder


@pytest.fixture(scope='session')
def few_shot_run(shapes, base_run, tmp_path_factory):
    """A snapshot folder of stage 2: one shot, two seeds, two epochs."""
    folder = tmp_path_factory.mktemp('few_shot')
    code, output = run_process(
        sys.executable, '-m', 'utils.gen_fs_list', '--dataset', 'shapes', '--data-dir', shapes, '--shot', 1, 2,
        '--seed', 123, 234,
    )  # fmt: skip
    assert code == 0, output
    code, output = run_process(
        sys.executable, 'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run,
        '--snapshot-dir', folder, '--num-epoch', 2, '--random-seed', '123,234', '--update-base',
    )  # fmt: skip
    assert code == 0, output
    return folder
