"""Interrupted runs go on: killed, asked to stop, with damaged files; and what is refused.

`chaos.py` tries more faults, and kills at random moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAINING, run_process

from utils.errors import InputError
from utils.logger import RunLogger
from utils.snapshots import Snapshots, locked

LAUNCH = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')


def launcher(processes):
    return (sys.executable,) if processes == 1 else LAUNCH


def stage_1(shapes, folder, *flags):
    return (
        'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', 'none', '--snapshot-dir',
        folder, '--num-epoch', 2, '--batch-size', 24, '--save-every-steps', 3, *flags,
    )  # fmt: skip


def stage_2(shapes, base_run, folder, *flags):
    return (
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir',
        folder, '--num-epoch', 2, '--random-seed', '123,234', '--update-base', '--batch-size', 4, '--save-every-steps',
        7, *flags,
    )  # fmt: skip


def start(*command):
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True,
    )  # fmt: skip


def kill_when_it_prints(process, text):
    """Read the output until a line holds `text`, then kill the process and all that it started."""
    for line in process.stdout:
        if text in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def same_results(one, other, names):
    for name in names:
        a, b = (torch.load(folder / f'{name}.pth', weights_only=True) for folder in (one, other))
        assert all(torch.equal(a['model'][key], b['model'][key]) for key in a['model']), name
        assert str(a['metrics']) == str(b['metrics']) and a['epoch'] == b['epoch']  # NaN is not equal to itself
    assert (one / 'metrics.jsonl').read_bytes() == (other / 'metrics.jsonl').read_bytes()


@pytest.fixture(scope='module')
def whole(shapes, tmp_path_factory):
    """Runs of stage 1 that nothing happened to, by number of processes; each made once."""
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp('whole')
            code, output = run_process(*launcher(processes), *stage_1(shapes, folders[processes]))
            assert code == 0, output
        return folders[processes]

    return run


@pytest.mark.parametrize(
    ('processes', 'moments'),
    ((1, ('epoch 1/2 step 4/', 'epoch 2/2 step 3/')), (2, ('epoch 2/2 step 3/',))),
)
def test_a_run_of_stage_1_that_is_killed_ends_as_if_it_had_not_been(shapes, whole, tmp_path, processes, moments):
    for moment in moments:
        kill_when_it_prints(start(*launcher(processes), *stage_1(shapes, tmp_path)), moment)
    code, output = run_process(*launcher(processes), *stage_1(shapes, tmp_path))
    assert code == 0 and 'resumed at epoch' in output, output
    same_results(whole(processes), tmp_path, ('best', 'last'))


def test_a_run_of_stage_2_that_is_killed_ends_as_if_it_had_not_been(shapes, base_run, few_shot_run, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    code, output = run_process(sys.executable, *stage_2(shapes, base_run, whole))
    assert code == 0, output
    # a seed may come later
    for seeds, moment in (('123', 'seed 123 epoch 1/2 step 4/'), ('123,234', 'seed 234 epoch 2/2 step 1/')):
        process = start(sys.executable, *stage_2(shapes, base_run, killed, '--random-seed', seeds))
        kill_when_it_prints(process, moment)
    code, output = run_process(sys.executable, *stage_2(shapes, base_run, killed))
    assert code == 0 and 'seed 123 finished earlier' in output and 'seed 234 resumed' in output, output
    same_results(whole, killed, ('best_123', 'last_123', 'best_234', 'last_234'))


@pytest.mark.parametrize(('number', 'code'), ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_saves_and_stops(shapes, tmp_path, number, code):
    process = start(sys.executable, *stage_1(shapes, tmp_path, '--save-every-steps', 0))
    for line in process.stdout:
        if 'epoch 1/2 step 2/' in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == code and 'Traceback' not in rest and 'goes on from here' in rest, rest
    process.stdout.close()
    progress = torch.load(tmp_path / 'last.pth', weights_only=True)['training']['progress']
    assert progress['epoch'] == 0 and progress['step'] >= 2


def test_a_finished_run_is_left_alone_and_other_arguments_are_refused(run_script, shapes, tmp_path):
    command = stage_1(shapes, tmp_path, '--num-epoch', 1)
    code, output = run_script(*command)
    assert code == 0, output
    before = {path: path.read_bytes() for path in tmp_path.glob('*.pth')}
    code, output = run_script(*command)
    assert code == 0 and 'finished earlier' in output and ' step 1/' not in output, output
    code, output = run_script(*command, '--learning-rate', '2e-3')
    assert code == 1 and 'learning_rate was 0.001, is 0.002' in output, output
    code, output = run_script(*command, '--resume', 'off')
    assert code == 1 and '--overwrite' in output and 'last.pth' in output, output
    assert before == {path: path.read_bytes() for path in before}
    code, output = run_script(*command, '--overwrite')
    assert code == 2 and '--resume off' in output
    code, output = run_script(*command, '--resume', tmp_path / 'best.pth')
    assert code == 1 and 'no checkpoint that training can go on from' in output
    longer = stage_1(shapes, tmp_path / 'longer', '--num-epoch', 2)
    for changed in (longer, (*command, '--num-epoch', 2, '--learning-rate', '2e-3')):
        code, output = run_script(*changed, '--resume', tmp_path / 'last.pth')
        assert code == 0 and 'resumed at epoch 2, step 1' in output, output
    after = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    steps = max(record['step'] for record in after)
    rates = [record['lr_backbone'] for record in after if record['kind'] == 'train' and record['epoch'] == 2]
    assert rates[0] == pytest.approx(2e-3 * 0.5**0.9) and rates[-1] == pytest.approx(2e-3 * (1 / steps) ** 0.9)
    code, output = run_script(*command, '--resume', 'off', '--overwrite')
    assert code == 0 and 'epoch 1/1 step 1/' in output, output


def test_a_changed_list_is_named(run_script, shapes, tmp_path):
    copy = tmp_path / 'data'
    shutil.copytree(shapes, copy)
    code, output = run_script(*stage_1(copy, tmp_path / 'run', '--num-epoch', 1))
    assert code == 0, output
    path = copy / 'list' / 'val.txt'
    path.write_text('\n'.join(path.read_text().split()[1:]) + '\n')
    code, output = run_script(*stage_1(copy, tmp_path / 'run', '--num-epoch', 1))
    assert code == 1 and 'content of validation list was' in output, output


@pytest.mark.parametrize('damage', ('truncated', 'zeros', 'flipped'))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(shapes, whole, tmp_path, damage):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    content = bytearray((run / 'last.pth').read_bytes())
    if damage == 'truncated':
        content = content[: len(content) // 2]
    elif damage == 'zeros':
        content = bytes(len(content))
    else:
        for at in random.Random(0).sample(range(len(content) // 4, len(content) // 2), 20):
            content[at] ^= 0xFF
    (run / 'last.pth').write_bytes(content)
    code, output = run_process(sys.executable, *stage_1(shapes, run))
    assert code == 0 and f'{run / "last.pth"} cannot be read' in output, output
    assert f'going on from {run / "previous.pth"}' in output
    assert (run / 'last.damaged').read_bytes() == content  # out of the way of the next save
    same_results(whole(1), run, ('best', 'last'))


def test_a_file_is_gone_on_from_only_where_it_fits(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    state = torch.load(run / 'last.pth', weights_only=True)
    arguments = state['training']['arguments']
    for other in ({'fold': 1}, {'backbone': 'resnet50'}, {'batch_size': 8}, {'freeze_backbone': True}):
        ((name, value),) = other.items()
        with pytest.raises(InputError, match=f'{name} was {arguments[name]}, is {value}.*--restore-from'):
            Snapshots(run, {None: arguments | other}, str(run / 'last.pth'))
    with pytest.raises(InputError, match='is of seed None'):
        Snapshots(run, {123: arguments}, str(run / 'last.pth'))
    # another run's folder is left alone
    other = tmp_path / 'other'
    shutil.copytree(whole(1), other)
    before = {path: path.read_bytes() for path in other.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r'holds an earlier run.*--overwrite'):
        Snapshots(other, {None: arguments}, str(run / 'last.pth'))
    assert before == {path: path.read_bytes() for path in before}
    new = Snapshots(tmp_path / 'new', {None: arguments | {'num_epoch': 5}}, str(run / 'last.pth'))
    progress = new.state()['training']['progress']
    # its best checkpoint is not there, so the next one is
    assert not progress['finished'] and progress['best'] is None and new.metrics_size() == 0


def test_lost_records_are_not_made_up(tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_text('{}\n')
    RunLogger(tmp_path, {}, metrics_size=100).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b'{}\n' and 'lacks records' in capsys.readouterr().out


def test_where_nothing_can_be_read_the_run_is_refused(tmp_path):
    (tmp_path / 'last.pth').write_bytes(b'')
    with pytest.raises(InputError, match='no earlier good checkpoint'):
        Snapshots(tmp_path, {None: {}}, 'auto')


def test_a_folder_is_used_by_one_run_at_a_time(shapes, tmp_path):
    with locked(tmp_path):
        code, output = run_process(sys.executable, *stage_1(shapes, tmp_path))
        assert code == 1 and f'in use by another run (process {os.getpid()}' in output, output
    with locked(tmp_path):
        pass


def test_saving_by_the_clock(run_script, shapes, tmp_path):
    code, output = run_script(*stage_1(shapes, tmp_path, '--save-every-steps', 0, '--save-every-minutes', 1e-4))
    assert code == 0, output
    progress = torch.load(tmp_path / 'previous.pth', weights_only=True)['training']['progress']
    assert progress['epoch'] == 1 and progress['step'] > 0


def test_bad_images_are_skipped_where_that_is_asked_for(run_script, shapes, tmp_path):
    copy = tmp_path / 'data'
    shutil.copytree(shapes, copy)
    bad = [copy / 'JPEGImages' / f'{name}.jpg' for name in ('val_0002', *(f'train_000{i}' for i in range(10)))]
    for path in bad:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, output = run_script(*stage_1(copy, tmp_path / 'run', '--num-epoch', 2, '--skip-bad-images'))
    assert code == 0, output
    skipped = {path for path in bad if f'skipped: image {path}' in output}
    assert bad[0] in skipped and len(skipped) > 3
    assert f'{len(skipped) - 1} training images were skipped' in output
    code, output = run_script(*stage_1(copy, tmp_path / 'strict', '--num-epoch', 2))
    assert code == 1 and 'cannot be decoded' in output and any(str(path) in output for path in bad)


@pytest.mark.parametrize('stage', (1, 2))
def test_two_processes_and_parts_follow_the_losses_of_one(shapes, base_run, few_shot_run, tmp_path, stage):
    def curve(launch, name, *flags):
        folder = tmp_path / name
        if stage == 1:
            command = stage_1(shapes, folder, '--fix-bn', '--num-epoch', 1, *flags)
        else:
            command = stage_2(shapes, base_run, folder, '--random-seed', 123, '--num-epoch', 1, *flags)
        code, output = run_process(*launch, *command)
        assert code == 0, output
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        return [record['ce'] + record['orth'] for record in records if record['kind'] == 'train']

    one = curve((sys.executable,), 'one')
    assert len(one) > 2 and len(set(one)) == len(one)
    assert curve(LAUNCH, 'two') == pytest.approx(one, abs=1e-4)
    assert curve((sys.executable,), 'parts', '--accumulate', 2) == pytest.approx(one, abs=1e-4)


def test_an_error_of_one_process_ends_all_with_its_message(shapes, tmp_path):
    copy = tmp_path / 'data'
    shutil.copytree(shapes, copy)
    image = copy / 'JPEGImages' / 'train_0007.jpg'
    image.write_bytes(image.read_bytes()[:1000])  # the header is whole, so the lists are made
    began = time.monotonic()
    # a loader process meets the error, and must not outlive it
    code, output = run_process(*LAUNCH, *stage_1(copy, tmp_path / 'run', '--num-workers', 1))
    assert code == 1 and output.count(f'error: image {image} cannot be decoded') == 1, output
    assert '[rank' not in output and time.monotonic() - began < 60, output


def test_a_killed_process_is_restarted_and_the_run_goes_on(shapes, whole, tmp_path):
    launch = (*LAUNCH, '--max-restarts', 2)
    process = start(*launch, *stage_1(shapes, tmp_path))
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
