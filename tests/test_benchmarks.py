"""The benchmark compares forms that compute the same, and runs at all (here on small images)."""

import time
from functools import partial

import pytest
import torch

from benchmarks import cases, gpu, gpu_cases, run
from benchmarks.sides import measure


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cases, 'SIZE', 65)
    monkeypatch.setattr(cases, 'HEIGHT', 49)


@pytest.mark.parametrize('path', ('inference', 'confusion_matrix', 'cached_validation'))
def test_both_sides_find_the_same(path):
    setting = cases.PATHS[path][1][0]
    plain, ours = (torch.as_tensor(cases.make_call(path, setting, side)()) for side in cases.SIDES[:2])
    if path == 'inference':
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    elif path == 'confusion_matrix':
        assert torch.equal(ours, plain)
    else:  # cached features are in half precision
        assert plain.sum() == ours.sum() > 0
        assert (ours - plain).abs().sum() <= 0.02 * plain.sum()


@pytest.mark.parametrize('path', ('stage1_step', 'stage2_step'))
@pytest.mark.parametrize('side', cases.SIDES)
def test_steps_change_what_is_trained(path, side, monkeypatch):
    nets = []
    make = cases.network
    monkeypatch.setattr(cases, 'network', lambda *args: nets.append(make(*args)) or nets[-1])
    step = cases.make_call(path, cases.PATHS[path][1][0], side)
    net = nets[0].net if side == 'plain' else nets[0]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    if path == 'stage2_step':
        assert changed == {'novel_emb', *(f'classifier_n.{i}.weight' for i in (0, 2, 4))}
    else:
        assert {'base_emb', 'backbone.conv1.weight', 'decoder.bottleneck.0.weight'} <= changed


def test_only_the_plain_side_has_nothing_but_pytorchs_own_convolutions():
    def convolutions(side):
        return {type(module) for module in cases.network(side, 3).modules() if isinstance(module, torch.nn.Conv2d)}

    assert convolutions('plain') == {torch.nn.Conv2d} < convolutions('fp32')


def test_sides_take_turns_in_processes_of_their_own():
    make = partial(partial, time.sleep)
    times = {name: partial(make, seconds) for name, seconds in (('quick', 0.02), ('slow', 0.2))}
    sides = measure(times, rounds=2, turn=0.1)
    assert 0.02 <= sides['quick']['s'] < 0.2 <= sides['slow']['s']
    assert all(side['mb'] > 10 and side['flop'] == 0 for side in sides.values())


def test_projections_add_up(capsys):
    times = {'stage2_step': (36.0, 3.6), 'cached_validation': (7.2, 0.36), 'inference': (None, 3.6)}
    rows = [
        {'path': path, 'setting': setting, 'precision': side, 'plain_s': plain, 'ours_s': ours}
        for path, (plain, ours) in times.items()
        for setting in ('15+5', '60+20')
        for side in cases.SIDES[1:]
    ]
    voc = run.project(rows)[0]
    assert voc['plain_h'] == pytest.approx(500 * (15 * 36 + 1449 * 7.2) / 3600)
    assert voc['ours_h'] == pytest.approx(1449 * 0.001 + 500 * (15 * 0.001 + 1449 * 0.0001))
    assert 'VOC' in capsys.readouterr().out


def test_without_a_gpu_its_checks_are_listed(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['gpu.py', '--only', 'overflow', 'speed'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main() == 3
    listed = capsys.readouterr().out
    assert 'overflow' in listed and 'speed' in listed and 'smoke' not in listed


def test_checks_of_the_gpu_pass_on_a_cpu(tmp_path, capsys):
    """Those that need no GPU, on small images: they run, and what they compare agrees."""
    setting = gpu_cases.Setting(cases.CPU, 65, tmp_path, backbone='resnet18')
    rows = gpu.run_parts(['overflow', 'reference', 'evaluation'], setting)
    assert len(rows) == 8 and all(row.passed for row in rows), capsys.readouterr().out
    assert not gpu_cases.Row('', float('nan'), 1.0).passed
    for plain in (False, True):
        assert gpu_cases.stage_1_step(setting, torch.float32, 3, 2, plain)().isfinite()
        assert gpu_cases.stage_2_step(setting, torch.float32, plain)().isfinite()


def test_a_part_that_breaks_fails_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PARTS, 'speed', lambda setting: 1 / 0)
    setting = gpu_cases.Setting(cases.CPU, 65, tmp_path)
    failed, *others = gpu.run_parts(['speed', 'overflow'], setting)
    assert not failed.passed and len(others) == 1 and others[0].passed
