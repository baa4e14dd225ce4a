"""Parts of `gpu.py` that pass or fail: each checks one property of the CUDA path and yields rows of the table."""

import copy
import json
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks import gpu_cases
from benchmarks.gpu_cases import (
    CPU,
    Row,
    Setting,
    count_waits,
    exact_float32,
    make_validation,
    milliseconds,
    network_flags,
    train,
    training_flags,
)
from benchmarks.steps import network, random_batch, stage_1_step, stage_2_step
from engine.optim import Optimization
from engine.precision import autocast, compile_features, name_of, to_device
from model import build_model, reference
from model.kernels import fuse

LOSS_SCALE = 2.0**16  # as --fp16 starts with: smaller gradients vanish in float16
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node')


def smoke(setting: Setting) -> Iterator[Row]:
    """All scripts end with exit code 0, in both precisions."""
    for flags in ((), ('--fp16',)):
        yield from _run_scripts(setting, flags)


def _run_scripts(setting, flags, predicts=True):
    """Yield rows of the exit codes of stage 1, stage 2 and evaluation."""
    name = ' '.join(flags) or 'float32'
    base, folder = setting.folder / f'base{name}', setting.folder / f'5shot{name}'
    lists = (*network_flags(setting)[:4], '--shot', 5, '--seed', 123)
    where = (*network_flags(setting), '--shot', 5, *flags)
    commands = [
        ('train_base.py', *network_flags(setting), *training_flags(setting), '--batch-size', 16, '--restore-from',
         'none', '--snapshot-dir', base, *flags),
        ('-m', 'utils.gen_fs_list', *lists),
        ('ft_pop.py', *where, *training_flags(setting), '--restore-from', base, '--snapshot-dir', folder),
        ('ft_pop.py', *where, *training_flags(setting), '--restore-from', base, '--snapshot-dir', f'{folder}_views',
         '--views', 2, '--base-views', 5),
        ('ft_pop.py', *where, *training_flags(setting), '--restore-from', base, '--snapshot-dir', f'{folder}_joint',
         '--views', 2, '--base-views', 5, '--model', 'pspnet_joint'),
        ('test.py', *where, '--restore-from', folder),
        ('test.py', *where, '--restore-from', f'{folder}_joint', '--model', 'pspnet_joint'),
    ]  # fmt: skip
    if predicts:
        commands.append((
            '-m', 'utils.predict', '--restore-from', folder, '--images', setting.data / 'JPEGImages', '--save-path',
            folder / 'segmented', '--device', setting.device.type, *flags,
        ))  # fmt: skip
    for command in commands:
        code, output = gpu_cases.run_script(*command)
        if code:
            print(output)
        script = command[1] if command[0] == '-m' else command[0]
        kind = ' '.join([name, *(flag for flag in ('--views', '--model') if flag in command)])
        yield Row(f'{script} {kind}, exit code', code, 0)


def overflow(setting: Setting) -> Iterator[Row]:
    """An overflow in the first step leaves weights finite, and the next steps as without it."""
    weights = {}
    for name, values in (('overflow', (float('inf'), 1.0, 1.0)), ('plain', (1.0, 1.0))):
        torch.manual_seed(0)
        net = torch.nn.Linear(512, 512, bias=False, device=setting.device)
        optimization = Optimization(net, 0.1, 0.9, 0.0, total_steps=10, power=0)
        optimization.scaler = torch.amp.GradScaler(setting.device.type)
        for value in values:
            optimization.backward((net.weight * value).sum())
            optimization.step()
        weights[name] = net.weight.detach()
    yield Row('weights after an overflow, relative difference', _distance(*weights.values()), 0.0)


def reference_forms(setting: Setting) -> Iterator[Row]:
    """Logits and gradients of the closed forms, in float32 without TF32 and in half precision, against the plain form.

    The plain form is in float64: in float32, its own gradients are less exact than those of the closed forms.
    """
    torch.manual_seed(0)
    # eval mode: statistics of two images' single pyramid bin would amplify rounding
    net = build_model('resnet18', 15, 5).to(setting.device).eval()
    exact = copy.deepcopy(net).double()
    side = setting.size // 8
    x = torch.randn(2, net.decoder.in_channels, side, side, device=setting.device).relu()

    def results(net, logits):
        (LOSS_SCALE * logits.float().square().mean()).backward()
        gradients = net.decoder.bottleneck[0].weight.grad, net.novel_emb.grad
        net.zero_grad()
        return logits.detach(), *gradients

    expected = results(exact, reference.classify(exact, reference.decode(exact.decoder, x.double())))
    for dtype, limit, gradient_limit in (
        (torch.float32, 1e-5, 1e-4),
        (setting.half, max(10 * torch.finfo(setting.half).eps, 1e-5), None),
    ):
        with exact_float32():
            with autocast(setting.device, dtype):
                logits = net.classify(net.decompose(net.decoder(x)))
            distances = list(map(_distance, results(net, logits), expected))
        yield Row(f'logits against the reference, {name_of(dtype)}', distances[0], limit)
        yield Row(f'gradients against the reference, {name_of(dtype)}', max(distances[1:]), gradient_limit)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `b`."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def golden_curve(setting: Setting) -> Iterator[Row]:
    """Losses of the same short run on the CPU and on the device, without TF32."""
    curves = []
    for device in ('cpu', setting.device.type):
        folder = train(setting, f'golden_{device}', '--fix-bn', '--device', device, NVIDIA_TF32_OVERRIDE='0')
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        curves.append([record['ce'] for record in records if record['kind'] == 'train'])
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    yield Row('loss of the first step against the CPU', gaps[0], 1e-5)
    yield Row('losses of the first five steps against the CPU', max(gaps[:5]), 1e-3)


def precisions(setting: Setting) -> Iterator[Row]:
    """The loss after many steps in half precision against float32."""
    ends = []
    for dtype in (torch.float32, setting.half):
        step = stage_1_step(setting.variant(dtype), 15)
        losses = [step() for _ in range(setting.steps)]
        ends.append(torch.stack(losses[-10:]).mean().item())
    name = f'mean loss of the last ten of {setting.steps} steps, relative difference of half precision'
    yield Row(name, abs(ends[1] / ends[0] - 1), 0.05)


def evaluations(setting: Setting) -> Iterator[Row]:
    """Confusion matrices from features in every place, against those of the CPU without kept features."""
    make = partial(make_validation, setting, images=16, backbone='resnet18', dtype=torch.float32)
    expected = make(place='off', device=CPU)()
    places = ('gpu', 'memory', 'disk', 'off') if setting.device.type == 'cuda' else ('memory', 'disk', 'off')
    with exact_float32():
        for place in places:
            found = make(place=place, device=setting.device)()
            share = np.abs(found - expected).sum() / 2 / expected.sum()
            yield Row(f'pixels that the CPU predicts otherwise, features in {place}', share, 0.002)


def synchronisations(setting: Setting) -> Iterator[Row]:
    """Steps of both stages do not wait for the GPU; a validation waits once, for its counts."""
    calls = {
        'stage-1 step': (stage_1_step(setting.variant(setting.half), 15), 0),
        'stage-2 step': (stage_2_step(setting.variant(setting.half), 15, 5), 0),
        'stage-2 step on kept views': (stage_2_step(setting.variant(setting.half), 15, 5, views_are_kept=True), 0),
    }
    for place in ('gpu', 'memory'):
        validate = make_validation(setting, place, setting.half, setting.device, images=64, backbone='resnet18')
        calls[f'validation, features in {place}'] = validate, 1
    for name, (call, limit) in calls.items():
        yield Row(f'{name}, host waits for the GPU', count_waits(call), limit)


def resuming(setting: Setting) -> Iterator[Row]:
    """Deterministic runs are equal bit for bit, and so is one that is stopped after an epoch and resumed."""
    flags = ('--deterministic', '--num-workers', 0)
    runs = [train(setting, name, *flags) for name in ('whole', 'again')]
    resumed = train(setting, 'resumed', *flags, '--num-epoch', 1, '--fix-lr')
    whole = train(setting, 'whole_fixed', *flags, '--fix-lr')
    train(setting, 'resumed', *flags, '--fix-lr', '--resume', resumed / 'last.pth')

    def weights(folder):
        return torch.load(folder / 'last.pth', map_location='cpu', weights_only=True)['model']

    def differing(one, other):
        return sum(not torch.equal(value, weights(other)[key]) for key, value in weights(one).items())

    yield Row('parameters that differ between two runs, --deterministic', differing(*runs), 0)
    yield Row('parameters that differ after resuming', differing(whole, resumed), 0)


def compiling(setting: Setting) -> Iterator[Row]:
    """--compile: the scripts run with it, features and losses are those without it, and what it gains."""
    yield from _run_scripts(setting, ('--compile', '--fp16'), predicts=False)
    net = fuse(network(setting.variant(setting.half), 15), setting.half)
    compiled = fuse(net, setting.half)
    compile_features(compiled, frozen=True)
    images = to_device(random_batch(2, 16, setting.size, setting.device)['image'], setting.device)
    differences = []
    with torch.no_grad(), autocast(setting.device, setting.half):
        for some in (images, images.flip(0), images[:1], images * 2):  # a CUDA graph is recorded, then replayed
            differences.append(_distance(compiled.features(some), net.features(some)))
    yield Row('features of a compiled frozen network, relative difference', max(differences), 0.02)
    for name, make in (
        ('stage-1 step', lambda variant: stage_1_step(variant, 15, setting.batch)),
        ('stage-2 step', lambda variant: stage_2_step(variant, 15, 5)),
    ):
        eager, compiled = (make(setting.variant(setting.half, compiled=flag)) for flag in (False, True))
        losses = [[step().item() for _ in range(5)] for step in (eager, compiled)]
        gap = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        yield Row(f'{name}, losses of five steps with --compile, relative difference', gap, 0.02)
        for side, step in (('eager', eager), ('compiled', compiled)):
            yield Row(f'{name}, {side}', milliseconds(step, setting), unit='ms')


def processes(setting: Setting) -> Iterator[Row]:
    """Several processes: shared batch statistics and gradients against the joined batch, and stage 1 with NCCL."""
    gpus = torch.cuda.device_count()
    for backend, count in (('gloo', 2), ('nccl', 1), ('nccl', 2)):
        if backend == 'nccl' and count > gpus:
            continue  # NCCL needs a GPU for each process
        name = f'{backend}, processes: {count}'
        code, output = gpu_cases.run_script(*TORCHRUN, count, 'benchmarks/gpu_processes.py', backend)
        yield Row(f'{name}, exit code', code, 0)
        if code:
            print(output)
            continue
        found = json.loads(next(line for line in output.splitlines() if line.startswith('{')))
        for what, (value, limit) in found.items():
            yield Row(f'{name}, {what}', value, limit)
    folder = train(setting, 'processes', launch=(*TORCHRUN, max(min(gpus, 2), 1)))
    yield Row('stage 1 under torchrun, checkpoints missing', int(not (folder / 'last.pth').is_file()), 0)


LITTLE_MEMORY = """
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(3e8 / torch.cuda.get_device_properties(0).total_memory)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""  # the weights of the network, their gradients and momentum take about as much


def out_of_memory(setting: Setting) -> Iterator[Row]:
    """A run that does not fit into the GPU's memory ends with advice and exit code 1."""
    code, output = gpu_cases.run_script(
        '-c', LITTLE_MEMORY, 'train_base.py', *network_flags(setting), *training_flags(setting), '--batch-size', 16,
        '--restore-from', 'none', '--snapshot-dir', setting.folder / 'memory',
    )  # fmt: skip
    told = code == 1 and '--accumulate' in output and 'Traceback' not in output
    if not told:
        print(output)
    yield Row('out of memory ends without advice', int(not told), 0)
