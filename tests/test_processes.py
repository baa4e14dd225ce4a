"""Several processes: the same losses as one, and what happens to the others when one fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import same_results, stage_1, stage_2
from forked import ONE_THREAD, ROOT, run_process

from core.errors import InputError
from core.ranks import check_ranks


def torchrun(*command):
    """Start a script in two processes as the documentation does; its output can be read."""
    launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2)
    return subprocess.Popen(
        list(map(str, launch + command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **ONE_THREAD},
    )  # fmt: skip


@pytest.mark.parametrize('stage', (1, pytest.param(2, marks=pytest.mark.slow)))
def test_two_processes_and_micro_batches_follow_the_losses_of_one(
    run_script, shapes, base_run, few_shot_run, tmp_path, stage
):
    def curve(run, name, *flags):
        folder = tmp_path / name
        if stage == 1:
            command = stage_1(shapes, folder, '--fix-bn', '--num-epoch', 1, *flags)
        else:
            command = stage_2(shapes, base_run, folder, '--random-seed', 123, '--num-epoch', 1, *flags)
        code, output = run(*command)
        assert code == 0, output
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        return [record['ce'] + record['orth'] for record in records if record['kind'] == 'train']

    one = curve(run_script, 'one')
    assert len(one) > 2 and len(set(one)) == len(one)
    assert curve(partial(run_process, processes=2), 'two') == pytest.approx(one, abs=1e-4)
    assert curve(run_script, 'micro_batches', '--accumulate', 2) == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_two_processes_register_what_one_registers(run_script, shapes, base_run, few_shot_run, tmp_path):
    def learned(run, name):
        flags = ('--model', 'pspnet_lda', '--base-views', 2, '--random-seed', 123)
        code, output = run(*stage_2(shapes, base_run, tmp_path / name, *flags))
        assert code == 0, output
        checkpoint = torch.load(tmp_path / name / 'last_123.pth', weights_only=True)
        return checkpoint['model'], checkpoint['metrics']

    (one, metrics), (two, others) = learned(run_script, 'one'), learned(partial(run_process, processes=2), 'two')
    assert all(torch.allclose(one[key], value, rtol=1e-3, atol=1e-4) for key, value in two.items())
    assert one['discriminants.weight'].abs().sum() > 0 and others['total'] == pytest.approx(metrics['total'], abs=0.1)


def test_an_error_of_one_process_ends_all_with_its_message(shapes, tmp_path):
    copy = tmp_path / 'data'
    shutil.copytree(shapes, copy)
    image = copy / 'JPEGImages' / 'train_0007.jpg'
    image.write_bytes(image.read_bytes()[:1000])  # the header is whole, so the lists are made
    began = time.monotonic()
    # the error arises in a loader process, which must end too
    process = torchrun(*stage_1(copy, tmp_path / 'run', '--num-workers', 1))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and output.count(f'error: image {image} cannot be decoded') == 1, output
    assert '[rank' not in output and time.monotonic() - began < 60, output


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_resumes(shapes, whole, tmp_path):
    process = torchrun('--max-restarts', 2, *stage_1(shapes, tmp_path))
    for line in process.stdout:
        if 'epoch 2/2 step 1/' in line:
            # the processes that the launcher started
            children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and 'resumed at epoch' in rest, rest
    process.stdout.close()
    same_results(whole(2), tmp_path, ('best', 'last'))


@pytest.fixture(scope='module')
def two_processes():
    """Exit code and output of `in_two_processes.py`."""
    return run_process('tests/in_two_processes.py', processes=2, timeout=60)


def test_batch_statistics_of_two_processes_are_those_of_the_joined_batch(two_processes):
    assert two_processes[1].count('batch statistics are shared') == 2, two_processes[1]


def test_all_processes_can_catch_an_error_of_the_main_one(two_processes):
    assert two_processes[1].count('caught: no room') == 2, two_processes[1]


def test_a_signal_stops_the_evaluation_of_all_processes_at_once(two_processes):
    code, output = two_processes
    assert code != 0 and 'went through' not in output, output
    assert output.count('stopped by SIGTERM') == 2, output


@pytest.mark.parametrize(('variables', 'expected'), (
    ({'RANK': '1'}, 'RANK=1, but no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR'),
    ({'WORLD_SIZE': '4'}, 'WORLD_SIZE=4, but no RANK'),
    ({'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}, 'but no RANK, WORLD_SIZE'),
    ({'RANK': '2', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}, '0 .. WORLD_SIZE'),
    ({'RANK': 'x', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}, 'RANK=x'),
))  # fmt: skip
def test_half_of_what_torchrun_sets_is_refused(run_script, shapes, tmp_path, monkeypatch, variables, expected):
    """A stray RANK=1 made a run train without saving anything."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output = run_script(*stage_1(shapes, tmp_path / 'run'))
    assert code == 2 and expected in output and 'torchrun' in output, output
    assert not (tmp_path / 'run').exists()
    with pytest.raises(InputError, match='torchrun'):
        check_ranks()


def test_the_master_alone_is_no_rank(monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', 'localhost')  # some clusters set it everywhere
    check_ranks()
