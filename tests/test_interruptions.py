"""Interrupted runs resume to the weights of whole ones: killed, or stopped by a signal.

`chaos.py` tries more faults, and kills at random moments.
"""

import signal

import pytest
import torch
from conftest import same_results, stage_1, stage_2
from forked import Forked, run_new, run_process


def kill_when_it_prints(process, text):
    """Read the output until a line contains `text`, then kill the process and all that it started."""
    for line in process.stdout:
        if text in line:
            break
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ('processes', 'moments'),
    (
        (1, ('epoch 1/2 step 4/', 'epoch 2/2 step 3/')),
        pytest.param(2, ('epoch 2/2 step 3/',), marks=pytest.mark.slow),
    ),
)
def test_a_killed_run_of_stage_1_resumes_to_the_same_weights(shapes, whole, tmp_path, processes, moments):
    for moment in moments:
        kill_when_it_prints(Forked(*stage_1(shapes, tmp_path), processes=processes), moment)
    code, output = run_process(*stage_1(shapes, tmp_path), processes=processes)
    assert code == 0 and 'resumed at epoch' in output, output
    same_results(whole(processes), tmp_path, ('best', 'last'))


def test_a_killed_run_of_stage_2_resumes_to_the_same_weights(shapes, base_run, few_shot_run, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    code, output = run_new(*stage_2(shapes, base_run, whole))
    assert code == 0, output
    # the second seed is added when the run is started again
    for seeds, moment in (('123', 'seed 123 epoch 1/2 step 4/'), ('123,234', 'seed 234 epoch 2/2 step 1/')):
        process = Forked(*stage_2(shapes, base_run, killed, '--random-seed', seeds))
        kill_when_it_prints(process, moment)
    code, output = run_process(*stage_2(shapes, base_run, killed))
    assert code == 0 and 'seed 123 finished earlier' in output and 'seed 234 resumed' in output, output
    same_results(whole, killed, ('best_123', 'last_123', 'best_234', 'last_234'))


@pytest.mark.parametrize('processes', (1, pytest.param(2, marks=pytest.mark.slow)))
def test_training_on_kept_views_resumes_to_the_same_weights_wherever_they_are(
    shapes, base_run, few_shot_run, tmp_path, processes
):
    views = ('--random-seed', 123, '--views', 3, '--base-views', 2, '--input-size', '97,65')
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    in_memory = stage_2(shapes, base_run, whole, *views, '--features', 'memory')
    code, output = run_process(*in_memory, processes=processes)
    assert code == 0 and 'kept in memory' in output, output
    command = stage_2(shapes, base_run, killed, *views, '--features', 'disk')
    kill_when_it_prints(Forked(*command, processes=processes), 'seed 123 epoch 2/2 step 1/')
    code, output = run_process(*command, processes=processes)
    assert code == 0 and 'seed 123 resumed' in output and 'computed before: ' in output, output
    same_results(whole, killed, ('best_123', 'last_123'))


@pytest.mark.parametrize(('number', 'code'), ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_saves_and_stops(shapes, tmp_path, number, code):
    process = Forked(*stage_1(shapes, tmp_path, '--save-every-steps', 0))
    for line in process.stdout:
        if 'epoch 1/2 step 2/' in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert ('stopping soon' in rest) == (number == signal.SIGINT)
    assert process.wait() == code and 'Traceback' not in rest and 'run the same command again to resume' in rest, rest
    progress = torch.load(tmp_path / 'last.pth', weights_only=True)['training']['progress']
    assert progress['epoch'] == 0 and progress['step'] >= 2
