"""Parts of `gpu.py` that pass or fail: each checks one property of the CUDA path and returns rows of the table."""

import json
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_cases import (
    CPU,
    SCRIPTS,
    TRAINING,
    Row,
    Setting,
    make_validation,
    run_script,
    stage_1_step,
    stage_2_step,
    train,
)
from engine.optim import Optimization
from engine.precision import autocast
from model import build_model, reference


def smoke(setting: Setting) -> list[Row]:
    """All scripts end with exit code 0, in both precisions."""
    rows = []
    for flags in ((), ('--fp16',)):
        name = flags[0] if flags else 'float32'
        base, folder = train(setting, f'smoke{name}', *flags), setting.folder / f'smoke{name}_5shot'
        where = (*SCRIPTS, '--data-dir', setting.data, '--shot', 5, '--device', setting.device.type, *flags)
        lists = (*SCRIPTS[:2], '--data-dir', setting.data, '--shot', 5, '--seed', 123)
        for command in (
            ('-m', 'utils.gen_fs_list', *lists),
            ('ft_pop.py', *where, *TRAINING[:-2], '--restore-from', base, '--snapshot-dir', folder),
            ('test.py', *where, '--restore-from', folder, '--test-batch-size', 4),
            ('-m', 'utils.predict', '--restore-from', folder, '--images', setting.data / 'JPEGImages', '--save-path',
             folder / 'segmented', '--device', setting.device.type, *flags),
        ):  # fmt: skip
            code, output = run_script(*command)
            if code:
                print(output[-2000:])
            script = command[1] if command[0] == '-m' else command[0]
            rows.append(Row(f'{script} {name}, exit code', code, 0))
    return rows


def overflow(setting: Setting) -> list[Row]:
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
    return [Row('weights after an overflow, relative difference', _distance(*weights.values()), 0.0)]


def reference_forms(setting: Setting) -> list[Row]:
    """Logits and gradients of the closed forms against the plain form: float32 without TF32, and half precision."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    # eval mode: statistics of two images' single pyramid bin would amplify rounding
    net = build_model('resnet18', 15, 5).to(setting.device).eval()
    x = torch.randn(2, net.decoder.in_channels, 33, 33, device=setting.device).relu()

    def compute(decode, classify, dtype):
        net.zero_grad()
        with autocast(setting.device, dtype):
            logits = classify(decode(x)).float()
        logits.square().mean().backward()
        return logits.detach(), net.decoder.bottleneck[0].weight.grad, net.novel_emb.grad

    expected = compute(partial(reference.decode, net.decoder), partial(reference.classify, net), torch.float32)
    rows = []
    for dtype, limit, gradient_limit in (
        (torch.float32, 1e-5, 1e-4),
        (setting.half, 10 * torch.finfo(setting.half).eps, None),
    ):
        distances = list(map(_distance, compute(net.decoder, net.classify, dtype), expected))
        name = str(dtype).removeprefix('torch.')
        rows.append(Row(f'logits against the reference, {name}', distances[0], limit))
        rows.append(Row(f'gradients against the reference, {name}', max(distances[1:]), gradient_limit))
    torch.backends.cudnn.allow_tf32 = True
    return rows


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `b`."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def golden_curve(setting: Setting) -> list[Row]:
    """Losses of the same short run on the CPU and on the device."""
    curves = []
    for device in ('cpu', setting.device.type):
        folder = train(setting, f'golden_{device}', '--fix-bn', '--device', device)
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        curves.append([record['ce'] for record in records if record['kind'] == 'train'])
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    return [Row('loss of the first step against the CPU', gaps[0], 1e-5),
            Row('losses of the first five steps against the CPU', max(gaps[:5]), 1e-3)]  # fmt: skip


def precisions(setting: Setting) -> list[Row]:
    """The loss after 100 steps in half precision against float32."""
    ends = []
    for dtype in (torch.float32, setting.half):
        step = stage_1_step(setting, dtype, classes=15, batch=2)
        losses = [step() for _ in range(100)]
        ends.append(torch.stack(losses[-10:]).mean().item())
    return [
        Row('mean loss of steps 91 to 100, relative difference of half precision', abs(ends[1] / ends[0] - 1), 0.05)
    ]


def evaluations(setting: Setting) -> list[Row]:
    """Confusion matrices from features in every place, against those of the CPU without a cache."""
    expected = make_validation(setting, 'off', torch.float32, CPU)()
    places = ('gpu', 'memory', 'disk', 'off') if setting.device.type == 'cuda' else ('memory', 'disk', 'off')
    rows = []
    for place in places:
        found = make_validation(setting, place, torch.float32, setting.device)()
        share = np.abs(found - expected).sum() / 2 / expected.sum()
        rows.append(Row(f'pixels that the CPU predicts otherwise, features in {place}', share, 0.002))
    return rows


def synchronisations(setting: Setting) -> list[Row]:
    """Steps of both stages do not wait for the GPU."""
    calls = {
        'stage-1 step': stage_1_step(setting, torch.float32, 15, 2),
        'stage-2 step': stage_2_step(setting, torch.float32),
    }
    rows = []
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            call()
            waits = 0
        except RuntimeError as error:
            print(error)
            waits = 1
        torch.cuda.set_sync_debug_mode('default')
        rows.append(Row(f'{name}, host waits for the GPU', waits, 0))
    return rows


def resuming(setting: Setting) -> list[Row]:
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

    return [Row('parameters that differ between two runs, --deterministic', differing(*runs), 0),
            Row('parameters that differ after resuming', differing(whole, resumed), 0)]  # fmt: skip


def compiling(setting: Setting) -> list[Row]:
    """--compile trains, and validates about as without it."""
    metrics = []
    for flags in ((), ('--compile',)):
        folder = train(setting, f'compile{len(flags)}', *flags)
        metrics.append(torch.load(folder / 'last.pth', map_location='cpu', weights_only=True)['metrics']['base'])
    return [Row('base mIoU with and without --compile, difference in points', abs(metrics[0] - metrics[1]), 5.0)]


def processes(setting: Setting) -> list[Row]:
    """One process per GPU under torchrun: NCCL where there are two GPUs; with one, torchrun's environment alone."""
    count = max(min(torch.cuda.device_count(), 2), 1) if setting.device.type == 'cuda' else 2
    code, output = run_script(
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', count, 'train_base.py', *SCRIPTS, *TRAINING,
        '--data-dir', setting.data, '--restore-from', 'none', '--snapshot-dir', setting.folder / 'processes',
        '--device', setting.device.type,
    )  # fmt: skip
    if code:
        print(output[-2000:])
    return [Row(f'{count} processes, exit code', code, 0)]


def out_of_memory(setting: Setting) -> list[Row]:
    """A batch that does not fit ends with advice and exit code 1."""
    code, output = run_script(
        'train_base.py', *SCRIPTS, '--data-dir', setting.data, '--restore-from', 'none', '--snapshot-dir',
        setting.folder / 'memory', '--device', 'cuda', '--batch-size', 96, '--num-epoch', 1, '--input-size',
        '4097,4097', '--scale-range', '40,45', '--num-workers', 8,
    )  # fmt: skip
    told = code == 1 and '--accumulate' in output and 'Traceback' not in output
    if not told:
        print(output[-2000:])
    return [Row('out of memory ends without advice', int(not told), 0)]
