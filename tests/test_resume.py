"""What a run finds in its folder: finished and damaged checkpoints, other arguments, other runs; what is refused."""

import json
import os
import shutil

import pytest
import torch
from conftest import same_results, stage_1, stage_2
from forked import run_process

from core.errors import InputError
from dataset import DATASETS
from engine.logger import RunLogger
from engine.resume import RunFolder
from engine.run import locked


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
    assert code == 1 and 'no checkpoint that training can resume from' in output
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


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


DAMAGES = {  # what a file holds then, and what is said of it
    'truncated': (lambda content: content[: len(content) // 2], 'is damaged: it ends early'),
    'zeros': (lambda content: bytes(len(content)), 'is empty inside'),
    'flipped': (lambda content: flipped(content, len(content) // 3), 'is damaged: the checksum'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(shapes, whole, tmp_path, capsys, damage):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    damaged, message = DAMAGES[damage]
    arguments = torch.load(run / 'last.pth', weights_only=True)['training']['arguments']
    content = damaged((run / 'last.pth').read_bytes())
    (run / 'last.pth').write_bytes(content)
    if damage == 'truncated':
        code, output = run_process(*stage_1(shapes, run))
        assert code == 0, output
        same_results(whole(1), run, ('best', 'last'))
    else:
        assert RunFolder(run, {None: arguments}, 'auto').holds()
        output = capsys.readouterr().out
    assert f'{run / "last.pth"} {message}' in output and f'resuming from {run / "previous.pth"}' in output
    assert (run / 'last.damaged').read_bytes() == content  # so that the next save does not overwrite it


def test_resuming_from_a_file_needs_fitting_arguments(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    state = torch.load(run / 'last.pth', weights_only=True)
    arguments = state['training']['arguments']
    for other in (
        {'fold': 1}, {'backbone': 'resnet50'}, {'batch_size': 8}, {'freeze_backbone': True}, {'start_epoch': 1}
    ):  # fmt: skip
        ((name, value),) = other.items()
        with pytest.raises(InputError, match=f'{name} was {arguments[name]}, is {value}.*--restore-from'):
            RunFolder(run, {None: arguments | other}, str(run / 'last.pth'))
    with pytest.raises(InputError, match='is a checkpoint of stage 1; this run has the seeds 123'):
        RunFolder(tmp_path / 'new', {123: arguments}, str(run / 'last.pth'))
    # another run's folder is left alone
    other = tmp_path / 'other'
    shutil.copytree(whole(1), other)
    before = {path: path.read_bytes() for path in other.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r'holds an earlier run.*--overwrite'):
        RunFolder(other, {None: arguments | {'num_epoch': 5}}, str(run / 'last.pth'))
    assert before == {path: path.read_bytes() for path in before}
    with pytest.raises(InputError, match='has done 2 epochs already'):
        RunFolder(tmp_path / 'new', {None: arguments}, str(run / 'last.pth'))
    new = RunFolder(tmp_path / 'new', {None: arguments | {'num_epoch': 5}}, str(run / 'last.pth'))
    progress = new.state()['training']['progress']
    # its best checkpoint is not in the new folder, so the next epoch gives the best
    assert not progress['finished'] and progress['best'] is None and new.records == {None: 0}


def test_the_best_checkpoint_of_epochs_that_are_dropped_is_replaced(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    arguments = torch.load(run / 'last.pth', weights_only=True)['training']['arguments'] | {'num_epoch': 5}
    resumed = RunFolder(run, {None: arguments}, str(run / 'last.pth'))
    resumed.remove_earlier_run()
    assert resumed.state()['training']['progress']['best'] and (run / 'best.pth').is_file()
    best = torch.load(run / 'best.pth', weights_only=True)
    best['epoch'] = 4  # of a longer training, from which an earlier checkpoint is resumed
    torch.save(best, run / 'best.pth')
    resumed = RunFolder(run, {None: arguments}, str(run / 'last.pth'))
    assert (run / 'best.pth').is_file()
    resumed.remove_earlier_run()
    progress = resumed.state()['training']['progress']
    assert progress['best'] is None and progress['best_epoch'] == progress['epoch'] == 2
    assert torch.load(run / 'best.replaced', weights_only=True)['epoch'] == 4 and not (run / 'best.pth').exists()
    # stopped before it saved anything, it has no best either
    earlier = RunFolder(run, {None: arguments | {'num_epoch': 2}})
    assert earlier.state()['training']['progress']['best'] is None
    for content in (b'damaged', torch.load(run / 'best.replaced', weights_only=True)['model']):
        torch.save(content, run / 'best.pth')
        RunFolder(run, {None: arguments}, str(run / 'last.pth')).remove_earlier_run()
    assert {path.name for path in run.glob('best*')} == {'best.replaced', 'best.2.replaced', 'best.3.replaced'}


def test_a_validation_list_that_was_not_there_is_named(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    arguments = torch.load(run / 'last.pth', weights_only=True)['training']['arguments']
    without = {name: value for name, value in arguments.items() if name != 'content of validation list'}
    with pytest.raises(InputError, match=r'content of validation list was .*, is none'):
        RunFolder(run, {None: without})
    resumed = RunFolder(run, {None: without | {'num_epoch': 3}}, str(run / 'last.pth'))
    resumed.remove_earlier_run()
    # it was chosen on images that are not looked at any more
    assert resumed.state()['training']['progress']['best'] is None and (run / 'best.replaced').is_file()


def test_a_run_that_is_refused_changes_nothing(run_script, shapes, whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    other_classes = tmp_path / 'renamed.pth'
    state = torch.load(run / 'previous.pth', weights_only=True)
    state['config']['classes'][0][1] = 'another'
    torch.save(state, other_classes)
    (run / '.lock').unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    for flags, expected in (
        (('--resume', 'off', '--overwrite', '--restore-from', tmp_path / 'typo.pth'), (1, 'there is no')),
        (('--resume', 'off', '--overwrite', '--restore-from', run), (2, 'would remove what --restore-from')),
        (('--resume', 'off', '--overwrite', '--restore-from', run / 'best.pth'), (2, 'would remove')),
        (('--resume', other_classes, '--overwrite', '--num-epoch', 9), (1, 'another, expected dotted disc')),
        (('--num-epoch', 9), (1, 'num_epoch was 2, is 9')),
    ):
        code, output = run_script(*stage_1(shapes, run, *flags))
        assert code == expected[0] and expected[1] in output, output
        now = {path: path.read_bytes() for path in run.rglob('*') if path.is_file() and path.name != '.lock'}
        assert now == before


def test_runs_saved_before_an_argument_existed_resume(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    state = torch.load(run / 'last.pth', weights_only=True)
    arguments = dict(state['training']['arguments'])
    del state['training']['arguments']['precision'], state['config']['classes']
    state['training']['arguments']['a former flag'] = 1
    torch.save(state, run / 'last.pth')
    classes = DATASETS['shapes'].legend(0).classes
    assert RunFolder(run, {None: arguments | {'views': 0, 'a new flag': 1}}, 'auto', classes=classes).holds()
    with pytest.raises(InputError, match='views was 0, is 20'):
        RunFolder(run, {None: arguments | {'views': 20}}, 'auto', classes=classes)


def test_lost_and_damaged_records_are_reported(whole, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    arguments = torch.load(run / 'last.pth', weights_only=True)['training']['arguments']
    path = run / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    RunLogger(run, {}, RunFolder(run, {None: arguments}, 'auto')).close()
    assert path.read_bytes() == b''.join(lines) and 'lacks records' not in capsys.readouterr().out
    path.write_bytes(b''.join([lines[0], b'\x00\x00\n', lines[2][:9]]))
    RunLogger(run, {}, RunFolder(run, {None: arguments}, 'auto')).close()
    assert path.read_bytes() == lines[0] and 'lacks records' in capsys.readouterr().out


def test_adding_or_resuming_one_seed_keeps_the_records_of_the_others(
    run_script, shapes, base_run, few_shot_run, tmp_path
):
    def run(seeds, *flags):
        code, output = run_script(*stage_2(shapes, base_run, tmp_path, *flags, '--random-seed', seeds))
        assert code == 0 and 'lacks records' not in output, output
        lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
        return {seed: [line for line in lines if json.loads(line)['seed'] == seed] for seed in (123, 234)}

    first = run('123')
    assert first[123] and not first[234]
    both = run('234')
    assert both[123] == first[123] and both[234]
    assert run('123,234') == both
    longer = run('123', '--num-epoch', 3, '--resume', tmp_path / 'last_123.pth')
    assert longer[234] == both[234] and longer[123][: len(both[123])] == both[123] != longer[123]
    # resumed within the second epoch: no record is there twice
    again = run('123', '--num-epoch', 3, '--resume', tmp_path / 'previous_123.pth')
    assert again == longer


@pytest.mark.parametrize('overwrite', ((), ('--resume', 'off', '--overwrite')))
def test_the_folder_of_the_other_stage_is_left_alone(run_script, shapes, base_run, few_shot_run, tmp_path, overwrite):
    shutil.copy(base_run / 'best.pth', tmp_path)
    for folder, command in (
        (base_run, stage_2(shapes, tmp_path / 'best.pth', base_run, *overwrite)),
        (few_shot_run, stage_1(shapes, few_shot_run, *overwrite)),
    ):
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != '.lock'}
        code, output = run_script(*command)
        assert code == 1 and f'holds a run of stage {1 if folder == base_run else 2}' in output, output
        assert before == {path: path.read_bytes() for path in before}


def test_a_copy_is_not_taken_for_a_seed(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole(1), run)
    (run / 'best.pth').rename(run / 'best_50epochs.pth')
    arguments = torch.load(run / 'last.pth', weights_only=True)['training']['arguments']
    assert RunFolder(run, {None: arguments}, 'auto').holds()


def test_a_run_without_a_readable_checkpoint_is_refused(tmp_path):
    (tmp_path / 'last.pth').write_bytes(b'')
    with pytest.raises(InputError, match='no earlier good checkpoint'):
        RunFolder(tmp_path, {None: {}}, 'auto')


def test_a_folder_is_used_by_one_run_at_a_time(shapes, tmp_path):
    with locked(tmp_path):
        code, output = run_process(*stage_1(shapes, tmp_path))
        assert code == 1 and f'in use by another run (process {os.getpid()}' in output, output
    with locked(tmp_path):
        pass


def test_saving_by_the_clock(run_script, shapes, tmp_path):
    code, output = run_script(*stage_1(shapes, tmp_path, '--save-every-steps', 0, '--save-every-minutes', 1e-4))
    assert code == 0, output
    progress = torch.load(tmp_path / 'previous.pth', weights_only=True)['training']['progress']
    assert progress['epoch'] == 1 and progress['step'] > 0
