"""The benchmark compares forms that compute the same, and runs at all (here on small images)."""

import importlib
import json
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import cases, gpu, gpu_cases, run, steps
from benchmarks.sides import measure

SMALL = 65  # side of images


@pytest.mark.parametrize('path', ('inference', 'confusion_matrix', 'cached_validation'))
def test_both_sides_find_the_same(path):
    setting = cases.PATHS[path][1][0]
    plain, ours = (torch.as_tensor(cases.make_call(path, setting, side, SMALL)()) for side in cases.SIDES[:2])
    if path == 'inference':
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    elif path == 'confusion_matrix':
        assert torch.equal(ours, plain)
    else:  # cached features are in half precision
        assert plain.sum() == ours.sum() > 0
        assert (ours - plain).abs().sum() <= 0.02 * plain.sum()


@pytest.mark.parametrize('path', ('stage1_step', 'stage2_step', 'kept_step'))
def test_steps_change_what_is_trained_by_the_same_losses(path, monkeypatch):
    nets, losses = [], []
    make = steps.network
    monkeypatch.setattr(steps, 'network', lambda *args: nets.append(make(*args)) or nets[-1])
    for side in cases.SIDES:
        step = cases.make_call(path, cases.PATHS[path][1][0], side, SMALL)
        net = nets[-1].net if side == 'plain' else nets[-1]
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        losses.append(step().item())
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        if path != 'stage1_step':
            assert changed == {'novel_emb', *(f'classifier_n.{i}.weight' for i in (0, 2, 4))}
        else:
            assert {'base_emb', 'backbone.conv1.weight', 'decoder.bottleneck.0.weight'} <= changed
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[-1] == pytest.approx(losses[0], rel=0.05)


def test_only_the_plain_side_has_nothing_but_pytorchs_own_convolutions():
    def convolutions(plain):
        net = steps.network(steps.Variant(cases.CPU, torch.float32, plain), 3)
        return {type(module) for module in net.modules() if isinstance(module, torch.nn.Conv2d)}

    assert convolutions(True) == {torch.nn.Conv2d} < convolutions(False)


def test_sides_take_turns_in_processes_of_their_own():
    make = partial(partial, time.sleep)
    times = {name: partial(make, seconds) for name, seconds in (('quick', 0.02), ('slow', 0.2))}
    sides = measure(times, rounds=2, turn=0.1)
    assert 0.02 <= sides['quick']['s'] < 0.2 <= sides['slow']['s']
    assert all(side['mb'] > 10 and side['flop'] == 0 for side in sides.values())


def test_projections_add_up(capsys):
    times = {
        'stage2_step': (36.0, 3.6), 'kept_step': (36.0, 0.36), 'cached_validation': (7.2, 0.36),
        'inference': (None, 3.6),
    }  # fmt: skip
    rows = [
        {'path': path, 'setting': setting, 'precision': side, 'plain_s': plain, 'ours_s': ours}
        for path, (plain, ours) in times.items()
        for setting in ('15+5', '60+20')
        for side in cases.SIDES[1:]
    ]
    voc, validated_once = run.project(rows)[:2]
    assert voc['plain_h'] == pytest.approx(500 * (15 * 36 + 1449 * 7.2) / 3600)
    assert voc['ours_h'] == pytest.approx(1449 * 0.001 + 500 * (15 * 0.001 + 1449 * 0.0001))
    assert voc['views_h'] == pytest.approx((1449 + 20 * 20) * 0.001 + 500 * (15 * 0.0001 + 1449 * 0.0001))
    assert validated_once['views_h'] == pytest.approx((1449 + 20 * 20) * 0.001 + 500 * 15 * 0.0001 + 1449 * 0.0001)
    assert [gain['ratio'] for gain in run.kept_gains(rows)] == pytest.approx([10] * len(cases.SIDES[1:]) * 2)
    assert 'VOC' in capsys.readouterr().out


def test_without_a_gpu_its_checks_are_listed(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['gpu.py', '--only', 'overflow', 'speed'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main() == 3
    listed = capsys.readouterr().out
    assert 'overflow' in listed and 'speed' in listed and 'smoke' not in listed


def small(folder, **more):
    """Where the parts of gpu.py run in tests."""
    sizes = {'backbone': 'resnet18', 'classes': (3,), 'batch': 2, 'images': 4, 'script_size': 33}
    return gpu_cases.Setting(cases.CPU, SMALL, folder, **{**sizes, 'rounds': 1, 'warmup': 0, 'steps': 2, **more})


PARTS = {'overflow': 1, 'reference': 4, 'precision': 1, 'evaluation': 3, 'speed': 8, 'validation': 4, 'loading': 3}


def test_parts_of_the_gpu_benchmark_run_on_a_cpu(tmp_path, capsys):
    """Those that need neither a GPU nor scripts, on small images; what they compare agrees."""
    setting = small(tmp_path)
    for name, count in PARTS.items():
        rows = list(gpu.run_parts([name], setting))
        expected = count * len({torch.float32, setting.half}) if name == 'speed' else count
        assert len(rows) == expected and all(row.passed for row in rows), capsys.readouterr().out
        assert all(row.value >= 0 and gpu.as_json(row)['value'] is not None for row in rows)
    assert not gpu_cases.Row('', float('nan'), 1.0).passed
    assert gpu.as_json(gpu_cases.Row('', float('inf')))['value'] is None
    json.dumps(gpu.as_json(gpu_cases.Row('', np.float64(1), np.float64(2))))


def test_real_photographs_take_the_place_of_drawn_ones(voc_mini, tmp_path):
    ids, samples = small(tmp_path, data_dir=voc_mini).photographs(1000)
    assert len(ids) == 1000 and samples.read(ids[-1])[1].max() > 0
    validate = gpu_cases.make_validation(
        small(tmp_path, data_dir=voc_mini), 'memory', torch.float32, cases.CPU, images=2, backbone='resnet18'
    )
    assert validate().sum() > 0


def test_commands_of_the_gpu_benchmark_are_valid(tmp_path, monkeypatch):
    """The scripts parse their command lines; what they would write is made here, as parts read it."""
    started = []

    def parse_only(*command, **environment):
        command = [str(part) for part in command]
        launched = [word for word in command if word.endswith('.py') or word in ('utils.gen_fs_list', 'utils.predict')]
        script, flags = launched[0], command[command.index(launched[0]) + 1 :]
        started.append(script)
        if script == 'benchmarks/gpu_processes.py':
            return 0, 'a warning\n{"outputs": [0.0, 1e-9]}'
        args = importlib.import_module(script.removesuffix('.py')).parse_args(flags)
        if script == 'train_base.py':
            args.snapshot_dir.mkdir(exist_ok=True)
            torch.save({'model': {'weight': torch.ones(3)}}, args.snapshot_dir / 'last.pth')
            records = ({'kind': 'val'}, {'kind': 'train', 'ce': 1.0})
            (args.snapshot_dir / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
        return (1, 'out of memory: use --accumulate') if '-c' in command else (0, '')

    monkeypatch.setattr(gpu_cases, 'run_script', parse_only)
    parts = {'smoke': 16, 'golden': 2, 'resume': 2, 'processes': 3, 'memory': 1}
    for name, count in parts.items():
        rows = list(gpu.run_parts([name], small(tmp_path)))
        assert len(rows) == count and all(row.passed for row in rows), rows
    assert Counter(started) == {
        'train_base.py': 2 + 2 + 5 + 1 + 1, 'utils.gen_fs_list': 2, 'ft_pop.py': 6, 'test.py': 4, 'utils.predict': 2,
        'benchmarks/gpu_processes.py': 1,
    }  # fmt: skip


def test_a_part_that_breaks_fails_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PARTS, 'speed', lambda setting: 1 / 0)
    setting = small(tmp_path)
    failed, *others = gpu.run_parts(['speed', 'overflow'], setting)
    assert not failed.passed and len(others) == 1 and others[0].passed
