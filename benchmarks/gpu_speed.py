"""Parts of `gpu.py` that measure: speed and memory against the plain form, idle time, loading."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu_cases import (
    WORKERS,
    Row,
    Setting,
    make_validation,
    milliseconds,
    peak_gb,
    reset_peak,
)
from benchmarks.steps import network, on_device, random_batch, stage_1_step, stage_2_step
from dataset import Augmentation, SegmentationDataset
from engine.loaders import training_loader
from engine.precision import autocast, name_of
from model import reference


def speed(setting: Setting) -> Iterator[Row]:
    """Steps and peak memory of ours and of the plain form in the same precision, channels last."""
    for dtype in dict.fromkeys((torch.float32, setting.half)):
        for classes in setting.classes:
            novel = max(classes // 3, 1)
            cases = {
                f'stage-1 step, {classes} classes, batch {setting.batch}': (stage_1_step, (classes, setting.batch)),
                f'stage-2 step, {classes} + {novel} classes, batch 1 + 1': (stage_2_step, (classes, novel)),
            }
            for title, (make, arguments) in cases.items():
                for side in ('ours', 'plain'):
                    name = f'{title}, {name_of(dtype)}, {side}'
                    try:
                        step = make(setting.variant(dtype, plain=side == 'plain'), *arguments)
                        step()  # cuDNN tries all algorithms now, some with much memory
                        reset_peak(setting.device)
                        yield Row(name, milliseconds(step, setting), unit='ms')
                        yield Row(f'{name}, peak memory', peak_gb(setting.device), unit='GB')
                    except torch.cuda.OutOfMemoryError:
                        yield Row(f'{name}, peak memory', float('inf'), unit='GB')


def validation_speed(setting: Setting) -> Iterator[Row]:
    """A whole validation from features kept in each place, and an image by the plain form."""
    for place in ('gpu', 'memory', 'off') if setting.device.type == 'cuda' else ('memory', 'off'):
        name, began = f'validation of {setting.images} images, features in {place}', time.perf_counter()
        validate = make_validation(
            setting, place, setting.half, setting.device, images=setting.images, backbone=setting.backbone
        )
        if place != 'off':
            yield Row(f'{name}, computing them', time.perf_counter() - began, unit='s')
        yield Row(name, milliseconds(validate, setting) / 1e3, unit='s')
    net = network(setting.variant(setting.half, plain=True), 15, 5).eval()
    images, _ = on_device(random_batch(1, 2, setting.size, setting.device), setting.device)

    @torch.no_grad()
    def plain():
        with autocast(setting.device, setting.half):
            logits = net(images)
        return reference.upsample(logits.float(), (setting.size, setting.size)).argmax(dim=1)

    yield Row('prediction of an image by the plain form', milliseconds(plain, setting), unit='ms')


def profile(setting: Setting) -> Iterator[Row]:
    """Kernels of steps and a validation, the share of their time without one, and copies from pageable memory."""
    calls = {
        'stage-1 step': stage_1_step(setting.variant(setting.half), 15, setting.batch),
        'stage-2 step': stage_2_step(setting.variant(setting.half), 15, 5),
        'validation of 64 images': make_validation(
            setting, 'memory', setting.half, setting.device, images=64, backbone='resnet18'
        ),
    }
    for name, call in calls.items():
        duration = milliseconds(call, setting)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.device_time for event in events) / 1e3
        pageable = sum('Pageable -> Device' in event.name for event in events)
        yield Row(f'{name}, kernels and copies', len(events))
        yield Row(f'{name}, share of the time without a kernel', max(1 - busy / duration, 0))
        yield Row(f'{name}, copies from pageable memory', pageable, 0)


def loading(setting: Setting) -> Iterator[Row]:
    """Training crops a second that loader processes give, against the images a second that steps take."""
    ids, samples = setting.photographs(15 * setting.rounds * setting.batch)
    augmentation = Augmentation((setting.size, setting.size), (0.9, 1.1))
    loader = training_loader(
        SegmentationDataset(ids, samples, augmentation), setting.batch, 0, num_workers=WORKERS, device=setting.device
    )  # fmt: skip
    began, times = time.perf_counter(), []
    for _ in loader:
        times.append(time.perf_counter() - began)
    half = len(times) // 2  # after the start of the processes
    loaded = setting.batch * half / np.diff(times[-half - 1 :]).sum()
    step = stage_1_step(setting.variant(setting.half), 15, setting.batch)
    taken = 1e3 * setting.batch / milliseconds(step, setting)
    yield Row(f'loading, processes: {WORKERS}', loaded, unit='crops/s')
    yield Row(f'stage-1 step, {name_of(setting.half)}', taken, unit='images/s')
    yield Row('images that steps take over crops that are loaded', taken / loaded)
