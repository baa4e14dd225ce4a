"""The shell entry points, from another folder, with settings from the environment."""

import os
import subprocess

import cv2
import numpy as np
import pytest
from conftest import ROOT

from dataset import DATASETS
from dataset.lists import write_ids

SMALL = {'EPOCHS': '1', 'WORKERS': '0', 'BS_TEST': '4', 'SEED': '123', 'OMP_NUM_THREADS': '1'}
NETWORK = {
    'BACKBONE': 'mobilenet_v2',
    'OS': '32',
    'INPUT_SIZE': '65,65',
    'BASE_SIZE': '65,65',
}  # later in the checkpoint


def make_rectangles(folder, name, images):
    """A data set in the layout of VOC or COCO whose images show two classes each, all of them in turn."""
    spec = DATASETS[name]
    rng = np.random.default_rng(0)
    for split, count in (('train', images), ('val', 4)):
        ids = [f'{split}{i:03d}' for i in range(count)]
        dirs = [folder / kind for kind in spec.folders(split)]
        for directory in dirs:
            directory.mkdir(parents=True, exist_ok=True)
        for i, image_id in enumerate(ids):
            mask = np.zeros((150, 260), np.uint8)
            mask[5:145, 5:125] = i % len(spec.classes) + 1
            mask[5:145, 130:250] = (i + len(spec.classes) // 2) % len(spec.classes) + 1
            image = np.repeat(mask[:, :, None] * 3, 3, 2) + rng.integers(0, 9, (150, 260, 1), np.uint8)
            cv2.imwrite(str(dirs[0] / f'{image_id}.jpg'), image)
            cv2.imwrite(str(dirs[1] / f'{image_id}.png'), mask)
        write_ids(folder / 'list' / spec.list_path(split, None).name, ids)


@pytest.mark.parametrize(('name', 'base', 'novel', 'evaluate', 'processes'), (
    ('voc', 'train_voc_fold0_base.sh', 'ft_voc.sh', 'evaluate_voc_fold0.sh', '1'),
    pytest.param(
        'coco', 'train_coco_fold0_base_q.sh', 'ft_coco.sh', 'evaluate_coco_fold0.sh', '2', marks=pytest.mark.slow
    ),
))  # fmt: skip
def test_entry_points_run_one_after_the_other(tmp_path, name, base, novel, evaluate, processes):
    make_rectangles(tmp_path / 'data', name, images=40 if name == 'voc' else 160)
    settings = {**os.environ, **SMALL, 'DATA_PATH': 'data', 'TRAIN_LIST': f'data/list/{DATASETS[name].train_list.name}'}

    def run(script, *flags, **more):
        done = subprocess.run(
            ['bash', str(ROOT / 'scripts' / script), *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=settings | more,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(base, '--no-memory', RESTORE_PATH='none', SAVE_DIR='base', BS='20', NPROC=processes, **NETWORK)
    assert (tmp_path / 'base' / 'best.pth').is_file()
    output = run(novel, '--select', 'last', RESTORE_PATH='base', SAVE_DIR='shots')
    assert 'seed 123, last (selected)' in output and 'crops of 65x65' in output and 'validation at 65x65' in output
    output = run(evaluate, '--select', 'last', RESTORE_PATH='shots')  # further flags are passed on
    assert 'weights "last"' in output and (tmp_path / 'shots' / 'confusion_123.npy').is_file()


ENTRY_POINTS = [path.name for path in (ROOT / 'scripts').glob('*.sh') if 'common.sh' in path.read_text()]


@pytest.mark.parametrize('script', sorted(ENTRY_POINTS))
def test_what_is_not_set_is_named(script):
    env = {key: value for key, value in os.environ.items() if key not in ('DATA_PATH', 'RESTORE_PATH')}
    done = subprocess.run(['bash', str(ROOT / 'scripts' / script)], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and '_PATH is not set' in done.stderr


def test_the_whole_grid_starts_with_the_recipe(tmp_path):
    weights = tmp_path / 'with space' / 'r.pth'
    settings = {
        'DATA_PATH': str(tmp_path / 'none'), 'RESTORE_PATH': str(weights), 'SAVE_DIR': str(tmp_path / 'out'),
        'FOLD': '0', 'SHOT': '1,5', 'SEED': '123,234', 'NPROC': '1',
    }  # fmt: skip

    def run(**more):
        done = subprocess.run(
            ['bash', str(ROOT / 'scripts/reproduce_coco.sh'), '--novel-flags=--fp16'], cwd=tmp_path,
            capture_output=True, text=True, env={**os.environ, **settings, **more},
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    code, output = run()
    assert code == 1 and '10 commands, 0 of them done' in output, output  # of the base 2, of two shots 4
    assert f"--restore-from '{weights}'" in output and '--backbone resnet50v2' in output
    assert 'utils.coco_parse_script' in output and 'Traceback' not in output and '1 commands failed' in output
    code, output = run(EPOCHS='1')
    assert code == 2 and 'EPOCHS is set' in output


def test_a_signal_to_an_entry_point_reaches_the_run(tmp_path):
    make_rectangles(tmp_path / 'data', 'voc', images=40)
    settings = {
        'DATA_PATH': 'data', 'TRAIN_LIST': 'data/list/trainaug.txt', 'RESTORE_PATH': 'none', 'SAVE_DIR': 'run',
        'BS': '4', 'EPOCHS': '50', 'NPROC': '1',
    }  # fmt: skip
    process = subprocess.Popen(
        ['bash', str(ROOT / 'scripts/train_voc_fold0_base.sh'), '--print-frequency', '1'], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **SMALL, **NETWORK, **settings},
    )  # fmt: skip
    said = ''
    for line in process.stdout:
        said += line
        if ' step 2/' in line:
            process.terminate()
            break
    said += process.stdout.read()
    assert process.wait() == 143 and 'run the same command again to resume' in said, said
    process.stdout.close()


def test_wrong_settings_and_arguments_are_refused_before_anything_is_done(tmp_path):
    env = {**os.environ, 'NPROC': 'x', 'DATA_PATH': str(tmp_path), 'RESTORE_PATH': 'none'}
    script = ROOT / 'scripts/train_voc_fold0_base.sh'
    done = subprocess.run(['bash', str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and 'NPROC is x; expected' in done.stderr
    env |= {'NPROC': '1', 'RECIPE': '--recipe best'}
    done = subprocess.run(['bash', str(ROOT / 'scripts/ft_voc.sh')], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and 'run ft_pop.py itself' in done.stderr
    done = subprocess.run(['bash', str(ROOT / 'scripts/demo.sh'), '--help'], capture_output=True, text=True)
    assert done.returncode == 2 and 'usage' in done.stderr
