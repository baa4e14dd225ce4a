"""The methods beside POP through all scripts, and the examples of docs/extend.md."""

import json
import re

import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAINING, same_results

import ft_pop
from engine import precision
from engine.trainer import Trainer
from model import BACKBONES, MODELS, base_model


@pytest.mark.parametrize('in_half', ((), ('--fp16',)))
@pytest.mark.parametrize(
    ('name', 'flags'),
    (
        ('pspnet_ft', ('--train', 'decoder', '--views', 1, '--base-views', 2)),
        ('pspnet_capl', ()),
        ('pspnet_joint', ('--background', 'novel', '--base-views', 2)),
        ('pspnet_lda', ('--base-views', 2)),
    ),
)
def test_every_script_runs_and_interrupted_runs_resume_to_the_same_weights(
    tiny, run_script, shapes, tmp_path, monkeypatch, name, flags, in_half
):
    base_name, registers = base_model(name), not MODELS[name].TRAINS_NOVEL
    base_data = (*TINY, '--backbone', tiny, '--data-dir', shapes, *in_half, '--model', base_name)
    data = ('--dataset', 'shapes', '--base-size', '65,65', '--num-workers', 0, '--data-dir', shapes, *in_half)
    train = (*TINY_TRAINING, '--input-size', '33,33', '--num-epoch', 1, '--save-every-steps', 1)
    monkeypatch.setattr(precision, 'computes_in_bfloat16', lambda: True)
    run_script('utils/gen_fs_list.py', *data[:2], '--data-dir', shapes, '--shot', 1, '--seed', 123)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'

    def stage_1(folder):
        return run_script(
            'train_base.py', *base_data, *train, '--no-memory', '--restore-from', 'none', '--batch-size', 50,
            '--snapshot-dir', folder / 'base',
        )  # fmt: skip

    def stage_2(folder):
        return run_script(
            'ft_pop.py', *data, '--model', name, *train, '--restore-from', whole / 'base', '--snapshot-dir',
            folder / 'novel', *flags, '--batch-size', 8, '--features-disk-gb', 0,
        )  # fmt: skip

    for stage, part, names in ((stage_1, 'base', ('best', 'last')), (stage_2, 'novel', ('best_123', 'last_123'))):
        code, output = stage(whole)
        assert code == 0 and ('crops of 33x33' in output) is not (stage is stage_2 and name == 'pspnet_capl'), output
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, 'step', ends_after(1, Trainer.step))
            if registers:
                patch.setattr(MODELS[name], 'start_from_supports', ends_after(0, None))
            assert stage(killed)[0] == 9
        code, output = stage(killed)
        assert code == 0 and ('resumed at epoch 1, step 2' in output or registers), output
        same_results(whole / part, killed / part, names)
    code, output = stage_2(killed)
    assert code == 0 and 'finished earlier' in output, output
    unused = {'pspnet_capl': '--input-size, --batch-size', 'pspnet_lda': '--batch-size'}.get(name)
    assert (f'nothing, so {unused}, --num-epoch have no effect' in output) is registers
    last, base = (torch.load(whole / name, weights_only=True) for name in ('novel/last_123.pth', 'base/best.pth'))
    novel, base = last['model'], base['model']
    changed = {key.split('.')[0] for key in {*novel} & {*base} if not torch.equal(novel[key], base[key])}
    assert changed == ({'decoder'} if name == 'pspnet_ft' else set())
    assert not any(key.startswith('auxiliary') for key in novel)
    assert ('batch_size' in last['training']['arguments']) is not registers  # other processes may resume it
    rate = json.loads((whole / 'base/args.json').read_text())['learning_rate']
    assert rate == MODELS[base_name].BASE_LEARNING_RATE == (1e-2 if name == 'pspnet_capl' else 1e-3)
    code, output = run_script('test.py', *data, '--restore-from', whole / 'novel')
    assert code == 0 and f'"model": "{name}"' in (whole / 'novel/results.json').read_text(), output
    code, output = run_script('test.py', *data, '--restore-from', whole / 'novel', '--model', 'pspnet_pop')
    assert code == 1 and f'is a checkpoint of {name}, expected pspnet_pop. Give --model {name}' in output
    assert 'os is 32, expected 8' in run_script('test.py', *data, '--restore-from', whole / 'novel', '--os', 8)[1]
    code, output = run_script(
        'utils/predict.py', '--restore-from', whole / 'novel', '--images', next((shapes / 'JPEGImages').glob('*.jpg')),
        '--save-path', tmp_path / 'segmented', '--num-workers', 0,
    )  # fmt: skip
    assert code == 0 and '1 of 1 images segmented' in output, output
    for command in ('utils/teach.py', 'utils/memory.py') if base_name == name else ():
        own = ('--support', shapes, '--out', tmp_path / 'out') if 'teach' in command else ('--data-dir', shapes)
        code, output = run_script(command, '--restore-from', whole / 'base', *own)
        assert code == 1 and 'takes pspnet_pop only' in output, output


def test_a_recipe_stands_for_defaults_and_flags_have_priority(shapes, tmp_path, capsys):
    def parsed(*flags):
        required = ('--dataset', 'shapes', '--data-dir', shapes, '--restore-from', 'none', '--snapshot-dir', tmp_path)
        args = vars(ft_pop.parse_args(list(map(str, (*required, *flags)))))
        return args, {name: args[name] for name in ('model', 'views', 'batch_size', 'num_epoch', 'val_every')}

    names = ('model', 'views', 'batch_size', 'num_epoch', 'val_every')
    assert parsed()[1] == dict(zip(names, ('pspnet_pop', 0, 1, 500, 1), strict=True))
    args, best = parsed('--recipe', 'best', '--shot', 5)
    assert best == dict(zip(names, ('pspnet_joint', 20, 4, 16, 16), strict=True)) and args['calibration'] == 'base'
    assert args['discriminants'] == 'none' and parsed('--recipe', 'best')[0]['discriminants'] == 'added'
    assert parsed('--recipe', 'best', '--model', 'pspnet_ft')[0]['discriminants'] is None
    changed = parsed('--views', 7, '--shot', 100, '--recipe', 'best', '--model', 'pspnet_pop')[1]
    assert changed == dict(zip(names, ('pspnet_pop', 7, 4, 1, 1), strict=True))
    long = parsed('--recipe', 'best', '--shot', 5, '--num-epoch', 160)[1]
    assert (long['num_epoch'], long['val_every']) == (160, 160)  # also then, no evaluation image stops it
    for images, choice in ((1, 'added'), (2, 'none')):
        own = tmp_path / 'own.csv'
        own.write_text('\n'.join(f'{c},image_{i}' for c in range(1, 6) for i in range(images if c == 3 else 1)))
        args, _ = parsed('--recipe', 'best', '--shot', 10, '--support-list', own)
        assert (args['discriminants'], args['num_epoch']) == (choice, 8)
        assert (
            parsed('--recipe', 'best', '--support-list', own, '--discriminants', 'added')[0]['discriminants'] == 'added'
        )
    with pytest.raises(SystemExit):
        parsed('--recipe', 'best', '--support-list', tmp_path / 'none.csv')
    assert 'none.csv cannot be read' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed('--recipe', 'worst')
    assert "invalid choice: 'worst'" in capsys.readouterr().err


def ends_after(count, function):
    """The function, which ends the program after so many calls."""
    calls = iter(range(count))

    def call(*args):
        if next(calls, None) is None:
            raise SystemExit(9)
        return function(*args)

    return call


@pytest.mark.parametrize(
    ('script', 'flags', 'words'),
    (
        ('train_base.py', ('--model', 'pspnet_capl', '--batch-size', 7), 'into 2 parts; use a multiple of 2'),
        (
            'train_base.py',
            ('--model', 'pspnet_capl', '--batch-size', 6, '--accumulate', 2, '--fix-bn'),
            'use a multiple of 4',
        ),
        ('ft_pop.py', ('--train', 'decoder'), '--model pspnet_pop: POP has no train decoder; it has no options'),
        ('train_base.py', ('--model', 'pspnet_joint'), "invalid choice: 'pspnet_joint'"),
        ('ft_pop.py', ('--model', 'pspnet'), 'pspnet_capl'),
    ),
)
def test_flags_that_do_not_fit_a_method_are_refused(run_script, shapes, tmp_path, script, flags, words):
    code, output = run_script(
        script, *TINY, '--data-dir', shapes, '--restore-from', 'none', '--snapshot-dir', tmp_path, *flags
    )
    assert code == 2 and words in output


def test_the_examples_of_the_documentation_run(tiny, run_script, shapes, tmp_path):
    """A method and a backbone of one's own, through all scripts."""
    run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', shapes, '--shot', 1, '--seed', 123)
    documentation = (ROOT / 'docs' / 'extend.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', documentation, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    rows = ((MODELS, 'pspnet_linear', 'Linear'), (BACKBONES, 'regnet_x_400mf', 'RegNet'))
    for table, row, name in rows:
        assert f"'{row}': {name}" in documentation
        table[row] = names[name]
    try:
        network = ('--model', 'pspnet_linear', '--backbone', 'regnet_x_400mf')
        data = (*TINY, '--data-dir', shapes, *network)
        train = (*data, *TINY_TRAINING, '--input-size', '33,33', '--num-epoch', 1)
        base, novel = tmp_path / 'base', tmp_path / 'novel'
        for command in (
            ('train_base.py', *train, '--restore-from', 'none', '--snapshot-dir', base, '--batch-size', 100),
            ('ft_pop.py', *train, '--restore-from', base, '--snapshot-dir', novel, '--batch-size', 15),
            ('test.py', *data, '--restore-from', novel),
        ):
            code, output = run_script(*command)
            assert code == 0, output
        results = json.loads((novel / 'results.json').read_text())
        assert results['model'] == 'pspnet_linear'
        states = [torch.load(path, weights_only=True)['model'] for path in (base / 'best.pth', novel / 'last_123.pth')]
        assert {key for key in states[1] if key not in states[0]} == {'novel.weight', 'novel.bias'}
        assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    finally:
        for table, row, _ in rows:
            del table[row]
