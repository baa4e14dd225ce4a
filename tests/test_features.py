"""Kept features: the same numbers as without them, the backbone run once, safe on disk, and budgets kept."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAINING
from torch import nn

from core import signals
from core.errors import InputError
from dataset import DATASETS, FoldData
from engine import features
from engine.evaluation import evaluate
from engine.feature_store import HOST, FeatureStore, digest
from engine.features import FeatureKeeper, FrozenFeatures, KeptFeatures, kept_bytes
from engine.loaders import evaluation_loader
from model import POP, PSP

CPU = torch.device('cpu')
SIZE = (65, 129)  # wider than the images, so that there is padding


@pytest.fixture
def network():
    torch.manual_seed(0)
    backbone = nn.Conv2d(3, 8, 3, stride=4, padding=1)
    backbone.output_stride = 4
    return POP(backbone, PSP(8, 16), 20).eval()


@pytest.fixture
def images(shapes):
    spec = DATASETS['shapes']
    data = FoldData(spec, shapes, 0, *(spec.list_path(split, shapes) for split in ('train', 'val')))
    return data.validation(SIZE, with_novel=True, limit=11)


def keeper(network, folder, place='auto', memory_gb=1, disk_gb=1, log=lambda text: None):
    return FeatureKeeper(
        frozen=network, network=digest(network.state_dict()), device=CPU, dtype=torch.float32, place=place,
        memory_gb=memory_gb, store=FeatureStore(folder / 'features', disk_gb), batch_size=3, log=log,
    )  # fmt: skip


def keep(network, images, folder, *args, **settings):
    return keeper(network, folder, *args, **settings).keep(images, 'validation', SIZE)


def segmented(network):
    """Counts the images that the backbone sees."""
    seen = []
    network.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize('place', ('memory', 'disk'))
def test_every_pass_counts_what_the_network_counts_and_runs_the_backbone_once(network, images, tmp_path, place):
    expected = evaluate(network, evaluation_loader(images, 3, num_workers=0, device=CPU), CPU)
    seen = segmented(network)
    batches = keep(network, images, tmp_path, place)
    first, second = evaluate(network, batches, CPU), evaluate(network, batches, CPU)
    assert sum(seen) == len(images)
    assert np.array_equal(first, second) and expected.sum() == first.sum()
    assert np.abs(expected - first).sum() <= 0.002 * expected.sum()  # maps are kept in half precision


def test_memory_that_is_not_used_any_more_is_free_again(network, images, tmp_path):
    keeps = keeper(network, tmp_path, 'memory')
    keeps.memory_gb = 1.5 * len(images) * kept_bytes(network, SIZE) / 1e9
    kept = keeps.keep(images, 'of one seed', SIZE)
    part = kept.part([0, 1])
    del kept  # the arrays are still in use
    with pytest.raises(InputError, match='of the next seed features need'):
        keeps.keep(images, 'of the next seed', SIZE)
    del part
    assert len(keeps.keep(images, 'of the next seed', SIZE).rows) == len(images)


@pytest.mark.parametrize('place', ('memory', 'off'))
def test_every_process_goes_through_what_is_kept_whole(network, images, tmp_path, monkeypatch, place):
    kept = keeper(network, tmp_path, place)
    for name, value in (('rank', 1), ('world_size', 2), ('local_world_size', 2)):
        monkeypatch.setattr(features, name, lambda value=value: value)
    ids = {whole: sorted(i for batch in kept.keep(images, 'view', SIZE, whole) for i in batch['id'])
           for whole in (True, False)}  # fmt: skip
    assert ids[True] == sorted(images.image_ids) and ids[False] == sorted(images.image_ids[1::2])


def test_what_is_on_disk_serves_later_runs_that_need_the_same(network, images, tmp_path):
    first = evaluate(network, keep(network, images, tmp_path, 'disk'), CPU)
    seen = segmented(network)
    assert np.array_equal(evaluate(network, keep(network, images, tmp_path, disk_gb=0), CPU), first)
    assert not seen
    with torch.no_grad():
        network.base_emb[0, 0] += 1
    keep(network, images, tmp_path, 'disk')  # another network
    assert sum(seen) == len(images)
    images.samples.image_path(images.image_ids[0]).touch()  # another photograph, for all that is known
    keep(network, images, tmp_path, 'disk')
    assert sum(seen) == 2 * len(images)
    network.backbone.output_stride, network.backbone.stride = 8, (8, 8)  # weights of the same names and shapes
    keep(network, images, tmp_path, 'disk')
    images.skip_bad = True  # a set made so may lack images
    keep(network, images, tmp_path, 'disk')
    assert sum(seen) == 4 * len(images)
    assert len(list((tmp_path / 'features').glob('validation-*'))) == 5


@pytest.mark.parametrize('damage', ('a flipped bit', 'truncated', 'no index', 'no JSON', 'a missing file'))
def test_a_damaged_set_is_noticed_and_made_anew(network, images, tmp_path, damage):
    first = evaluate(network, keep(network, images, tmp_path, 'disk'), CPU)
    (folder,) = (tmp_path / 'features').glob('validation-*')
    path = folder / 'residual'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {
        'a flipped bit': lambda: path.write_bytes(content),
        'truncated': lambda: os.truncate(path, len(content) - 100),
        'no index': (folder / 'index.json').unlink,
        'no JSON': lambda: (folder / 'index.json').write_text('[1, 2'),
        'a missing file': path.unlink,
    }[damage]()
    seen = segmented(network)
    assert np.array_equal(evaluate(network, keep(network, images, tmp_path, 'disk'), CPU), first)
    assert sum(seen) == len(images)
    assert keeper(network, tmp_path).store.is_complete(folder.name)


def test_a_run_killed_while_it_computes_leaves_nothing_that_counts(network, images, tmp_path):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the threads of this process are not those of its children
        seen = segmented(network)
        network.decoder.register_forward_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if sum(seen) > 3 else None
        )
        keep(network, images, tmp_path, 'disk')
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list((tmp_path / 'features').glob('validation-*'))
    assert list((tmp_path / 'features').glob('.validation-*.partial'))
    evaluate(network, keep(network, images, tmp_path, 'disk'), CPU)
    assert not list((tmp_path / 'features').glob('.*.partial'))


def test_two_runs_at_once_compute_a_set_once(network, images, tmp_path):
    read, write = os.pipe()
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            torch.set_num_threads(1)
            seen = segmented(network)
            counts = evaluate(network, keep(network, images, tmp_path, 'disk'), CPU)
            os.write(write, b'.' * sum(seen))
            os._exit(0 if counts.sum() else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(write)
    assert len(os.read(read, 10_000)) == len(images)
    os.close(read)


def test_runs_without_locks_do_not_touch_each_others_sets(network, images, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError('no locks')

    monkeypatch.setattr('fcntl.flock', no_locks)
    expected = evaluate(network, keep(network, images, tmp_path / 'alone', 'disk'), CPU)
    other = []

    def begin_too(*_):
        if not other:
            other.append(os.fork())
            if not other[0]:
                torch.set_num_threads(1)
                os._exit(0 if np.array_equal(evaluate(network, keep(network, images, tmp_path, 'disk'), CPU), expected)
                         else 1)  # fmt: skip
            assert os.waitpid(other[0], 0)[1] == 0

    network.decoder.register_forward_hook(begin_too)
    assert np.array_equal(evaluate(network, keep(network, images, tmp_path, 'disk'), CPU), expected)
    assert not list((tmp_path / 'features').glob('.*.partial'))


def test_a_set_that_is_in_use_is_not_removed_and_one_that_is_begun_counts(network, images, tmp_path):
    store = keeper(network, tmp_path, 'disk').store
    row = {'values': (torch.float16, (10, 100, 100))}  # 0.2 MB
    store.limit = 500_000
    store.finish(store.begin('old', row), 'old', row, {})
    with store.using('old'):
        begun = store.begin('new', row)
        assert store.is_complete('old') and store.room() == 300_000
        store.begin('newer', row)  # beyond the limit: what could make room is in use
        assert store.is_complete('old')
    begun.rename(begun.with_name(f'.new.{HOST}.{2**22 + 1}.partial'))  # no process has this number
    store.begin('newest', row)
    assert not list(store.folder.glob('.new.*.partial')) and not store.is_complete('old')


def test_a_set_in_a_folder_that_is_read_only_serves(network, images, tmp_path, monkeypatch):
    first = evaluate(network, keep(network, images, tmp_path, 'disk'), CPU)

    def refused(path, mode='r', *args, **more):
        if 'w' in mode:
            raise PermissionError(13, 'Permission denied', str(path))
        return open(path, mode, *args, **more)

    monkeypatch.setattr('engine.feature_store.open', refused, raising=False)
    seen = segmented(network)
    assert np.array_equal(evaluate(network, keep(network, images, tmp_path, 'disk'), CPU), first) and not seen


def test_waiting_for_another_run_is_said_and_ends_with_a_signal(network, images, tmp_path, monkeypatch):
    store, lines = keeper(network, tmp_path, 'disk').store, []
    with store.using('a'):
        monkeypatch.setattr(signals, '_received', signal.SIGTERM)
        with pytest.raises(signals.Stopped), store.using('a', lines.append):
            pass
    assert 'waiting for another run' in lines[0]


def test_the_sets_used_least_recently_make_room(network, images, tmp_path):
    store = keeper(network, tmp_path, 'disk').store
    row = {'values': (torch.float16, (10, 100, 100))}  # 0.2 MB
    store.limit = 500_000
    for name in ('a', 'b'):
        store.finish(store.begin(name, row), name, row, {})
    os.utime(store.folder / 'b', (1, 1))
    store.finish(store.begin('c', row), 'c', row, {})
    assert {path.name for path in store.folder.iterdir() if path.name[0] != '.'} == {'a', 'c'}


def test_a_skipped_image_has_no_row(network, images, tmp_path):
    images.skip_bad = True
    read = images.samples.read
    bad = images.image_ids[1]

    class Samples:
        stamps, table = images.samples.stamps, images.samples.table

        @staticmethod
        def read(image_id):
            if image_id == bad:
                raise InputError('cannot be decoded')
            return read(image_id)

    images.samples = Samples
    lines = []
    for place in ('memory', 'disk'):
        batches = keep(network, images, tmp_path, place, log=lines.append)
        assert [batch['id'][0] for batch in batches] == [name for name in images.image_ids if name != bad]
        assert '1 images skipped: cannot be decoded' in lines[-1]


def test_only_the_image_is_classified_not_its_padding(network, images, tmp_path, monkeypatch):
    batches = keep(network, images, tmp_path)
    widths = []
    classify = network.classify
    monkeypatch.setattr(
        network, 'classify', lambda maps, scores: widths.append(maps['residual'].shape[-1]) or classify(maps, scores)
    )
    for batch in batches:
        height, width = batch['shape'][0]
        assert height == 65 and width < 129
        assert evaluate(network, [batch], CPU).sum() == (batch['mask'][0, :height, :width] != 255).sum()
        assert widths[-1] <= (width - 1) / 4 + 3 < batch['maps']['residual'].shape[-1]


def test_the_place_follows_the_room_and_a_shortage_is_reported(network, images, tmp_path):
    lines = []
    made = keep(network, images, tmp_path, disk_gb=0, log=lines.append)
    assert isinstance(made, KeptFeatures) and 'kept in memory' in lines[-1]
    assert type(keep(network, images, tmp_path, memory_gb=0, disk_gb=0, log=lines.append)) is FrozenFeatures
    assert 'need 0.0 GB' in lines[-1] and 'computed again' in lines[-1]
    for place in ('memory', 'disk', 'gpu'):
        with pytest.raises(InputError, match=f'--features {place}.*need'):
            keep(network, images, tmp_path, place, memory_gb=0, disk_gb=0)
    anew = keep(network, images, tmp_path, 'off')
    plain = evaluate(network, evaluation_loader(images, 3, num_workers=0, device=CPU), CPU)
    assert np.array_equal(evaluate(network, anew, CPU), plain)


def test_features_that_half_precision_cannot_hold_are_refused(network, images, tmp_path):
    with torch.no_grad():
        network.decoder.bottleneck[3].weight.mul_(1e7)
    with pytest.raises(InputError, match='--features off'):
        keep(network, images, tmp_path)


def test_a_run_without_the_cache_has_the_same_metrics(run_script, shapes, base_run, few_shot_run, tmp_path):
    code, output = run_script(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir',
        tmp_path, '--num-epoch', 2, '--update-base', '--features', 'off', '--val-limit', 5,
    )  # fmt: skip
    assert code == 0 and '5 validation images' in output, output

    def validations(folder):
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        return [record for record in records if record['kind'] == 'val' and record['seed'] == 123]

    (tmp_path / 'base').mkdir()
    shutil.copy(base_run / 'best.pth', tmp_path / 'base')  # alone, as it is passed on
    code, output = run_script(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', tmp_path / 'base', '--snapshot-dir',
        tmp_path / 'cached', '--num-epoch', 2, '--update-base', '--val-limit', 5,
    )  # fmt: skip
    assert code == 0 and 'kept on disk' in output and list((tmp_path / 'base/features').glob('validation-*')), output
    for without, cached in zip(validations(tmp_path), validations(tmp_path / 'cached'), strict=True):
        for name in ('base', 'novel', 'total'):
            assert without[name] == pytest.approx(cached[name], abs=0.05)
