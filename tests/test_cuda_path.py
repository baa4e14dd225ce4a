"""The CUDA path without a GPU: fake tensors have a device, a shape and a type, and no values.

They fail where devices or types are mixed and where a value is read back, for which a GPU would have to finish its
queue. The backward pass cannot run on them; `benchmarks/gpu.py` checks it on a GPU.
"""

import copy
import itertools
from contextlib import contextmanager
from functools import partial

import native_batch_norm
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import InputError
from engine import distributed
from engine.evaluation import evaluate
from engine.features import KeptFeatures
from engine.inference import Segmenter
from engine.loaders import evaluation_loader
from engine.metrics import _count_without_reading, confusion_matrix
from engine.precision import compile_features
from ft_pop import NovelStage
from model import MODELS, Head, build_model, psp
from model.kernels import share_batch_statistics, summed_cross_entropy, sync_batch_norm, upsampling
from train_base import BaseStage

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
SIZE = 65
TRAINED = [name for name, method in MODELS.items() if method.TRAINS_NOVEL]
CACHED = (psp._pooling_matrix, psp._upsampling_taps, upsampling.interpolation)


@contextmanager
def fake_gpu():
    """New tensors are fake ones, on the CPU unless a device is given."""

    def forget():
        for function in CACHED:  # a tensor of one mode does not fit another
            function.cache_clear()

    forget()
    try:
        with FakeTensorMode():
            yield
    finally:
        forget()


def network(num_novel, model='pspnet_pop'):
    with torch.device(CUDA):
        return build_model('resnet18', 15, num_novel, model=model)


def views(count):
    """What a loader gives: tensors on the CPU."""
    return {'image': torch.empty(count, 3, SIZE, SIZE), 'mask': torch.empty(count, SIZE, SIZE, dtype=torch.uint8)}


def stage(kind, net, dtype, **more):
    return kind(
        net=net, model=net if kind is BaseStage else Head(net), val_batches=(), device=CUDA, dtype=dtype, panel=None,
        class_names=(), config={}, **more,
    )  # fmt: skip


@pytest.fixture(params=(torch.float32, torch.float16), ids=('float32', 'float16'))
def dtype(request, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)  # autocast without a GPU
    return request.param


def test_reading_a_value_back_is_noticed():
    with fake_gpu(), pytest.raises(DataDependentOutputException):
        torch.empty(3, device=CUDA).sum().item()


@pytest.mark.parametrize('model', [name for name, method in MODELS.items() if not method.BASE_MODEL])
def test_losses_of_stage_1(dtype, model):
    with fake_gpu():
        net = network(0, model)
        with torch.device(CUDA):
            net.start_base()
        losses = stage(BaseStage, net, dtype).losses(views(2), pixel_weight=0.1, micro_batches=1)
        assert all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize('model', TRAINED)
def test_losses_of_stage_2(dtype, model):
    with fake_gpu():
        base, net = network(0, model), network(5, model)
        net.freeze_base()
        novel = stage(NovelStage, net, dtype, frozen=base.eval().requires_grad_(False))  # fake tensors cannot be fused
        batch = {'support': views(1), 'base': views(1)}
        losses = novel.losses(batch, pixel_weight=0.1, micro_batches=1)
        assert all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())
        assert losses['ce'].requires_grad


@pytest.mark.parametrize('model', TRAINED)
@pytest.mark.parametrize('place', (CUDA, CPU), ids=('gpu', 'memory'))
def test_losses_of_stage_2_on_kept_views(dtype, monkeypatch, place, model):
    make = torch.empty
    pinned = []
    with fake_gpu():
        net = network(5, model)
        net.freeze_base()
        # pinned memory needs a GPU; that it is asked for is what matters
        monkeypatch.setattr(
            torch, 'empty', lambda *size, pin_memory=False, **more: pinned.append(pin_memory) or make(*size, **more)
        )
        arrays = {
            name: make(4, h, w, c, dtype=torch.float16, device=place)
            for name, (c, h, w) in net.map_shapes((SIZE, SIZE)).items()
        } | {'mask': make(4, SIZE, SIZE, dtype=torch.uint8)}
        kept = KeptFeatures(arrays, {row: {'id': str(row)} for row in range(4)}, range(4), CUDA)
        novel = stage(NovelStage, net, dtype, frozen=None, kept={'support': kept, 'base': kept})
        view = views(2) | {'row': make(2, dtype=torch.int64)}
        losses = novel.losses({'support': view, 'base': view}, pixel_weight=0.1, micro_batches=1)
        assert all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())
    assert any(pinned) == (place == CPU)
    assert kept[1]['mask'].device == CPU  # what a loader collates and pins


def loaded(count):
    """A batch of `evaluation_loader`."""
    return evaluation_batch(count) | {'image': torch.empty(count, 3, SIZE, SIZE)}


def cached(net, count):
    """A batch of `KeptFeatures`."""
    maps = {
        name: torch.empty(count, h, w, c, dtype=torch.float16, device=CUDA).permute(0, 3, 1, 2)
        for name, (c, h, w) in net.map_shapes((SIZE, SIZE)).items()
    }
    batch = evaluation_batch(count)
    return batch | {'maps': maps, 'mask': batch['mask'].to(CUDA)}


def evaluation_batch(count):
    return {
        'mask': torch.empty(count, SIZE, SIZE, dtype=torch.uint8), 'shape': [(SIZE - i, SIZE) for i in range(count)],
        'canvas': [(SIZE, SIZE)] * count, 'id': ['a'] * count, 'skipped': [],
    }  # fmt: skip


@pytest.mark.parametrize('model', MODELS)
def test_evaluation(dtype, monkeypatch, model):
    monkeypatch.setattr(torch.Tensor, 'numpy', lambda tensor: tensor)  # of the final counts, which have no values here
    seen = []
    with fake_gpu():
        net = network(5, model)
        batches = [loaded(2), cached(net, 3)]
        counts = evaluate(net, batches, CUDA, dtype, lambda image_id, prediction, mask: seen.append(prediction.shape))
        assert counts.shape == (21, 21) and counts.dtype == torch.int64
        assert seen == [(SIZE - i, SIZE) for i in (0, 1, 0, 1, 2)]


class Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel on the GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        aliases = (
            any(argument.alias_info for argument in operation._schema.arguments) and not operation._schema.is_mutable
        )
        if not aliases and isinstance(result, torch.Tensor) and result.device.type == 'cuda':
            self.names.append(str(operation))
        return result


def test_the_head_and_an_evaluation_take_few_kernels(monkeypatch):
    """Ceilings: starting such small kernels takes longer than running them, so their number is what counts."""
    monkeypatch.setattr(torch.Tensor, 'numpy', lambda tensor: tensor)

    def count(call):
        call()  # makes the cached matrices
        with Kernels() as kernels:
            call()
        return len(kernels.names)

    with fake_gpu():
        net = network(5).eval()
        batch = cached(net, 32)
        logits, mask = torch.empty(2, 21, 9, 9, device=CUDA), torch.empty(2, SIZE, SIZE, dtype=torch.int64, device=CUDA)
        with torch.no_grad():
            assert count(partial(net.classify, batch['maps'], net.constants())) <= 28
        assert count(partial(summed_cross_entropy, logits, mask)) <= 40
        # of 32 images: the head, upsampling and counting, and once the scores of prototypes
        assert count(partial(evaluate, net, [batch], CUDA)) <= 68


def test_shared_batch_statistics_keep_what_the_network_has():
    net = build_model('resnet18', 3)
    net.backbone.requires_grad_(False)
    net.train()
    replaced = copy.deepcopy(net)
    share_batch_statistics(replaced)
    images = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(replaced.backbone(images), net.backbone(images))  # it is not trained, so neither shares
        assert torch.equal(replaced.eval()(images), net.eval()(images))
    kinds = {type(module) for module in replaced.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {sync_batch_norm.SyncBatchNorm2d}
    assert all(map(torch.equal, replaced.state_dict().values(), net.state_dict().values()))
    assert list(replaced.state_dict()) == list(net.state_dict())


def test_shared_batch_statistics_read_nothing_back(monkeypatch):
    """PyTorch's own operations for them exist on GPUs only; here they give shapes."""
    operations = native_batch_norm.register('Meta')
    for exchange in ('all_gather_single', 'all_gather_into_tensor', 'all_reduce'):
        monkeypatch.setattr(dist, exchange, lambda *tensors: None, raising=False)
    with fake_gpu(), torch.device(CUDA):
        x = torch.empty(2, 8, 9, 9, dtype=torch.float16).to(memory_format=torch.channels_last)
        values = {name: torch.empty(8) for name in ('weight', 'bias', 'running_mean', 'running_var')}
        arguments = (x, *values.values(), 0.1, 1e-5, 2)
        y, *statistics = sync_batch_norm._normalize(*arguments)
        gradients = sync_batch_norm._gradients(y, x, values['weight'], *statistics)
        found = (y, *statistics, *gradients)
        # what torch.compile is told of them
        expected = torch.ops.pop.sync_batch_norm(*arguments)
        expected += torch.ops.pop.sync_batch_norm_backward(y, x, values['weight'], *statistics)

    def described(tensors):
        return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]

    assert described(found) == described(expected) and all(tensor.device == CUDA for tensor in found)
    del operations


def test_graphs_name_the_number_of_processes(monkeypatch):
    """torch.compile keeps graphs on disk: without it, one of two processes would be taken for one of four."""
    called = []
    monkeypatch.setattr(sync_batch_norm, 'world_size', lambda: 4)
    monkeypatch.setattr(torch.ops.pop, 'sync_batch_norm', lambda *arguments: called.append(arguments) or (None,))
    sync_batch_norm.SyncBatchNorm2d(torch.nn.BatchNorm2d(8))(torch.zeros(2, 8, 3, 3))
    assert called[0][-1] == 4
    with fake_gpu(), torch.device(CUDA):
        x, values = torch.empty(2, 8, 9, 9), [torch.empty(8) for _ in range(4)]
        monkeypatch.undo()
        assert torch.ops.pop.sync_batch_norm(x, *values, 0.1, 1e-5, 4)[3].shape == (4,)


def test_features_compile_to_one_graph_for_each_shape_and_mode(monkeypatch):
    graphs, modes, compile_ = [], [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def without_inductor(function, mode, **settings):
        modes.append(mode)
        backend = aot_eager if mode == 'reduce-overhead' else keep
        return compile_(function, backend=backend, fullgraph=True, **settings)

    monkeypatch.setattr(torch, 'compile', without_inductor)
    torch.manual_seed(0)
    net = build_model('resnet18', 3)
    plain = copy.deepcopy(net)
    compile_features(net)
    for expected, training, side in ((1, True, 65), (2, False, 65), (3, False, 97), (3, False, 65)):
        images = torch.randn(2, 3, side, side)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(net.train(training)(images), plain.train(training)(images))
        assert len(graphs) == expected
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == 'call_function'}
    assert not any('eye' in name or 'interpolate' in name for name in called)  # constants are made in advance
    assert list(net.state_dict()) == list(plain.state_dict())
    segmenters = [Segmenter(net.eval(), CPU, torch.float32, compiled) for compiled in (False, True)]
    torch.testing.assert_close(*(segmenter.net.features(images) for segmenter in segmenters))
    # the copy of a compiled network is compiled
    count = len(net.COMPILED)
    assert modes == count * ['default'] + count * ['reduce-overhead'] and len(graphs) == 4


@pytest.mark.parametrize('model', MODELS)
def test_every_method_computes_its_maps_by_what_is_compiled(tiny, model, monkeypatch):
    called = []

    def compile_(function, **settings):
        return lambda net, images: called.append(function.__name__) or function(net, images)

    monkeypatch.setattr(torch, 'compile', compile_)
    names, choices = list(MODELS[model].OPTIONS), MODELS[model].OPTIONS.values()
    for chosen in itertools.product(*choices):
        net = build_model(tiny, 3, output_stride=32, model=model, options=dict(zip(names, chosen, strict=True))).eval()
        compile_features(net, frozen=True)
        called.clear()
        net.maps(torch.randn(1, 3, 65, 65))
        assert len(called) == 1, chosen


def test_a_gpu_evaluates_more_images_at_once_than_a_cpu():
    sizes = [evaluation_loader(range(40), None, num_workers=0, device=device).batch_size for device in (CPU, CUDA)]
    assert sizes == [1, 16]
    assert evaluation_loader(range(40), 3, num_workers=0, device=CUDA).batch_size == 3


def test_each_process_of_a_host_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for setting in ('benchmark', 'allow_tf32'):  # restored afterwards
        monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
    for local_rank in (0, 1):
        monkeypatch.setenv('LOCAL_RANK', str(local_rank))
        assert distributed._choose_device('auto') == torch.device('cuda', local_rank)
        assert distributed._choose_device('cpu') == torch.device('cpu')
    assert chosen == [0, 1]
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(InputError, match='process 2 of this host has no GPU of its own: there are 2'):
        distributed._choose_device('cuda')


def test_counting_without_reading_counts_the_same():
    generator = torch.Generator().manual_seed(0)
    truth, prediction = torch.randint(0, 21, (2, 50, 60), generator=generator)
    truth[:9] = 255
    counts = _count_without_reading(truth.byte().flatten(), prediction.flatten(), 21)
    assert torch.equal(counts[: 21 * 21].view(21, 21), confusion_matrix(truth, prediction, 21))
    with fake_gpu():
        assert confusion_matrix(*torch.empty(2, 9, 9, dtype=torch.int64, device=CUDA), 21).device == CUDA
