"""Loader processes that die, hang or meet a limit: the run goes on, or ends with advice, and never waits."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from forked import ROOT, run_process
from PIL import Image
from torch.utils.data import Dataset

from core import signals
from core.errors import InputError
from core.parallel import parallel_map
from engine import loaders
from engine.distributed import process_group
from engine.loaders import evaluation_loader, training_loader

CPU = torch.device('cpu')


class Scenes(Dataset):
    """Evaluation items of different sizes; `trouble` is called with each index."""

    def __init__(self, count=8, side=32, trouble=lambda index: None):
        self.count, self.side, self.trouble = count, side, trouble

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.trouble(index)
        mask = np.full((self.side - index % 3, self.side), index, np.uint8)
        image = torch.full((3, self.side, self.side), float(index))
        named = {'id': str(index), 'index': index, 'skipped': ''}
        return named | {'image': image, 'mask': mask, 'canvas': (self.side,) * 2}


def read(dataset, batch_size=2):
    return list(evaluation_loader(dataset, batch_size, num_workers=1, device=CPU))


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    signals.end_workers()  # as `exits_cleanly` does; they ignore the SIGTERM of multiprocessing


def assert_complete(batches, count):
    masks = [mask for batch in batches for mask in batch['mask']]
    assert [int(mask[0, 0]) for mask in masks] == list(range(count))
    assert [image for batch in batches for image in batch['id']] == [str(i) for i in range(count)]


@contextlib.contextmanager
def limit(kind, value):
    """Lower a limit of this process and of those it starts."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def test_a_batch_of_many_masks_takes_few_open_files():
    opened = len(os.listdir('/proc/self/fd'))
    with limit(resource.RLIMIT_NOFILE, opened + 40):
        assert_complete(read(Scenes(count=120), batch_size=60), 120)


def test_a_temporary_folder_too_deep_for_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ('d' * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(deep))
    assert_complete(read(Scenes()), 8)


@pytest.mark.parametrize('loader', ('training', 'evaluation'))
def test_shared_memory_without_room_is_named(loader):
    with limit(resource.RLIMIT_FSIZE, 100_000), pytest.raises(InputError, match=r'/dev/shm.* MB free.*--num-workers 0'):
        if loader == 'evaluation':
            read(Scenes(side=256))
        else:
            scenes = [{'image': torch.zeros(3, 256, 256)}] * 4
            list(training_loader(Views(scenes), 2, 0, num_workers=1, device=CPU))


class Views(Dataset):
    """Training views, by (epoch, index)."""

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return len(self.views)

    def __getitem__(self, key):
        return self.views[key[1]]


@pytest.mark.parametrize(('trouble', 'message'), (
    (lambda index: os.kill(os.getpid(), signal.SIGKILL) if index == 3 else None, 'killed by signal: Killed.*memory'),
    (lambda index: os._exit(3) if index == 5 else None, 'loader process ended.*--num-workers'),
    (lambda index: os.kill(os.getpid(), signal.SIGBUS) if index == 0 else None, '/dev/shm is full'),
    (lambda index: time.sleep(4) if index == 2 else None, 'no loader process delivered a batch'),
), ids=('killed', 'exits', 'bus error', 'hangs'))  # fmt: skip
def test_a_loader_process_that_fails_ends_the_run(monkeypatch, trouble, message):
    monkeypatch.setattr(loaders, 'TIMEOUT', 1)
    began = time.monotonic()
    with pytest.raises(InputError, match=message), process_group('cpu'):
        read(Scenes(trouble=trouble))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize('error', (ConnectionResetError(104, 'reset'), EOFError(), FileNotFoundError(2, 'no socket')))
@pytest.mark.parametrize('cause', (signal.SIGKILL, signal.SIGBUS), ids=('killed', 'bus error'))
def test_a_process_that_ends_while_it_hands_over_a_batch_is_named(monkeypatch, error, cause):
    def broken(batches):
        os.kill(batches._workers[0].pid, cause)
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, '_next_data', broken)
    message = {signal.SIGKILL: 'killed by signal: Killed.*--num-workers', signal.SIGBUS: '/dev/shm is full'}[cause]
    with pytest.raises(InputError, match=message), process_group('cpu'):
        read(Scenes())


@pytest.mark.parametrize(('end', 'said'), (
    (lambda: os.kill(os.getpid(), signal.SIGKILL), 'killed by signal: Killed'), (lambda: os._exit(3), 'exited unexp'),
))  # fmt: skip
def test_how_a_process_ended_is_known_without_the_handler_of_pytorch(end, said):
    context = multiprocessing.get_context('fork')
    workers = [context.Process(target=target, daemon=True) for target in (signal.pause, end)]
    for worker in workers:
        worker.start()
    assert said in loaders._end_of_a_process(workers)


@pytest.mark.parametrize('error', (EOFError(), ConnectionResetError(104, 'reset')))
def test_without_processes_no_process_is_blamed(error):
    def fail(index):
        raise error

    with pytest.raises(type(error)):
        list(evaluation_loader(Scenes(trouble=fail), 2, num_workers=0, device=CPU))


@pytest.mark.parametrize('error', (FileNotFoundError(2, 'gone', 'a.jpg'), EOFError('Caught EOFError in worker 0')))
def test_an_error_of_a_file_is_none_of_the_processes(monkeypatch, error):
    def broken(loader):
        raise error
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, '__iter__', broken)
    with pytest.raises(type(error)):
        read(Scenes())


def test_an_error_of_the_program_keeps_its_traceback():
    def fail(index):
        raise RuntimeError('a bug')

    with pytest.raises(RuntimeError, match='a bug'):
        read(Scenes(trouble=fail))


def test_a_killed_worker_of_a_map_is_an_error_with_advice():
    with pytest.raises(InputError, match=r'counting: a worker process was killed.*memory'):
        parallel_map(_die_at_three, range(8), 'counting', workers=2)


def _die_at_three(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_file_that_cannot_be_read_ends_a_command_without_a_traceback(base_run, shapes, tmp_path):
    (tmp_path / 'photographs').mkdir()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / 'photographs/deep.png')
    code, output = run_process(
        '-m', 'utils.predict', '--restore-from', base_run, '--images', tmp_path / 'photographs',
        '--save-path', tmp_path / 'out', '--num-workers', 1,
    )  # fmt: skip
    assert code == 1 and 'deep.png has 16-bit' in output and 'Traceback' not in output, output


def test_a_closed_pipe_ends_a_command_quietly():
    text = (
        f'{sys.executable} -m utils.check_data --help | head -1; echo ${{PIPESTATUS[0]}}; '
        f'{sys.executable} -c "from core.errors import exits_cleanly\nexits_cleanly(lambda: [print(i) for i in '
        'range(10**5)])()" | head -1; echo ${PIPESTATUS[0]}'
    )
    done = subprocess.run(['bash', '-c', text], cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and output.splitlines()[-2:] == ['0', '141'] and 'Error' not in output, output
