"""The three scripts for a few CPU steps, and the files that they write."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAINING
from forked import run_new, run_process
from PIL import Image

from core import parallel
from dataset import DATASETS
from dataset.masks import read_mask
from engine import precision as precisions


def records(folder, kind):
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return [record for record in map(json.loads, lines) if record['kind'] == kind]


def weights(path):
    return torch.load(path, weights_only=True)['model']


def test_stage_1_writes_the_documented_files(base_run):
    names = {path.name for path in base_run.iterdir()} - {'features'}  # of stage 2, if it ran before
    assert names == {
        'args.json',
        'log.txt',
        'metrics.jsonl',
        'tb',
        'memory.pt',
        '.lock',
        'last.pth',
        'previous.pth',
        'best.pth',
        'epoch_1.pth',
        'epoch_2.pth',
    }
    assert json.loads((base_run / 'args.json').read_text())['batch_size'] == 32
    validations = records(base_run, 'val')
    assert [record['epoch'] for record in validations] == [1, 2]
    best = torch.load(base_run / 'best.pth', weights_only=True)
    assert best['metrics']['base'] == max(record['base'] for record in validations)
    assert best['config'] == {
        'dataset': 'shapes', 'fold': 0, 'model': 'pspnet_pop', 'backbone': 'mobilenet_v2', 'os': 32,
        'base_size': [65, 65], 'classes': DATASETS['shapes'].legend(0).classes, 'card': DATASETS['shapes'].described(),
        'input_size': [65, 65], 'scale_range': [0.9, 1.1],
    }  # fmt: skip
    training = records(base_run, 'train')
    assert training[0]['lr_backbone'] == pytest.approx(1e-3) and training[0]['lr_head'] == pytest.approx(1e-2)
    steps = [record['step'] for record in training]
    total = steps[-1]
    for record in training:  # poly decay, power 0.9, every step
        assert record['lr_backbone'] == pytest.approx(1e-3 * (1 - (record['step'] - 1) / total) ** 0.9)
    assert training[-1]['ce'] < training[0]['ce']


def test_stage_2_changes_only_the_novel_parts(base_run, few_shot_run):
    base = weights(base_run / 'best.pth')
    for seed in (123, 234):
        last = weights(few_shot_run / f'last_{seed}.pth')
        assert all(torch.equal(last[key], value) for key, value in base.items())
        assert set(last) - set(base) == {'novel_emb', *(f'classifier_n.{i}.weight' for i in (0, 2, 4))}
        assert not torch.equal(last['classifier_n.0.weight'], base['classifier.0.weight'])
        assert (few_shot_run / f'best_{seed}.pth').is_file()
    assert not torch.equal(weights(few_shot_run / 'last_123.pth')['novel_emb'], last['novel_emb'])
    assert {record['seed'] for record in records(few_shot_run, 'val')} == {123, 234}
    # 15 steps, one per base class and shot
    assert max(record['step'] for record in records(few_shot_run, 'train')) == 30
    log = (few_shot_run / 'log.txt').read_text()
    assert 'seed 123, best (selected)' in log and 'seed 234, last' in log


@pytest.mark.parametrize('precision', ((), ('--fp16',)))
def test_every_script_runs_in_both_precisions(tiny, run_script, shapes, few_shot_run, tmp_path, precision, monkeypatch):
    monkeypatch.setattr(precisions, 'computes_in_bfloat16', lambda: True)
    # smaller still: bfloat16 is slow on processors without instructions for it
    data = (*TINY, '--backbone', tiny, '--data-dir', shapes, *precision)
    train = (*data, *TINY_TRAINING, '--input-size', '33,33', '--num-epoch', 1)
    code, output = run_script(
        'train_base.py', *train, '--restore-from', 'none', '--batch-size', 60, '--snapshot-dir', tmp_path / 'a',
        '--device', 'cpu', '--no-memory',
    )  # fmt: skip
    assert code == 0 and 'mIoU base' in output
    code, output = run_script(
        'ft_pop.py', *train, '--restore-from', tmp_path / 'a', '--batch-size', 5, '--snapshot-dir', tmp_path / 'b',
        '--fix-lr', '--freeze-backbone', '--update-base', '--update-epoch', 2, '--val-every', 2, '--shot', 2,
    )  # fmt: skip
    assert code == 0 and 'total' in output
    code, output = run_script('test.py', *data, '--restore-from', tmp_path / 'b', '--shot', 2)
    assert code == 0 and 'seed 123' in output
    assert {'results.json', 'results.md', 'confusion_123.npy'} <= {path.name for path in (tmp_path / 'b').iterdir()}


def test_mixed_precision_is_float32_where_the_processor_has_no_bfloat16(monkeypatch, capsys):
    net, image = torch.nn.Conv2d(3, 4, 1), torch.ones(1, 3, 2, 2)
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precisions, 'computes_in_bfloat16', lambda able=able: able)
        chosen = precisions.precision(image.device, True)
        with precisions.autocast(image.device, chosen):
            assert net(image).dtype == dtype == chosen
        assert ('no bfloat16 instructions' in capsys.readouterr().out) is not able
    assert precisions.precision(torch.device('cuda'), True) == torch.float16


def test_knows_processors_with_bfloat16():
    assert precisions.names_bfloat16('flags : fpu avx512f avx512_bf16 avx512_fp16\n')
    for cpuinfo in ('flags : amx_bf16 amx_tile\n', 'Features : i8mm bf16 dgh\n'):
        assert precisions.names_bfloat16(cpuinfo)
    assert not precisions.names_bfloat16('flags : fpu avx avx2 f16c avx512f avx512_vnni\n')


def test_evaluation_counts_every_pixel_of_the_original_masks(run_script, shapes, few_shot_run, tmp_path):
    code, output = run_script(
        'test.py', *TINY, '--data-dir', shapes, '--restore-from', few_shot_run / 'best.pth', '--random-seed', '123,234',
        '--save-path', tmp_path, '--save', '1', '--overlay', 2,
    )  # fmt: skip
    assert code == 0 and 'mean ± std' in output
    results = json.loads((tmp_path / 'results.json').read_text())
    ids = (shapes / 'list' / 'val.txt').read_text().split()
    masks = {i: read_mask(shapes / f'SegmentationClassAug/{i}.png') for i in ids}
    label = {0: 0, **{c: c - 5 for c in range(6, 21)}, **{c: c + 15 for c in range(1, 6)}}  # fold 0
    for seed in (123, 234):
        confusion = np.load(tmp_path / f'confusion_{seed}.npy')
        assert confusion.dtype == np.int64 and confusion.shape == (21, 21)
        truth = np.zeros(21, np.int64)
        expected = np.zeros((21, 21), np.int64)
        for i, mask in masks.items():
            path = tmp_path / f'predictions_{seed}' / f'{i}.png'
            prediction = read_mask(path)  # class ids, at the original size
            assert Image.open(path).mode == 'P' and prediction.shape == mask.shape
            for class_id in {*np.unique(mask)} - {255}:
                truth[label[class_id]] += (mask == class_id).sum()
                for predicted in np.unique(prediction):
                    both = (mask == class_id) & (prediction == predicted)
                    expected[label[class_id], label[predicted]] += both.sum()
        assert np.array_equal(confusion.sum(1), truth)
        assert np.array_equal(confusion, expected)
        assert results['seeds'][str(seed)]['checkpoint'].endswith(f'best_{seed}.pth')
        absent = [results['seeds'][str(seed)][key] for key in ('images', 'listed_images', 'classes_without_pixels')]
        names = DATASETS['shapes'].legend(0).names
        assert absent == [len(ids), len(ids), [name for name, count in zip(names, truth, strict=True) if not count]]
    # the same for both seeds
    assert output.count(f'Evaluated at 65x65 on {len(ids)} of {len(ids)} images. No pixel of ') == 1
    assert results['precision'] == 'float32'
    novel = [results['seeds'][seed]['novel'] for seed in ('123', '234')]
    assert results['mean']['novel'] == pytest.approx(np.mean(novel))
    assert results['std']['novel'] == pytest.approx(np.std(novel))
    pictures = [line.split(': ')[1] for line in output.splitlines() if line.startswith('picture: ')]
    assert len(pictures) == 4 and all(Image.open(path).size[0] > 900 for path in pictures)


def test_stage_2_and_evaluation_take_sizes_from_the_checkpoint(run_script, shapes, base_run, tmp_path):
    where = ('--dataset', 'shapes', '--data-dir', shapes, '--num-workers', 0)
    run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', shapes, '--shot', 1, '--seed', 123)
    flags = ('--restore-from', base_run, '--snapshot-dir', tmp_path, '--num-epoch', 1)
    code, output = run_script('ft_pop.py', *where, *flags)
    assert code == 0 and 'validation at 65x65' in output, output
    flags = json.loads((tmp_path / 'args.json').read_text())
    assert (flags['base_size'], flags['input_size'], flags['os']) == ([65, 65], [65, 65], 32)
    code, output = run_script('test.py', *where, '--restore-from', tmp_path)
    assert code == 0 and 'Evaluated at 65x65 on 8 of 8' in output and 'note' not in output, output
    assert f'results: {tmp_path / "results.md"}' in output
    for kind in ('best', 'last'):
        (tmp_path / f'{kind}_7.pth').hardlink_to(tmp_path / f'{kind}_123.pth')
    assert 'give --random-seed 7,123 to evaluate all' in run_script('test.py', *where, '--restore-from', tmp_path)[1]
    code, output = run_script(
        'ft_pop.py', *where, '--restore-from', base_run, '--snapshot-dir', tmp_path / 'f', '--fold', 1
    )
    assert code == 1 and 'fold is 0, expected 1' in output, output  # not that its lists are missing


def test_another_base_size_than_in_training_is_reported(run_script, shapes, base_run, tmp_path):
    flags = ('--data-dir', shapes, '--restore-from', base_run, '--save-path', tmp_path)
    assert 'was validated with' not in run_script('test.py', *TINY, *flags)[1]
    code, output = run_script('test.py', *TINY, *flags, '--base-size', '97,65')
    assert code == 0 and 'was validated with --base-size 65,65 in training; this evaluates at 97,65' in output, output


def test_an_untrained_network_scores_near_zero(run_script, shapes, tmp_path):
    torch.manual_seed(0)
    code, _ = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', 'none', '--save-path', tmp_path)
    summary = json.loads((tmp_path / 'results.json').read_text())['mean']
    assert code == 0 and summary['total'] < 6 and summary['novel'] < 3


def test_a_stage_1_network_is_evaluated_on_base_classes(run_script, shapes, base_run, tmp_path):
    code, output = run_script(
        'test.py', *TINY, '--data-dir', shapes, '--restore-from', base_run, '--save-path', tmp_path
    )
    assert code == 0, output
    assert np.load(tmp_path / 'confusion_123.npy').shape == (16, 16)
    assert json.loads((tmp_path / 'results.json').read_text())['mean']['novel'] is None


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_with_any_number_of_workers(shapes, tmp_path):
    for run, name, workers in ((run_new, 'a', 0), (run_process, 'b', 2)):
        code, output = run(
            'train_base.py', *TINY[:-1], workers, *TINY_TRAINING, '--data-dir', shapes,
            '--restore-from', 'none', '--snapshot-dir', tmp_path / name, '--num-epoch', 1, '--batch-size', 40,
            '--deterministic', '--no-memory',
        )  # fmt: skip
        assert code == 0, output
    a, b = weights(tmp_path / 'a' / 'last.pth'), weights(tmp_path / 'b' / 'last.pth')
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_start_epoch_continues_schedule_and_draws(run_script, shapes, base_run, tmp_path):
    code, output = run_script(
        'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run / 'epoch_1.pth',
        '--snapshot-dir', tmp_path, '--num-epoch', 2, '--start-epoch', 1, '--batch-size', 32, '--no-memory',
    )  # fmt: skip
    assert code == 0, output
    first, whole = records(tmp_path, 'train')[0], records(base_run, 'train')
    same_step = next(record for record in whole if record['step'] == first['step'])
    # the same weights meet the same batch at the same learning rate
    assert first['lr_backbone'] == same_step['lr_backbone']
    assert first['ce'] == pytest.approx(same_step['ce'], rel=1e-4)


def test_freezing_flags_freeze_what_they_name(run_script, shapes, base_run, tmp_path):
    before = weights(base_run / 'last.pth')
    for flag in ('--freeze-backbone', '--fix-bn', '--fix-lr'):
        code, output = run_script(
            'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run / 'last.pth',
            '--snapshot-dir', tmp_path / flag, '--num-epoch', 1, '--batch-size', 50, '--no-memory', flag,
        )  # fmt: skip
        assert code == 0, output
        after = weights(tmp_path / flag / 'last.pth')
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        backbone = {key for key in before if key.startswith('backbone.')}
        norm = {key.rsplit('.', 1)[0] for key in before if key.endswith('running_mean')}
        if flag == '--freeze-backbone':
            assert not changed & backbone and changed
        elif flag == '--fix-bn':
            assert not {key for key in changed if key.rsplit('.', 1)[0] in norm} and changed & backbone
        else:
            assert changed >= {key for key in before if key.endswith('running_mean')}
            assert {record['lr_backbone'] for record in records(tmp_path / flag, 'train')} == {1e-3}


def test_filter_novel_trains_on_fewer_images(run_script, shapes, tmp_path):
    code, output = run_script(
        'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', 'none', '--filter-novel',
        '--snapshot-dir', tmp_path, '--num-epoch', 1, '--batch-size', 30, '--no-memory',
    )  # fmt: skip
    assert code == 0, output
    filtered = (shapes / 'list/fold0_filter/train_fold0.txt').read_text().split()
    whole = (shapes / 'list/fold0/train_fold0.txt').read_text().split()
    assert set(filtered) < set(whole)
    assert f'{len(filtered)} of 120 training images' in output
    for image_id in filtered:
        assert not np.isin(read_mask(shapes / f'SegmentationClassAug/{image_id}.png'), range(1, 6)).any()


@pytest.mark.slow
def test_several_processes_train_and_evaluate_together(run_script, shapes, base_run, few_shot_run, tmp_path):
    code, output = run_process(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run,
        '--snapshot-dir', tmp_path / 'run', '--num-epoch', 1, '--batch-size', 4, '--shot', 2, processes=2,
    )  # fmt: skip
    assert code == 0, output
    single, together = tmp_path / 'one', tmp_path / 'three'
    flags = (*TINY, '--data-dir', shapes, '--restore-from', tmp_path / 'run', '--shot', 2)
    assert run_script('test.py', *flags, '--save-path', single)[0] == 0
    # 8 images: shares of 3, 3 and 2
    code, output = run_process('test.py', *flags, '--save-path', together, '--overlay', 2, '--plots', processes=3)
    assert code == 0, output
    assert np.array_equal(np.load(single / 'confusion_123.npy'), np.load(together / 'confusion_123.npy'))
    assert len(list((together / 'overlay_123').iterdir())) == 2 and len(list((together / 'plots').iterdir())) == 4


def test_missing_shapes_are_made(run_script, tmp_path):
    code, output = run_script(
        'test.py', *TINY, '--data-dir', tmp_path / 'new', '--restore-from', 'none', '--save-path', tmp_path
    )
    assert code == 0, output
    assert (tmp_path / 'new' / 'list' / 'val.txt').is_file()


def test_few_shot_lists_are_kept_or_refused_if_they_belong_to_other_data(run_script, shapes, few_shot_run, tmp_path):
    shutil.copytree(shapes / 'list', tmp_path / 'list')
    path = tmp_path / 'list/fold0/fold0_1shot_seed123.txt'

    def generate(*flags):
        return run_script(
            'utils/gen_fs_list.py', '--dataset', 'shapes', '--train-list', tmp_path / 'list' / 'trainaug.txt',
            '--shot', 1, '--seed', 123, 345, *flags,
        )  # fmt: skip

    drawn = path.read_text()
    mine = ''.join(f'train_000{i}\n' for i in range(5))
    path.write_text(mine)
    code, output = generate()
    assert code == 0 and f'kept {path}' in output and 'refuses this draw' not in output, output
    assert path.read_text() == mine
    base = tmp_path / 'list/fold0/train_base_class6.txt'
    listed = base.read_text()
    base.write_text(mine)  # so that every image of a base class is a support image
    code, output = generate()
    assert (
        code == 0
        and 'note: ft_pop.py refuses this draw, unless it draws no base images: base class dotted disc' in output
    ), output
    base.write_text(listed)
    other = (tmp_path / 'list/fold0/fold0_1shot_seed345.txt').read_text().split()
    assert len(other) == len(set(other)) == 5
    path.write_text('2007_000032\n')
    code, output = generate()
    assert code == 1 and '2007_000032' in output and 'belongs to other data' in output
    code, output = generate('--overwrite')
    assert code == 0 and path.read_text() == drawn


@pytest.mark.parametrize(('files', 'cores'), (
    ({'cpu.max': '150000 100000\n'}, 1.5),
    ({'cpu.max': 'max 100000\n'}, None),
    ({'cpu/cpu.cfs_quota_us': '300000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 3),
    ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, None),
    ({}, None),
))  # fmt: skip
def test_usable_cores_respect_the_quota_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert parallel._cgroup_quota(tmp_path) == (cores or os.cpu_count())
