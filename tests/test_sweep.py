"""The sweep: its tables against hand-made results, and that it resumes after a kill."""

import csv
import json
import sys
import time

import numpy as np
import pytest
from conftest import TINY, TINY_TRAINING
from forked import Forked

from core.errors import InputError
from engine import commands
from engine.commands import Step
from engine.metrics import SUMMARY, summarize
from model import MODELS
from report.sweep_tables import paired_lines, read_results, table_lines, with_weights, write_tables
from report.tables import latex_table, markdown_table
from utils import sweep

FLAGS = ' '.join(map(str, TINY[2:]))
TRAINING = ' '.join(map(str, (*TINY_TRAINING, '--num-epoch', 1)))


def command(shapes, out, *more):
    return [
        '--data', f'shapes={shapes}', '--fold', '0', '--shot', '1', '--seed', '123', '234', '--out', str(out),
        '--flags', FLAGS, '--training-flags', TRAINING, '--base-flags',
        '--restore-from none --batch-size 40 --no-memory', '--novel-flags', '--batch-size 5', *more,
    ]  # fmt: skip


def row(fold, seed, confusion, shot=1, model='pspnet_pop', **options):
    run = f'voc_fold{fold}/{shot}shot'
    place = {
        'model': model,
        'method': MODELS[model].described(options),
        'dataset': 'voc',
        'fold': fold,
        'shot': shot,
        'seed': seed,
        'run': run,
    }
    return place | {'weights': 'last', 'forgotten': 0.0} | summarize(np.array(confusion), num_base=1)


def test_the_table_is_mean_and_deviation_over_seeds():
    perfect = [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    half = [[10, 0, 0], [0, 10, 0], [0, 10, 0]]  # base 1/2 and novel 0
    rows = [row(0, 1, perfect), row(0, 2, half), row(1, 1, perfect), row(1, 2, perfect)]
    lines = table_lines(rows, (0, 1))
    # background 100 and base class 50 make a base mIoU of 75
    assert lines[0][:4] == ['POP', '1', '0', '87.50 ± 12.50'] and lines[0][4] == '50.00 ± 50.00'
    assert lines[1][3:7] == ['100.00 ± 0.00'] * 4 and lines[1][8] == 'voc_fold1/1shot'
    # each seed's mean over folds: 100 and (75 + 100) / 2
    assert lines[2][:4] == ['POP', '1', 'mean', '93.75 ± 6.25']
    incomplete = table_lines(rows[:3], (0, 1))
    assert incomplete[2][3] == '-' and incomplete[1][3] == '100.00'


def test_differences_are_paired_and_folds_count_alike():
    def iou(total):
        return {key: float(total) for key in (*SUMMARY, 'forgotten')}

    values = {'pspnet_pop': {0: (10, 20, 30), 1: (50, 52)}, 'pspnet_capl': {0: (13, 22, 34), 1: (49, 55)}}
    rows = [
        row(fold, seed, np.eye(3), model=model) | iou(value)
        for model, by_fold in values.items() for fold, of_fold in by_fold.items() for seed, value in enumerate(of_fold)
    ]  # fmt: skip
    lines = paired_lines(rows, (0, 1))
    # of 3, 2, 4 and of -1, 3: means 3 and 1, standard errors 1 / sqrt(3) and sqrt(8) / sqrt(2) = 2
    assert [line[:3] for line in lines] == [['CAPL', '1', fold] for fold in ('0', '1', 'mean')]
    assert lines[0][3:] == ['+3.00 ± 0.58'] * 5 + ['3'] and lines[1][3:] == ['+1.00 ± 2.00'] * 5 + ['2']
    assert lines[2][3:] == [f'+2.00 ± {(1 / 3 + 4) ** 0.5 / 2:.2f}'] * 5 + ['5']
    assert paired_lines(rows[:5], (0, 1)) == []  # nothing to compare
    alone = paired_lines([*rows[:1], *rows[5:6]], (0, 1))
    assert alone[0][3] == '+3.00' and alone[1][3] == alone[2][3] == '-'
    assert paired_lines([*rows[:1], *rows[6:7]], (0,)) == []  # not the same seed
    both = table_lines(rows, (0, 1))
    assert [line[0] for line in both] == ['POP', 'CAPL'] * 3 and both[0][3] == '20.00 ± 8.16' and both[4][3] == '-'


def test_a_method_whose_options_depend_on_the_shot_is_one_method():
    rows = [row(0, seed, np.eye(3), shot) for shot in (1, 5) for seed in (1, 2)]
    for shot, options in ((1, {'discriminants': 'added'}), (5, {})):
        rows += [row(0, seed, np.eye(3), shot, 'pspnet_joint', **options) for seed in (1, 2)]
    names = ['POP', 'POP, joint space (discriminants added)', 'POP', 'POP, joint space']
    for ordered, differing in ((rows, names[1::2]), (rows[4:] + rows[:4], ['POP', 'POP'])):
        table, differences = (lines(ordered, (0,)) for lines in (table_lines, paired_lines))
        assert sorted(line[0] for line in table) == sorted(names) and all('-' not in line for line in table)
        assert [(line[0], line[-1]) for line in differences] == [(name, '2') for name in differing]


def test_latex_escapes_and_separates_shots():
    lines = [['POP', '1', '0', '1 ± 2'], ['POP', '5', '0', '-']]
    text = ' '.join(latex_table('my_street: mIoU in %', ['method', 'shot', 'fold', 'Base'], lines).split())
    assert r'\caption{my\_street: mIoU in \%} \begin{tabular}{lrrc} \toprule' in text
    assert r'\toprule method & shot & fold & Base \\ \midrule POP' in text
    assert r'POP & 1 & 0 & 1 $\pm$ 2 \\ \midrule POP & 5 & 0 & - \\ \bottomrule \end{tabular} \end{table}' in text


def test_markdown_is_aligned_and_numbers_stay_as_they_are():
    header, *lines = ['name', 'Base'], ['a', '31.60 ± 1.20'], ['longer', '1.50'], ['1e3', '-']
    table = markdown_table(header, lines).splitlines()
    assert table[1].replace('-', '') == '|:|:|' and len(set(map(len, table))) == 1
    assert [[cell.strip() for cell in line.strip('|').split('|')] for line in table[:1] + table[2:]] == [header, *lines]
    assert all(line.endswith(f' {cell} |') for line, (_, cell) in zip(table[2:], lines, strict=True))


def test_a_step_is_repeated_when_one_that_it_builds_on_has_changed(tmp_path):
    first = Step('a', 'train_base', ('python', 'train_base.py', '1'), tmp_path / 'a')
    second = Step('b', 'ft_pop', ('python', 'ft_pop.py'), tmp_path / 'b', (first,))
    for step in (first, second):
        step.folder.mkdir()
        assert not step.done()
        step.note(1.0)
        assert step.done()
    changed = Step('a', 'train_base', ('python', 'train_base.py', '2'), tmp_path / 'a')
    assert not changed.done() and not Step('b', 'ft_pop', second.command, second.folder, (changed,)).done()


def test_jobs_share_gpus_or_cores(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6')
    shares = [commands.environment(slot, 2)['CUDA_VISIBLE_DEVICES'] for slot in range(2)]
    assert shares == ['4,6', '5']
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(commands, 'usable_cores', lambda: 8)
    crowded = commands.environment(4, 5)
    assert crowded['CUDA_VISIBLE_DEVICES'] == '5' and crowded['OMP_NUM_THREADS'] == '1'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    assert commands.environment(0, 3)['OMP_NUM_THREADS'] == '2' and 'OMP_NUM_THREADS' not in commands.environment(0, 1)


@pytest.mark.parametrize(
    ('flags', 'message'),
    (
        (('--data', 'shape=x'), 'expected one of voc'),
        (('--data', 'voc'), 'expected voc=DIR'),
        (('--shot-flags', 'five=--fix-lr'), "got 'five'; expected a whole number"),
        (('--shot-flags', '7=--fix-lr'), '--shot has 1'),
        (('--model-flags', 'pspnet_ft=--train decoder'), '--model has pspnet_pop'),
        (('--model-base-flags', 'pspnet_ft=--fix-bn'), '--model-base-flags pspnet_ft=--fix-bn: --model has pspnet_pop'),
        (('--novel-flags=--recipe best',), '--recipe sets the method'),
        (('--model-flags=pspnet_pop=--rec best',), '--recipe sets the method'),
        (('--model', 'pspnet_joint', '--model-base-flags=pspnet_joint=--fix-bn'), 'base networks of pspnet_pop'),
        (('--fold', '7'), 'fold 7 not supported'),
        (('--data', 'voc=a', 'coco=b', '--train-list', 'x'), 'for one data set only'),
    ),
)
def test_wrong_grids_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        sweep.parse_args([*command(tmp_path, tmp_path), *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_larger_grid_keeps_the_commands_of_a_smaller_one_and_flags_add_up(tmp_path):
    flags = [*command(tmp_path, tmp_path), '--novel-flags=--fix-lr', '--shot']
    of_shot = ['--shot-flags', '5=-x', '--shot-flags', '5=-y']
    small, large = (sweep.plan(sweep.parse_args([*flags, *more])) for more in (['1'], ['1', '5', *of_shot]))
    assert {step.command for step in small} < {step.command for step in large} and len(large) == len(small) + 4
    novel = [step.command for step in large if step.script == 'ft_pop']
    assert all('--fix-lr' in flags and '--batch-size' in flags for flags in novel)
    assert [('-x' in flags, '-y' in flags) for flags in novel] == [(False, False), (True, True)]


def test_methods_share_data_supports_and_where_they_can_the_base_network(tmp_path):
    flags = [
        *command(tmp_path, tmp_path), '--model-flags', 'pspnet_ft=--train decoder', '--model-base-flags',
        'pspnet_capl=--learning-rate 1e-2', '--nproc', '2',
    ]  # fmt: skip
    alone = sweep.plan(sweep.parse_args([*command(tmp_path, tmp_path), '--nproc', '2']))
    steps = sweep.plan(sweep.parse_args([*flags, '--model', 'pspnet_pop', 'pspnet_ft', 'pspnet_capl']))
    assert {step.command for step in alone} < {step.command for step in steps}  # those of POP stay as they are
    assert len({step.folder / step.script for step in steps}) == len(steps)
    count = {script: sum(step.script == script for step in steps) for script in ('train_base', 'gen_fs_list', 'ft_pop')}
    assert count == {'train_base': 3, 'gen_fs_list': 1, 'ft_pop': 3}
    (lists,) = (step for step in steps if step.script == 'gen_fs_list')
    for step in steps:
        model = step.command[step.command.index('--model') + 1] if '--model' in step.command else 'pspnet_pop'
        assert (model in step.folder.parts[-2 - (step.folder.name == 'last')]) is (model != 'pspnet_pop')
        if step.script == 'ft_pop':
            assert lists in step.after and ('decoder' in step.command) is (model == 'pspnet_ft')
        if step.script == 'train_base':
            assert ('1e-2' in step.command) is (model == 'pspnet_capl')


def test_base_networks_that_are_there_are_not_trained(tmp_path, capsys):
    flags = [*command(tmp_path, tmp_path), '--model', 'pspnet_pop', 'pspnet_lda', 'pspnet_capl']
    base = f'{tmp_path}/there/fold{{fold}}_{{model}}'
    with pytest.raises(InputError, match='fold0_pspnet_pop'):
        sweep.plan(sweep.parse_args([*command(tmp_path, tmp_path)[:-4], '--base', base]))
    for name in ('pop', 'capl'):
        (tmp_path / f'there/fold0_pspnet_{name}').mkdir(parents=True)
        (tmp_path / f'there/fold0_pspnet_{name}/best.pth').write_bytes(b'')
    at = flags.index('--base-flags')
    kept = flags[:at] + flags[at + 2 :]
    steps = sweep.plan(sweep.parse_args([*kept, '--base', base]))
    assert not any(step.script == 'train_base' for step in steps)
    starts = {step.command[step.command.index('--restore-from') + 1] for step in steps if step.script == 'ft_pop'}
    assert starts == {f'{tmp_path}/there/fold0_pspnet_{name}/best.pth' for name in ('pop', 'capl')}
    evaluated = [step for step in steps if step.script == 'test' and step.folder.name == 'base']
    assert len(evaluated) == 2 and all('--save-path' in step.command and not step.after for step in evaluated)
    # a method without training has the same weights twice
    count = {name: sum(step.script == 'test' and f'_pspnet_{name}' in str(step.folder) for step in steps)
             for name in ('lda', 'capl')}  # fmt: skip
    assert count == {'lda': 1, 'capl': 1 + 1}
    for other, message in (
        ((*kept, '--base', 'one'), 'is one network, but there are 2 of model'),
        ((*kept, '--base', '{model}{x}'), 'can stand in braces'),
        ((*kept, '--base', base, '--base-flags=--fix-bn'), 'of a training that --base takes the place of'),
    ):
        with pytest.raises(SystemExit):
            sweep.parse_args(other)
        assert message in capsys.readouterr().err


def test_tables_name_evaluations_that_left_images_out(tmp_path):
    result = {'checkpoint': 'best_1.pth', **dict.fromkeys(SUMMARY, 50.0)}
    seeds = {
        '1': result | {'images': 8, 'listed_images': 8},
        '2': result | {'images': 5, 'listed_images': 8},
        '3': result,  # older results do not say
    }
    (tmp_path / 'run').mkdir()
    content = {'dataset': 'shapes', 'fold': 0, 'shot': 1, 'seeds': seeds}
    (tmp_path / 'run/results.json').write_text(json.dumps(content))
    write_tables(tmp_path, read_results([tmp_path / 'run'], tmp_path), folds=[0], missing=['run, evaluation'])
    table = (tmp_path / 'table.md').read_text()
    assert 'Not evaluated: run, evaluation.' in table
    assert 'run, seed 2: on 5 of 8 images' in table and 'seed 1:' not in table and 'seed 3:' not in table
    rows = csv.DictReader((tmp_path / 'table.csv').read_text().splitlines())
    assert [row['images'] for row in rows] == ['8', '5', '']
    for damaged in (b'', b'{"seeds": ', b'\xff\xfe\xff', b'[1]', b'[' * 10**5):
        for name in ('results.json', 'sweep.json'):
            (tmp_path / 'run' / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r'run/results\.json is damaged: '):
            read_results([tmp_path / 'run'], tmp_path)
        with pytest.raises(InputError, match=r'run/sweep\.json is damaged: '):
            Step('name', 'test', ('command',), tmp_path / 'run').done()


def test_what_is_forgotten_is_told_by_stage_and_results_without_a_shot_are_named(tmp_path, capsys):
    def write(name, stage, shot, base, novel):
        means = dict.fromkeys(SUMMARY, 50.0) | {'base_without_background': base, 'novel': novel}
        content = {'dataset': 'shapes', 'fold': 0, 'stage': stage, 'shot': shot,
                   'seeds': {'1': {'checkpoint': 'best.pth', **means}}}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(content))
        return tmp_path / name

    base = write('base', 1, None, 60.0, None)
    few = write('few', 2, 1, 50.0, None)  # no image shows a novel class
    chosen = write('chosen', 2, None, 50.0, 10.0)
    (row,) = read_results([base, few, chosen], tmp_path)
    assert row['run'] == 'few' and row['forgotten'] == 10
    assert [len(with_weights([row | {'model': name}], 'best')) for name in ('pspnet_pop', 'pspnet_lda')] == [
        row['weights'] == 'best', 1
    ]  # fmt: skip
    assert 'chosen/results.json is in no table' in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_skips_what_is_done(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr(sweep.signals, 'listen', lambda: None)  # the handlers of this process stay
    out = tmp_path / 'out'
    flags = command(shapes, out, '--jobs', '2')
    process = Forked('-m', 'utils.sweep', *flags)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'base, training: done' in line:
            break
    time.sleep(2)
    process.kill()
    process.wait()
    done = sorted(out.glob('*/*/sweep.json'))
    assert done, lines
    before = {
        path: path.stat().st_mtime_ns for path in out.glob('*/base/best.pth') if path.parent / 'sweep.json' in done
    }
    sweep.main(sweep.parse_args(flags))
    output = capsys.readouterr().out
    assert '6 commands, 0 of them done' not in output and 'base, training: done' not in output
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())

    rows = list(csv.DictReader((out / 'table.csv').read_text().splitlines()))
    assert [(row['fold'], row['seed'], row['weights']) for row in rows] == [
        ('0', seed, weights) for weights in ('last', 'best') for seed in ('123', '234')
    ]
    before = json.loads((out / 'shapes_fold0/base/results.json').read_text())['seeds']['123']
    for row in rows:  # every number can be traced to its run
        result = json.loads((out / row['run'] / 'results.json').read_text())['seeds'][row['seed']]
        assert all(float(row[key]) == result[key] for key in SUMMARY)
        key = 'base_without_background'
        assert float(row['forgotten']) == before[key] - result[key]
        assert (out / 'shapes_fold0/1shot' / row['checkpoint']).is_file() and row['checkpoint'].startswith(
            row['weights']
        )
    assert 'shapes, weights of the last epoch: mIoU in %' in output
    assert r'\toprule' in (out / 'table.tex').read_text()
    assert f'* pspnet_pop, 1-shot: `{FLAGS} {TRAINING} --batch-size 5`' in output

    sweep.main(sweep.parse_args(flags))
    assert '6 commands, 6 of them done before' in capsys.readouterr().out


def test_a_failing_command_is_named_and_the_others_run(tmp_path, capsys):
    def step(name, code, *after):
        text = f'print("said {name}"); raise SystemExit({code})'
        return Step(name, 'test', (sys.executable, '-c', text), tmp_path / name, after)

    bad, good = step('bad', 3), step('good', 0)
    failed = commands.run([bad, step('never', 0, bad), good], 1, lambda step: None)
    output = capsys.readouterr().out
    assert failed == [bad] and good.done() and not (tmp_path / 'never').exists()
    assert 'bad: FAILED with exit code 3' in output and 'said bad' in output
