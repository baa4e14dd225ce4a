"""Time every path against the plain formulation (`plain.py`), in one run on one machine.

    python benchmarks/run.py [--quick] [--json FILE] [--only PATH ...]

resnet50v2, output stride 8, 473x473. The plain side is always float32; ours runs in float32 and, on processors that
compute in bfloat16, with --fp16. Each side of a row is a fresh process of its own; after a warm-up they take turns, one
working while the others wait. Medians are printed, and the processes' peak resident memory. --quick takes fewer rounds.

Ends with the cost against the number of classes, the speed of data loading, a projection to the published protocols,
and the achieved floating-point rate.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path

import plain
import torch
import torch.nn.functional as F
from class_index import make_samples
from sides import clock, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import Augmentation, SegmentationDataset
from dataset.images import Samples
from dataset.labels import label_table
from engine.evaluation import evaluate
from engine.metrics import confusion_matrix
from engine.optim import Optimization
from engine.precision import autocast, computes_in_bfloat16, to_device
from model import build_model
from model.kernels.fusing import fuse
from model.kernels.malloc import keep_freed_memory, return_freed_memory
from model.losses import pop_losses, pseudo_label

SIZE = 473
HEIGHT = 355  # of it, what a photograph of 500x375 takes
CPU = torch.device('cpu')
DTYPES = {'plain': torch.float32, 'fp32': torch.float32, 'fp16': torch.bfloat16}
SIDES = ('plain', 'fp32', 'fp16') if computes_in_bfloat16() else ('plain', 'fp32')


def batch(size, num_labels):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    # masks of objects rather than noise: what a crop's labels look like
    cells = torch.randint(0, num_labels, (size, 1, 12, 12), generator=generator).float()
    return images, F.interpolate(cells, (SIZE, SIZE)).long()[:, 0]


def network(num_base, num_novel=0, channels_last=True):
    torch.manual_seed(0)
    net = build_model('resnet50v2', num_base, num_novel)
    return net.to(memory_format=torch.channels_last) if channels_last else net


def stage1_step(side, num_base, size=2):
    """One step of stage 1: forward, loss, backward, optimiser."""
    net = network(num_base, channels_last=side != 'plain').train()
    images, mask = batch(size, num_base + 1)
    if side == 'plain':
        return plain_step(plain.PlainPOP(net), lambda logits: plain.loss(logits, mask, net.base_emb), images)
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 1000)

    def step():
        with autocast(CPU, DTYPES[side]):
            logits = net(to_device(images, CPU))
        return_freed_memory(CPU)
        optimization.backward(sum(pop_losses(logits, mask, net.base_emb).values()))
        optimization.step()

    return step


def stage2_step(side, num_base, num_novel):
    """One step of stage 2: a support image and a base image."""
    net = network(num_base, num_novel, channels_last=side != 'plain')
    images, mask = batch(2, num_base + 1)
    net.freeze_base()
    net.train()
    if side == 'plain':

        def loss(logits):
            labels = torch.cat([mask[:1], plain.pseudo_label(mask[1:], logits[1:].detach(), num_base)])
            return plain.loss(logits, labels, net.novel_emb, net.base_emb)

        return plain_step(plain.PlainPOP(net), loss, images)
    fast = net.on_features_of(fuse(net, DTYPES[side]))
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 1000)

    def step():
        with autocast(CPU, DTYPES[side]):
            logits = fast(to_device(images, CPU))
        labels = torch.cat([mask[:1], pseudo_label(mask[1:], logits[1:], num_base)])
        optimization.backward(sum(pop_losses(logits, labels, net.novel_emb, net.base_emb).values()))
        optimization.step()

    return step


def plain_step(net, loss, images):
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3, 0.9, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        loss(net(images)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        optimizer.step()

    return step


def inference(side, num_base, num_novel):
    """Logits of one image."""
    net = network(num_base, num_novel, channels_last=side != 'plain').eval()
    images, _ = batch(1, 2)
    net = plain.PlainPOP(net) if side == 'plain' else fuse(net, DTYPES[side])

    @torch.no_grad()
    def run():
        with autocast(CPU, DTYPES[side]):
            return net(images if side == 'plain' else to_device(images, CPU))

    return run


def cached_validation(side, num_base, num_novel):
    """Prediction and confusion matrix of one validation image; ours from cached features."""
    net = network(num_base, num_novel, channels_last=side != 'plain').eval()
    images, mask = batch(1, num_base + num_novel + 1)
    mask = mask[0, :HEIGHT]
    if side == 'plain':
        whole = plain.PlainPOP(net)

        @torch.no_grad()
        def run():
            prediction = plain.upsampled(whole(images), (SIZE, SIZE)).argmax(dim=1)[0, :HEIGHT]
            return plain.confusion_matrix(mask.numpy(), prediction.numpy(), net.num_logits)

        return run
    with torch.no_grad(), autocast(CPU, DTYPES[side]):
        features = net.features(to_device(images, CPU)).half()
    item = {'features': features, 'mask': [mask.byte()], 'canvas': [(SIZE, SIZE)], 'id': ['']}
    return lambda: evaluate(net, [item], CPU, DTYPES[side])


def confusion(side, num_classes):
    """Confusion matrix of one 500x500 image."""
    generator = torch.Generator().manual_seed(0)
    truth, prediction = torch.randint(0, num_classes, (2, 500, 500), generator=generator)
    truth[:20] = 255
    if side == 'plain':
        return lambda: plain.confusion_matrix(truth.numpy(), prediction.numpy(), num_classes)
    return lambda: confusion_matrix(truth.byte(), prediction, num_classes)


PATHS = {
    'stage1_step': (stage1_step, ('Kb=15', 'Kb=60')),
    'stage2_step': (stage2_step, ('15+5', '60+20')),
    'inference': (inference, ('15+5', '60+20')),
    'cached_validation': (cached_validation, ('15+5', '60+20')),
    'confusion_matrix': (confusion, ('81',)),
}
CONVOLVING = ('stage1_step', 'stage2_step', 'inference')  # what convolutions bound
MANY = (200, 1000)  # classes, beyond those of the table
EPOCHS = 500  # of stage 2
PROTOCOLS = {  # stage 2 with 1 shot: setting, steps of an epoch, validation images
    'VOC': ('15+5', 15, 1449),
    'COCO, --val-limit 2000': ('60+20', 60, 2000),
}


def case(path, setting, side):
    """The call to be timed; the setting's numbers are its class counts."""
    if side != 'plain':
        keep_freed_memory()  # as the scripts do
    return PATHS[path][0](side, *map(int, re.findall(r'\d+', setting)))


def measure_sides(path, setting, sides, rounds, turn=0.2):
    """`measure` of one row's sides, by name."""
    return measure({side: functools.partial(case, path, setting, side) for side in sides}, rounds, turn)


def best_convolution_rate(dtype):
    """Best floating-point rate of forward convolutions of the network's shapes, channels last."""
    best = 0
    for batch_size in (1, 2):
        for channels, kernel in ((512, 3), (2048, 3), (2048, 1)):
            x = torch.randn(batch_size, channels, 60, 60, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(512, channels, kernel, kernel, dtype=dtype).to(memory_format=torch.channels_last)
            run = functools.partial(F.conv2d, x, weight, padding=kernel // 2)
            run()
            seconds = statistics.median(clock(run) for _ in range(7))
            best = max(best, 2 * batch_size * 3600 * 512 * channels * kernel**2 / seconds)
    return best


def loading_speed():
    """Images a second of one core: training crops and evaluation images of 500x375 photographs."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(*make_samples(Path(folder), 40), label_table(tuple(range(1, 21)), (), True))
        ids = sorted(path.stem for path in Path(folder).glob('*.png'))
        training = SegmentationDataset(ids, samples, Augmentation((SIZE, SIZE), (0.9, 1.1)))
        evaluation = SegmentationDataset(ids, samples, fit_size=(SIZE, SIZE))

        def speed(view):
            for i in range(len(ids)):
                view(i)
            return len(ids) / statistics.median(clock(lambda: [view(i) for i in range(len(ids))]) for _ in range(3))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a loader process
        speeds = {'training': speed(lambda i: training[0, i]), 'evaluation': speed(lambda i: evaluation[i])}
        torch.set_num_threads(threads)
        return speeds


def compare(paths, quick):
    """The rows of the main table."""
    rows = []
    for path in paths:
        rounds, turn = (2 if quick else 5), 0.2
        if quick and path == 'stage1_step':  # the plain side's steps take most of the time: one, and more of ours
            rounds, turn = 1, 15
        sides = SIDES[:2] if path == 'confusion_matrix' else SIDES  # counting has no precision
        for setting in PATHS[path][1]:
            plain_side, *ours = measure_sides(path, setting, sides, rounds, turn).items()
            for side, values in ours:
                rows.append({
                    'path': path, 'setting': setting, 'precision': side,
                    'plain_s': plain_side[1]['s'], 'ours_s': values['s'], 'ratio': plain_side[1]['s'] / values['s'],
                    'plain_mb': plain_side[1]['mb'], 'ours_mb': values['mb'],
                    'memory_ratio': values['mb'] / plain_side[1]['mb'], 'ours_gflop': values['flop'] / 1e9,
                })  # fmt: skip
                print(line(rows[-1]), flush=True)
    return rows


def line(row):
    return (
        f'{row["path"]:18} {row["setting"]:7} {row["precision"]:5} {row["plain_s"]:9.4f} s {row["ours_s"]:9.4f} s '
        f'{row["ratio"]:7.1f} {row["plain_mb"]:8.0f} MB {row["ours_mb"]:6.0f} MB {row["memory_ratio"]:6.2f}'
    )


def scale(rows, quick):
    """Our step of stage 1 against the number of classes; goes on from the rows of the main table."""
    side = SIDES[-1]
    known = {int(row['setting'][3:]): row for row in rows if row['path'] == 'stage1_step' and row['precision'] == side}
    points = [{'classes': k, 'precision': side, 'ours_s': row['ours_s'], 'ours_mb': row['ours_mb']}
              for k, row in known.items()]  # fmt: skip
    for num_base in MANY[-1:] if quick else MANY:
        ours = measure_sides('stage1_step', f'Kb={num_base}', (side,), 2 if quick else 5)[side]
        points.append({'classes': num_base, 'precision': side, 'ours_s': ours['s'], 'ours_mb': ours['mb']})
    print(f'\nstage 1 step, batch 2, {side}, against the number of classes')
    for point in points:
        print(f'{point["classes"]:5} classes {point["ours_s"]:8.3f} s {point["ours_mb"]:7.0f} MB', flush=True)
    return points


def toward_the_limit(rows):
    """Floating-point operations of our calls, and their rate against the best convolution's."""
    rows = [row for row in rows if row['path'] in CONVOLVING]
    if not rows:
        return []
    rates = {side: best_convolution_rate(DTYPES[side]) for side in SIDES[1:]}
    limits = []
    print('\nfloating-point operations of a call, rate, share of the best convolution rate')
    for row in rows:
        best, rate = rates[row['precision']] / 1e9, row['ours_gflop'] / row['ours_s']
        name = {key: row[key] for key in ('path', 'setting', 'precision')}
        limits.append({**name, 'gflop_per_s': rate, 'best_gflop_per_s': best, 'share': rate / best})
        print(
            f'{row["path"]:18} {row["setting"]:7} {row["precision"]:5} {row["ours_gflop"]:8.0f} GFLOP '
            f'{rate:7.0f} GFLOP/s of {best:.0f}: {rate / best:.0%}',
            flush=True,
        )
    return limits


def project(rows):
    """Hours that the whole of stage 2 takes, from the times of its parts; both sides validate after every epoch."""
    seconds = {(row['path'], row['setting'], row['precision']): row for row in rows}
    projected = []
    print(f'\nstage 2, 1 shot, {EPOCHS} epochs: hours by the times above')
    for name, (setting, steps, images) in PROTOCOLS.items():
        for side in SIDES[1:]:
            step, image, first = (
                seconds[path, setting, side] for path in ('stage2_step', 'cached_validation', 'inference')
            )
            plain_hours = EPOCHS * (steps * step['plain_s'] + images * image['plain_s']) / 3600
            ours = images * first['ours_s'] + EPOCHS * (steps * step['ours_s'] + images * image['ours_s'])
            projected.append({'protocol': name, 'precision': side, 'plain_h': plain_hours, 'ours_h': ours / 3600})
            print(f'{name:24} {side:5} plain {plain_hours:7.1f} h, ours {ours / 3600:6.1f} h', flush=True)
    return projected


def machine():
    name = platform.processor()
    info = Path('/proc/cpuinfo')
    if info.is_file() and (model := re.search(r'^model name\s*: (.*)$', info.read_text(), re.MULTILINE)):
        name = model[1]
    return f'{name}, {os.cpu_count()} cores, PyTorch {torch.__version__}, {torch.get_num_threads()} threads'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='within 10 minutes on two cores')
    parser.add_argument('--json', type=Path, help='write the rows to this file')
    parser.add_argument('--only', nargs='+', choices=PATHS, help='these paths, and nothing else')
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f'--json: there is no folder {args.json.parent}')
    print(machine())
    print(
        f'{"path":18} {"setting":7} {"prec.":5} {"plain":>11} {"ours":>11} {"ratio":>7} {"plain":>11} {"ours":>9} '
        f'{"ratio":>6}'
    )
    result = {'machine': machine(), 'rows': compare(args.only or PATHS, args.quick)}
    if not args.only:
        result['scale'] = scale(result['rows'], args.quick)
        result['images_per_second_per_core'] = loading_speed()
        for kind, speed in result['images_per_second_per_core'].items():
            print(f'data loading, {kind}: {speed:.0f} images/s on one core')
        result['projection'] = project(result['rows'])
    result['limit'] = toward_the_limit(result['rows'])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
