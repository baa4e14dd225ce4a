"""Time every path against the plain form of the method (`model/reference.py`), in one run on one machine.

    python benchmarks/run.py [--quick] [--json FILE] [--only PATH ...]

resnet50v2, output stride 8, 473x473. The plain side is always float32; ours runs in float32 and, on processors that
compute in bfloat16, with --fp16. Each side of a row has a process of its own; after a warm-up they take turns, one
working while the others wait. Medians are printed, and the processes' peak resident memory. --quick takes fewer rounds.

The end of the output shows the time against the number of classes, the speed of data loading, a projection to the
published protocols, and the achieved floating-point rate.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import DTYPES, PATHS, SIDES, make_call
from benchmarks.class_index import make_samples
from benchmarks.sides import clock, measure
from benchmarks.steps import SIZE
from dataset import Augmentation, SegmentationDataset
from dataset.images import Samples
from dataset.labels import label_table

CONVOLVING = ('stage1_step', 'stage2_step', 'inference')  # bound by convolutions
MANY = (200, 1000)  # classes, beyond those of the table
EPOCHS = 500  # of stage 2
VIEWS = 20  # kept of each support image and of each base class: the documented choice
PROTOCOLS = {  # stage 2 with 1 shot: setting, steps of an epoch, validation images
    'VOC': ('15+5', 15, 1449),
    'COCO, --val-limit 2000': ('60+20', 60, 2000),
}


def measure_sides(path: str, setting: str, sides: Sequence[str], rounds: int, turn: float = 0.2) -> dict[str, dict]:
    """`measure` of one row's sides, by name."""
    return measure({side: functools.partial(make_call, path, setting, side) for side in sides}, rounds, turn)


def best_convolution_rate(dtype: torch.dtype) -> float:
    """Best rate of forward convolutions of the network's shapes, channels last: floating-point operations a second."""
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


def loading_speed() -> dict[str, float]:
    """Images a second on one core: training crops and evaluation images of 500x375 photographs."""
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


def compare(paths: Iterable[str], quick: bool) -> list[dict]:
    """Measure and print the rows of the main table."""
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


def line(row: dict) -> str:
    """A row of the main table."""
    return (
        f'{row["path"]:18} {row["setting"]:7} {row["precision"]:5} {row["plain_s"]:9.4f} s {row["ours_s"]:9.4f} s '
        f'{row["ratio"]:7.1f} {row["plain_mb"]:8.0f} MB {row["ours_mb"]:6.0f} MB {row["memory_ratio"]:6.2f}'
    )


def scale(rows: list[dict], quick: bool) -> list[dict]:
    """Our step of stage 1 against the number of classes; starts with the rows of the main table."""
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


def achieved_rates(rows: list[dict]) -> list[dict]:
    """Floating-point operations of our calls, and their rate against that of the fastest convolution."""
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


def project(rows: list[dict]) -> list[dict]:
    """Hours that all of stage 2 takes, by the times of its parts: as published, and on kept views."""
    seconds = {(row['path'], row['setting'], row['precision']): row for row in rows}
    projected = []
    print(
        f'\nstage 2, 1 shot, {EPOCHS} epochs: hours by the times above; views: {VIEWS} of each support and base class'
    )
    for (name, (setting, steps, images)), side in itertools.product(PROTOCOLS.items(), SIDES[1:]):
        step, kept, image, first = (
            seconds[path, setting, side] for path in ('stage2_step', 'kept_step', 'cached_validation', 'inference')
        )
        views = VIEWS * sum(map(int, setting.split('+'))) * first['ours_s']
        for title, validations in (('every epoch is validated', EPOCHS), ('the last epoch is validated', 1)):
            plain = EPOCHS * steps * step['plain_s'] + validations * images * image['plain_s']
            validating = images * first['ours_s'] + validations * images * image['ours_s']
            ours = EPOCHS * steps * step['ours_s'] + validating
            on_views = EPOCHS * steps * kept['ours_s'] + views + validating
            hours = {'plain_h': plain / 3600, 'ours_h': ours / 3600, 'views_h': on_views / 3600}
            projected.append({'protocol': name, 'precision': side, 'validations': validations} | hours)
            print(
                f'{name:24} {side:5} {title:28} plain {hours["plain_h"]:7.1f} h, ours {hours["ours_h"]:6.2f} h, '
                f'on views {hours["views_h"]:6.2f} h, {plain / on_views:.0f} times faster than plain',
                flush=True,
            )
    return projected


def kept_gains(rows: list[dict]) -> list[dict]:
    """How many times faster a step on kept features is than one with new views, in the same precision."""
    times = {(row['path'], row['setting'], row['precision']): row['ours_s'] for row in rows}
    gains = []
    for (path, setting, side), kept in times.items():
        if path == 'kept_step' and ('stage2_step', setting, side) in times:
            ratio = times['stage2_step', setting, side] / kept
            gains.append({'setting': setting, 'precision': side, 'ratio': ratio})
            print(f'stage 2, {setting}, {side}: a step on kept features is {ratio:.1f} times faster than on new views')
    return gains


def machine() -> str:
    """Processor, cores, PyTorch's version and threads."""
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
    result['kept_gains'] = kept_gains(result['rows'])
    result['limit'] = achieved_rates(result['rows'])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
