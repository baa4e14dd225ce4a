"""The validation cache: the same numbers as without it, the backbone run once, and budgets kept."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TRAINING
from torch import nn

from core.errors import InputError
from dataset import DATASETS, FoldData
from engine import feature_cache as cache
from engine.evaluation import evaluate
from engine.feature_cache import CachedFeatures, FrozenFeatures, cache_features
from engine.loaders import evaluation_loader
from ft_pop import NovelStage
from model import POP, PSP, Head

CPU = torch.device('cpu')
SIZE = (65, 129)  # wider than the images, so that there is padding


@pytest.fixture
def network():
    torch.manual_seed(0)
    backbone = nn.Conv2d(3, 8, 3, stride=4, padding=1)
    backbone.output_stride = 4
    return POP(backbone, PSP(8, 16), 20).eval()


@pytest.fixture
def loader(shapes):
    spec = DATASETS['shapes']
    lists = spec.list_root(shapes)
    data = FoldData(spec, shapes, 0, lists / spec.train_list, lists / spec.val_list)
    return evaluation_loader(data.validation(SIZE, with_novel=True), 3, num_workers=0, device=CPU)


def cached(network, loader, folder, place='auto', budget_gb=1, log=lambda text: None):
    return cache_features(
        network, loader, SIZE, CPU, torch.float32, place=place, budget_gb=budget_gb, folder=folder, log=log
    )  # fmt: skip


@pytest.mark.parametrize('place', ('memory', 'disk'))
def test_every_pass_counts_what_the_network_counts_and_runs_the_backbone_once(network, loader, tmp_path, place):
    expected = evaluate(network, loader, CPU)
    batches = cached(network, loader, tmp_path, place)
    images = []
    network.backbone.register_forward_hook(lambda module, inputs, output: images.append(len(inputs[0])))
    first, second = evaluate(network, batches, CPU), evaluate(network, batches, CPU)
    assert sum(images) == len(loader.dataset)
    assert np.array_equal(first, second) and expected.sum() == first.sum()
    assert np.abs(expected - first).sum() <= 0.002 * expected.sum()  # features are kept in half precision
    assert not list(tmp_path.iterdir())  # the file of the cache is unlinked


def test_an_interrupted_pass_is_repeated(network, loader, tmp_path):
    batches = cached(network, loader, tmp_path)
    for _ in zip(batches, range(2), strict=False):
        pass
    assert not batches.complete
    seen = [batch['id'][0] for batch in batches]
    assert seen == loader.dataset.image_ids and batches.complete
    assert [batch['id'][0] for batch in batches] == seen


def test_only_the_image_is_classified_not_its_padding(network, loader, tmp_path, monkeypatch):
    batches = cached(network, loader, tmp_path)
    widths = []
    classify = network.classify
    monkeypatch.setattr(network, 'classify', lambda q, scores: widths.append(q.shape[-1]) or classify(q, scores))
    for batch in batches:
        height, width = batch['shape'][0]
        assert height == 65 and width < 129
        assert evaluate(network, [batch], CPU).sum() == (batch['mask'][0, :height, :width] != 255).sum()
        assert widths[-1] <= (width - 1) / 4 + 3 < batch['features'].shape[-1]


def test_the_place_follows_the_budget_and_a_shortage_is_reported(network, loader, tmp_path, monkeypatch):
    lines = []
    made = cached(network, loader, tmp_path, budget_gb=0, log=lines.append)
    assert isinstance(made, CachedFeatures) and 'kept in disk' in lines[-1]
    monkeypatch.setattr(cache, 'SPARE_DISK', 10**18)
    assert type(cached(network, loader, tmp_path, budget_gb=0, log=lines.append)) is FrozenFeatures
    assert 'need 0.0 GB' in lines[-1] and '--val-limit' in lines[-1]
    for place in ('memory', 'disk'):
        with pytest.raises(InputError, match=f'--val-cache {place}.*need'):
            cached(network, loader, tmp_path, place, budget_gb=0)
    uncached = cached(network, loader, tmp_path, 'off')
    assert np.array_equal(evaluate(network, uncached, CPU), evaluate(network, loader, CPU))


def test_features_are_used_before_the_next_call_overwrites_them(network, loader, tmp_path, monkeypatch):
    """As the CUDA graph of a compiled frozen network does."""
    compute, earlier = network.features, []
    net = POP(network.backbone, network.decoder, 20, 5)
    net.freeze_base()
    stage = NovelStage(
        net=net, model=Head(net), frozen=network, val_batches=(), device=CPU, dtype=torch.float32, panel=None,
        class_names=(), config={},
    )  # fmt: skip
    views = [{'image': torch.randn(1, 3, *SIZE), 'mask': torch.randint(0, 21, (1, *SIZE))} for _ in range(4)]

    def results():
        confusions = [evaluate(network, cached(network, loader, tmp_path, place), CPU) for place in ('off', 'memory')]
        confusions.append(evaluate(network, loader, CPU))
        net.zero_grad()
        for support, base in (views[:2], views[2:]):
            losses = stage.losses({'support': support, 'base': base}, pixel_weight=1e-3, micro_batches=2)
            sum(losses.values()).backward()
        return [*map(torch.from_numpy, confusions), net.novel_emb.grad.clone()]

    def overwrite(images):
        for features in earlier:
            features.data.fill_(float('nan'))
        earlier[:] = [compute(images)]
        return earlier[0]

    expected = results()
    monkeypatch.setattr(network, 'features', overwrite)
    assert all(map(torch.equal, results(), expected))


def test_features_that_half_precision_cannot_hold_are_refused(network, loader, tmp_path):
    with torch.no_grad():
        network.decoder.bottleneck[3].weight.mul_(1e7)
    batches = cached(network, loader, tmp_path)
    with pytest.raises(InputError, match='--val-cache off'):
        evaluate(network, batches, CPU)


def test_a_run_without_the_cache_has_the_same_metrics(run_script, shapes, base_run, few_shot_run, tmp_path):
    code, output = run_script(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir',
        tmp_path, '--num-epoch', 2, '--update-base', '--val-cache', 'off', '--val-limit', 5,
    )  # fmt: skip
    assert code == 0 and '5 validation images' in output, output

    def validations(folder):
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        return [record for record in records if record['kind'] == 'val' and record['seed'] == 123]

    code, output = run_script(
        'ft_pop.py', *TINY, *TINY_TRAINING, '--data-dir', shapes, '--restore-from', base_run, '--snapshot-dir',
        tmp_path / 'cached', '--num-epoch', 2, '--update-base', '--val-limit', 5,
    )  # fmt: skip
    assert code == 0 and 'kept in memory' in output, output
    for without, cached in zip(validations(tmp_path), validations(tmp_path / 'cached'), strict=True):
        for name in ('base', 'novel', 'total'):
            assert without[name] == pytest.approx(cached[name], abs=0.05)
