"""Parts of `gpu.py` that measure: speed and memory against the plain form, idle time, loading."""

import time

import numpy as np
import torch

from benchmarks.gpu_cases import Row, Setting, make_validation, milliseconds, stage_1_step, stage_2_step
from dataset import Augmentation, SegmentationDataset
from dataset.images import Samples
from dataset.labels import label_table
from engine.loaders import training_loader


def speed(setting: Setting) -> list[Row]:
    """Steps and peak memory of ours and of the plain form in the same precision, channels last."""
    rows = []
    for dtype in (torch.float32, setting.half):
        name = str(dtype).removeprefix('torch.')
        cases = {
            f'stage-1 step, {classes} classes, batch 8': (stage_1_step, (classes, 8)) for classes in (15, 60, 1000)
        }
        cases['stage-2 step, 15 + 5 classes, batch 1 + 1'] = (stage_2_step, ())
        for title, (make, arguments) in cases.items():
            for side in ('ours', 'plain'):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    call = make(setting, dtype, *arguments, plain=side == 'plain')
                    rows.append(Row(f'{title}, {name}, {side}', milliseconds(call), unit='ms'))
                    peak = torch.cuda.max_memory_allocated() / 1e9
                except torch.cuda.OutOfMemoryError:
                    peak = float('inf')
                rows.append(Row(f'{title}, {name}, {side}, peak memory', peak, unit='GB'))
    return rows


def validation_speed(setting: Setting) -> list[Row]:
    """A validation of the embedded data from features kept in each place."""
    return [
        Row(f'validation of 16 images, features in {place}',
            milliseconds(make_validation(setting, place, setting.half, setting.device)), unit='ms')
        for place in ('gpu', 'memory', 'off')
    ]  # fmt: skip


def profile(setting: Setting) -> list[Row]:
    """Kernels of a step, the share of its time without one, and copies from pageable memory."""
    rows = []
    for name, call in {
        'stage-1 step': stage_1_step(setting, setting.half, 15, 8), 'stage-2 step': stage_2_step(setting, setting.half)
    }.items():  # fmt: skip
        duration = milliseconds(call)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.device_time for event in events) / 1e3
        rows.append(Row(f'{name}, kernels and copies', len(events)))
        rows.append(Row(f'{name}, share of the time without a kernel', max(1 - busy / duration, 0)))
        rows.append(Row(f'{name}, copies from pageable memory', sum('Pageable' in event.name for event in events), 0))
    return rows


def loading(setting: Setting) -> list[Row]:
    """Training crops a second that eight loader processes give, of photographs of 500x375."""
    images = setting.data / 'JPEGImages'
    samples = Samples(images, setting.data / 'SegmentationClassAug', label_table(tuple(range(1, 21)), (), True))
    ids = sorted(path.stem for path in images.glob('train_*.jpg')) * 20
    augmentation = Augmentation((setting.size, setting.size), (5.0, 5.5))  # embedded images have about 90 pixels
    loader = training_loader(
        SegmentationDataset(ids, samples, augmentation), 8, 0, num_workers=8, device=setting.device
    )  # fmt: skip
    began, times = time.perf_counter(), []
    for _ in loader:
        times.append(time.perf_counter() - began)
    half = len(times) // 2  # after the start of the processes
    return [Row('loading, 8 processes', 8 * half / np.diff(times[-half - 1 :]).sum(), unit='crops/s')]
