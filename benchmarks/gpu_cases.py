"""What the parts of `gpu.py` share: where they run, rows of the table, scripts, photographs and validations."""

import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from benchmarks.class_index import SPEC, make_samples
from benchmarks.sides import peak_memory
from benchmarks.steps import Variant, network
from core.parallel import usable_cores
from dataset import SegmentationDataset
from dataset.images import Samples
from dataset.labels import label_table
from dataset.shapes import make_shapes
from engine.evaluation import evaluate
from engine.feature_store import FeatureStore
from engine.features import FeatureKeeper
from engine.precision import precision
from model.kernels import fuse

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device('cpu')
DRAWN = 40  # photographs, where no folder of real ones is named
WORKERS = min(8, usable_cores())


@dataclass(frozen=True)
class Setting:
    """What the parts run on.

    Attributes:
        device: of the checks; a CPU in tests.
        size: side of images in pixels.
        folder: for data and runs.
        data_dir: photographs and masks in VOC's layout; None: drawn ones of the same size.
        backbone: of the networks that are measured.
        classes: numbers of base classes.
        batch: images of a stage-1 step.
        images: of a validation; the default is VOC's.
        script_size: side of images where scripts run.
        rounds, warmup: calls of a measurement, and calls before it.
        steps: of a comparison of losses.
    """

    device: torch.device
    size: int
    folder: Path
    data_dir: Path | None = None
    backbone: str = 'resnet50v2'
    classes: tuple[int, ...] = (15, 60, 1000)
    batch: int = 8
    images: int = 1449
    script_size: int = 97
    rounds: int = 10
    warmup: int = 3
    steps: int = 100

    @cached_property
    def half(self) -> torch.dtype:
        """What --fp16 computes in."""
        return precision(self.device, fp16=True)

    @property
    def data(self) -> Path:
        """Embedded data for the scripts, made once."""
        folder = self.folder / 'shapes'
        if not folder.is_dir():
            make_shapes(folder, seed=1, train_images=120, val_images=16)
        return folder

    def variant(self, dtype: torch.dtype, **more) -> Variant:
        return Variant(self.device, dtype, **{'size': self.size, 'backbone': self.backbone, **more})

    def photographs(self, count: int) -> tuple[list[str], Samples]:
        """So many ids, repeated if there are fewer, and how their images are read; labels are those of fold 0."""
        table = label_table(SPEC.base_ids(0), SPEC.novel_ids(0), False)
        if self.data_dir:
            samples = Samples(*(self.data_dir / folder for folder in SPEC.folders('train')), table)
        else:
            folder = self.folder / 'photographs'
            if not folder.is_dir():
                folder.mkdir()
                make_samples(folder, DRAWN)
            samples = Samples(folder, folder, table)
        ids = sorted(path.stem for path in samples.mask_dir.glob('*.png'))
        return (ids * -(-count // len(ids)))[:count], samples


@dataclass(frozen=True)
class Row:
    """A line of the table. It passes if the value is at most the limit; without a limit it is a measurement."""

    name: str
    value: float
    limit: float | None = None
    unit: str = ''

    @property
    def passed(self) -> bool:
        return self.limit is None or bool(self.value <= self.limit)  # NaN fails


def run_script(*command, **environment) -> tuple[int, str]:
    """Run a Python command in the project's folder; returns exit code and output."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def network_flags(setting: Setting) -> tuple:
    """Flags of the scripts that name data, network and device."""
    size = f'{setting.script_size},{setting.script_size}'
    return (
        '--dataset', 'shapes', '--data-dir', setting.data, '--backbone', 'resnet18', '--os', 16, '--base-size', size,
        '--device', setting.device.type,
    )  # fmt: skip


def training_flags(setting: Setting) -> tuple:
    """Flags of the scripts that say how a short run trains."""
    size = f'{setting.script_size},{setting.script_size}'
    return ('--input-size', size, '--print-frequency', 1, '--num-epoch', 2)


def train(setting: Setting, name: str, *flags, launch: tuple = (), **environment) -> Path:
    """A short stage 1 by the script; its folder. RuntimeError with the output if it fails."""
    folder = setting.folder / name
    code, output = run_script(
        *launch, 'train_base.py', *network_flags(setting), *training_flags(setting), '--batch-size', 16,
        '--restore-from', 'none', '--snapshot-dir', folder, *flags, **environment,
    )  # fmt: skip
    if code:
        raise RuntimeError(output[-2000:])
    return folder


def make_validation(
    setting: Setting, place: str, dtype: torch.dtype, device: torch.device, images: int, backbone: str
) -> Callable:
    """A function that validates a network of 15 + 5 classes; features are computed here, if they are kept."""
    ids, samples = setting.photographs(images)
    size = (setting.size, setting.size)
    net = network(Variant(device, dtype, backbone=backbone), 15, 5).eval()
    keeper = FeatureKeeper(
        frozen=fuse(net, dtype), network=backbone, device=device, dtype=dtype, place=place, memory_gb=64,
        store=FeatureStore(setting.folder / 'features', 50), batch_size=None, num_workers=WORKERS,
        log=lambda text: None,
    )  # fmt: skip
    batches = keeper.keep(SegmentationDataset(ids, samples, fit_size=size, resize_mask=True), 'validation', size)
    return partial(evaluate, net, batches, device, dtype)


@contextmanager
def exact_float32():
    """Convolutions in float32 rather than TF32, as on a CPU."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def synchronize(device: torch.device):
    """Wait for the device to finish its queue."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def milliseconds(call: Callable, setting: Setting) -> float:
    """Median time of a call on the device, after some to warm up."""
    times = []
    for i in range(setting.warmup + setting.rounds):
        synchronize(setting.device)
        began = time.perf_counter()
        call()
        synchronize(setting.device)
        if i >= setting.warmup:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def reset_peak(device: torch.device):
    """Start to measure peak memory; a CPU's is that of the whole process."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float:
    """Peak memory since `reset_peak` in 10^9 bytes."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == 'cuda' else peak_memory() * 2**20 / 1e9


def count_waits(call: Callable) -> int:
    """How often the host waits for the GPU in a call, after three to warm up. Prints where."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            call()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    waits = [warning for warning in caught if 'synchroniz' in str(warning.message)]
    for warning in waits:
        print(f'waits: {warning.filename}:{warning.lineno}')
    return len(waits)
