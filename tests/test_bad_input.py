"""Bad input ends a command before training, with exit code 1 (2 for wrong arguments) and a message that says what was
found, what was expected and how to fix it."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAINING, stage_1


@pytest.fixture
def copy(shapes, tmp_path):
    """A copy of the small data set that a test may damage."""
    folder = tmp_path / 'data'
    shutil.copytree(shapes, folder)
    for made in (*folder.glob('list/fold*'), *folder.glob('list/*.npz')):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return folder


@pytest.fixture
def train(run_script, tmp_path):
    """Run stage 1 with flags beside those that work; returns (exit code, output, whether it left a folder)."""

    def run(data_dir, *flags):
        code, output = run_script(
            'train_base.py', *TINY, *TINY_TRAINING, '--data-dir', data_dir, '--restore-from', 'none',
            '--snapshot-dir', tmp_path / 'run', '--num-epoch', 1, '--batch-size', 40, '--no-memory', *flags,
        )  # fmt: skip
        return code, output, (tmp_path / 'run').exists()

    return run


def expect(result, code, *words):
    found, output, left = result
    assert found == code, output
    for word in words:
        assert word in output, output
    assert 'Traceback' not in output and not left


@pytest.mark.parametrize(('flags', 'words'), (
    (('--dataset', 'cityscapes'), ('cityscapes', 'voc')),
    (('--backbone', 'vgg16'), ('vgg16', 'resnet50v2')),
    (('--model', 'fpn'), ('fpn', 'pspnet_pop')),
    (('--os', '4'), ('4', '8', '16', '32')),
    (('--fold', '4'), ('fold 4', '0..3')),
    (('--input-size', '65'), ('65', '473,473')),
    (('--base-size', '0,65'), ('0,65', 'positive')),
    (('--scale-range', '1.5,0.5'), ('1.5,0.5', 'LO <= HI')),
    (('--batch-size', '0'), ('0', '> 0')),
    (('--learning-rate', '-1'), ('-1', '>= 0')),
    (('--learning-rate', '0'), ('0', '> 0')),
    (('--momentum', 'nan'), ('nan', 'finite')),
    (('--batch-size', '1'), ('two images per process', '--fix-bn')),
    (('--random-seed', 'x'), ('x', 'whole number')),
    (('--start-epoch', '1'), ('--start-epoch 1', '--num-epoch 1')),
    (('--device', 'tpu'), ('tpu', 'cpu')),
    (('--no-such-flag',), ('--no-such-flag',)),
))  # fmt: skip
def test_wrong_arguments_end_with_code_2(train, shapes, flags, words):
    expect(train(shapes, *flags), 2, *words)


@pytest.mark.parametrize(('flags', 'words'), (
    (('--fold', '-1'), ('no novel classes',)),
    (('--random-seed', '123,123'), ('123,123', 'different')),
    (('--shot', '0'), ('> 0',)),
    (('--select', 'first'), ('best', 'last')),
))  # fmt: skip
def test_wrong_arguments_of_stage_2(run_script, shapes, tmp_path, flags, words):
    code, output = run_script(
        'ft_pop.py', *TINY, '--data-dir', shapes, '--restore-from', 'none', '--snapshot-dir', tmp_path / 'run', *flags
    )
    expect((code, output, (tmp_path / 'run').exists()), 2, *words)


def test_a_batch_size_that_the_processes_do_not_divide(train, shapes, monkeypatch):
    torchrun = {'RANK': '0', 'WORLD_SIZE': '3', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    expect(train(shapes, '--batch-size', 7), 2, 'not divisible by 3', '6 or 9')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device here')
def test_no_cuda_where_it_is_asked_for(train, shapes):
    expect(train(shapes, '--device', 'cuda'), 1, 'no CUDA device', '--device cpu')


def test_missing_data(train, tmp_path, shapes, copy):
    expect(train(tmp_path / 'nowhere', '--dataset', 'voc'), 1, 'does not exist')
    shutil.rmtree(copy / 'JPEGImages')
    expect(train(copy), 1, str(copy / 'JPEGImages'), 'does not exist')


def test_missing_lists(train, copy, tmp_path):
    expect(train(copy, '--train-list', tmp_path / 'train.txt'), 1, str(tmp_path / 'train.txt'), 'does not exist')
    expect(train(copy, '--val-list', tmp_path / 'val.txt'), 1, str(tmp_path / 'val.txt'), 'does not exist')
    assert not list(copy.glob('list/fold*'))  # no list is written before everything has been checked


def test_empty_lists_and_repeated_ids(train, copy):
    path = copy / 'list' / 'val.txt'
    path.write_text('\n')
    expect(train(copy), 1, str(path), 'is empty')
    path.write_text('val_0001\nval_0002\nval_0001\n')
    expect(train(copy), 1, str(path), 'val_0001', 'more than once')


def test_lists_of_file_names(train, copy):
    path = copy / 'list' / 'val.txt'
    path.write_text('elsewhere/val_0001.jpg,masks/val_0001.png\nval_0002.jpg val_0003.png\n')
    expect(train(copy), 1, str(path), 'has lines like "val_0002.jpg val_0003', 'without folder and suffix', 'sed -i')


def test_missing_images_and_masks(train, copy):
    (copy / 'JPEGImages' / 'val_0002.jpg').unlink()
    expect(train(copy), 1, '1 of 8 listed images are missing', 'val_0002', '.jpg, .jpeg, .png', '--data-dir')
    (copy / 'SegmentationClassAug' / 'train_0007.png').unlink()
    expect(train(copy), 1, 'train_0007; expected files with the suffix .png', '1 of 120 listed images are missing')


def test_images_of_another_suffix(train, copy):
    path = copy / 'JPEGImages' / 'val_0002.jpg'
    shutil.copy(path, path.with_suffix('.PNG'))
    expect(train(copy), 1, 'holds val_0002.PNG, val_0002.jpg, which have the same id val_0002', 'rename')
    path.with_suffix('.PNG').unlink()
    path.rename(path.with_suffix('.gif'))
    expect(train(copy), 1, 'holds val_0002.gif; expected val_0002 with the suffix .jpg', 'rename')


def test_undecodable_images_and_masks(train, copy):
    ids = copy / 'list' / 'trainaug.txt'
    image, mask = copy / 'JPEGImages' / 'train_0003.jpg', copy / 'SegmentationClassAug' / 'train_0004.png'
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    expect(train(copy), 1, str(mask), 'cannot be decoded')
    mask.write_bytes(whole)
    image.write_bytes(b'not a picture')
    ids.write_text('train_0003\ntrain_0005\n')
    lists = copy / 'list' / 'fold0'
    shutil.rmtree(lists, ignore_errors=True)
    expect(train(copy, '--fold', -1, '--batch-size', 2), 1, str(image), 'cannot be decoded')
    # the same error in a loader process
    result = train(copy, '--fold', -1, '--batch-size', 2, '--num-workers', 1)
    expect(result, 1, f'error: image {image} cannot be decoded')


def test_a_mask_of_another_size(train, copy):
    path = copy / 'SegmentationClassAug' / 'val_0000.png'
    cv2.imwrite(str(path), np.zeros((7, 9), np.uint8))
    expect(train(copy), 1, f'{path} is 9x7, its image')


def test_ids_out_of_range(train, copy):
    path = copy / 'SegmentationClassAug' / 'train_0005.png'
    size = cv2.imread(str(copy / 'JPEGImages' / 'train_0005.jpg')).shape[:2]
    cv2.imwrite(str(path), np.full(size, 33, np.uint8))
    expect(train(copy), 1, str(path), '33', '0..20')


def test_a_mask_of_16_bits(train, copy):
    path = copy / 'SegmentationClassAug' / 'train_0006.png'
    cv2.imwrite(str(path), np.zeros((100, 100), np.uint16))
    expect(train(copy), 1, str(path), '16 bits per channel', 'expected 8')


def test_a_colour_coded_mask(train, copy):
    path = copy / 'SegmentationClassAug' / 'train_0006.png'
    cv2.imwrite(str(path), np.zeros((100, 100, 3), np.uint8))
    expect(train(copy), 1, str(path), 'colour-coded', 'SegmentationClassAug')


def make_lists(run_script, data_dir, *flags):
    code, output = run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', data_dir, *flags)
    assert code == 0, output


def test_lists_of_another_fold(train, copy, run_script):
    make_lists(run_script, copy, '--fold', 1, '--shot', 1)
    shutil.copytree(copy / 'list/fold1', copy / 'list/fold0')
    (copy / 'list/fold0/train_fold1.txt').rename(copy / 'list/fold0/train_fold0.txt')
    code, output, _ = train(copy)
    assert code == 1 and 'another fold' in output and f'Remove {copy / "list/fold0"}' in output


def few_shot(run_script, data_dir, base_run, folder, *flags):
    code, output = run_script(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', data_dir, '--restore-from', base_run,
        '--snapshot-dir', folder, '--num-epoch', 1, *flags,
    )  # fmt: skip
    return code, output, folder.exists()


def test_few_shot_lists_that_are_missing_or_of_another_shot_or_fold(run_script, copy, base_run, tmp_path):
    lists = copy / 'list' / 'fold0'
    result = few_shot(run_script, copy, base_run, tmp_path / 'r', '--random-seed', 999)
    expect(result, 1, 'fold0_1shot_seed999.txt does not exist', 'python -m utils.gen_fs_list', '--seed 999')
    result = few_shot(run_script, copy, base_run, tmp_path / 'r', '--random-seed', '998', '999')
    expect(result, 1, 'seed998.txt, ', '--seed 998 999')  # all at once
    make_lists(run_script, copy, '--shot', 1, 2, '--seed', 123)
    path = lists / 'fold0_1shot_seed123.txt'
    support = path.read_text().split()
    shutil.copy(lists / 'fold0_2shot_seed123.txt', path)
    result = few_shot(run_script, copy, base_run, tmp_path / 'r')
    expect(result, 1, 'names 10 images; expected 5', 'another shot', f'delete {path}', '--shot 1')
    path.write_text('\n'.join(support[::-1]))
    result = few_shot(run_script, copy, base_run, tmp_path / 'r')
    expect(result, 1, 'line 1', 'does not show novel class 1', f'delete {path}')


def test_checkpoints_of_something_else(run_script, shapes, base_run, few_shot_run, tmp_path):
    def run(*flags):
        return few_shot(run_script, shapes, base_run, tmp_path / 'r', *flags)

    expect(run('--restore-from', few_shot_run), 1, 'means several files', 'best_123.pth')
    expect(run('--restore-from', few_shot_run / 'best_123.pth'), 1, 'novel classes already', 'stage 1')
    expect(run('--backbone', 'resnet18'), 1, 'backbone is mobilenet_v2, expected resnet18')
    flags = (*TINY, *TINY_TRAINING, '--data-dir', shapes, '--snapshot-dir', tmp_path / 'r', '--batch-size', 40)
    code, output = run_script('train_base.py', *flags, '--restore-from', few_shot_run / 'best_123.pth')
    expect((code, output, (tmp_path / 'r').exists()), 1, 'has novel classes, which stage 1 does not train')
    code, output = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', base_run, '--fold', 1)
    expect((code, output, False), 1, 'fold is 0, expected 1')
    code, output = run_script('test.py', *TINY, '--data-dir', shapes, '--restore-from', few_shot_run, '--shot', 5)
    expect((code, output, False), 1, 'shot is 1, expected 5')
    half = tmp_path / 'half.pth'
    content = (base_run / 'best.pth').read_bytes()
    half.write_bytes(content[: len(content) // 2])
    expect(run('--restore-from', half), 1, 'half.pth', 'damaged')
    expect(run('--restore-from', tmp_path / 'none.pth'), 1, 'there is no', 'half.pth')


def test_one_file_for_several_seeds_is_refused(run_script, shapes, base_run, tmp_path):
    code, output = run_script(
        'test.py',
        *TINY,
        '--data-dir',
        shapes,
        '--restore-from',
        base_run / 'best.pth',
        '--random-seed',
        '123,234',
        '--save-path',
        tmp_path,
    )
    expect((code, output, False), 1, 'best.pth', 'several seeds')


def test_no_imagenet_weights_for_the_deep_stem(train, shapes):
    expect(train(shapes, '--backbone', 'resnet50v2', '--restore-from', 'imagenet'), 1, 'resnet50_v2.pth')


def test_a_download_that_fails(train, shapes, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # no server listens there
    expect(train(shapes, '--restore-from', 'imagenet'), 1, 'cannot download', 'mobilenet_v2', '--restore-from')


def test_too_few_images_for_a_batch(train, shapes):
    expect(train(shapes, '--batch-size', 500), 1, 'do not fill one batch of 500', '--batch-size')


def test_a_non_finite_loss_names_the_images(train, copy, base_run, tmp_path):
    content = torch.load(base_run / 'best.pth', weights_only=True)
    content['model']['base_emb'][:] = float('nan')
    torch.save(content, tmp_path / 'nan.pth')
    code, output, _ = train(copy, '--restore-from', tmp_path / 'nan.pth')
    assert code == 1 and 'loss is not finite at epoch 1, step 1' in output and 'train_' in output, output
    assert (tmp_path / 'run' / 'log.txt').is_file() and not list((tmp_path / 'run').glob('*.pth'))


def test_a_folder_that_cannot_be_written(train, shapes, tmp_path):
    (tmp_path / 'file').write_text('')
    expect(train(shapes, '--snapshot-dir', tmp_path / 'file' / 'run'), 1, 'cannot write', 'Choose a folder')


def test_bad_images_are_skipped_where_that_is_asked_for(run_script, shapes, tmp_path):
    copy = tmp_path / 'data'
    shutil.copytree(shapes, copy)
    bad = [copy / 'JPEGImages' / f'{name}.jpg' for name in ('val_0002', *(f'train_000{i}' for i in range(10)))]
    for path in bad:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fast = ('--input-size', '33,33', '--save-every-steps', 0)
    code, output = run_script(*stage_1(copy, tmp_path / 'run', '--skip-bad-images', *fast))
    assert code == 0, output
    skipped = {path for path in bad if f'skipped: image {path}' in output}
    assert bad[0] in skipped and len(skipped) > 3
    assert f'{len(skipped) - 1} training images were skipped' in output
    assert 'on 7 of 8 images; best at epoch' in output
    code, output = run_script(*stage_1(copy, tmp_path / 'strict', *fast))
    assert code == 1 and 'cannot be decoded' in output and any(str(path) in output for path in bad)
