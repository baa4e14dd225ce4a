"""What the parts of `gpu.py` share: where they run, rows of the table, training steps and validations to be called."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import cases
from dataset import DATASETS, FoldData
from dataset.shapes import make_shapes
from engine.evaluation import evaluate
from engine.feature_cache import cache_features
from engine.loaders import evaluation_loader
from engine.optim import Optimization
from engine.precision import autocast, to_device
from model import Head, build_model, reference
from model.kernels import fuse
from model.losses import pop_losses, pseudo_label

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device('cpu')
SCRIPTS = ('--dataset', 'shapes', '--backbone', 'resnet18', '--os', 16, '--base-size', '97,97')
TRAINING = ('--input-size', '97,97', '--print-frequency', 1, '--num-epoch', 2, '--batch-size', 16)


@dataclass(frozen=True)
class Setting:
    """What the parts run on.

    Attributes:
        device: of the checks; a CPU in tests.
        size: side of images in pixels.
        folder: for data and runs.
        backbone: of the networks that are measured.
    """

    device: torch.device
    size: int
    folder: Path
    backbone: str = 'resnet50v2'

    @property
    def half(self) -> torch.dtype:
        return torch.float16 if self.device.type == 'cuda' else torch.bfloat16

    @property
    def data(self) -> Path:
        """Embedded data, made once."""
        folder = self.folder / 'shapes'
        if not folder.is_dir():
            make_shapes(folder, seed=1, train_images=120, val_images=16)
        return folder


@dataclass(frozen=True)
class Row:
    """A line of the table. It passes if the value is at most the limit; without a limit it is a measurement."""

    name: str
    value: float
    limit: float | None = None
    unit: str = ''

    @property
    def passed(self) -> bool:
        return self.limit is None or self.value <= self.limit  # NaN fails


def run_script(*command) -> tuple[int, str]:
    """Run a Python command in the project's folder; returns exit code and output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def train(setting: Setting, name: str, *flags) -> Path:
    """A short stage 1 by the script; its folder. RuntimeError with the output if it fails."""
    folder = setting.folder / name
    code, output = run_script(
        'train_base.py', *SCRIPTS, *TRAINING, '--data-dir', setting.data, '--restore-from', 'none', '--snapshot-dir',
        folder, '--device', setting.device.type, *flags,
    )  # fmt: skip
    if code:
        raise RuntimeError(output[-2000:])
    return folder


def stage_1_step(setting: Setting, dtype: torch.dtype, classes: int, batch: int, plain: bool = False) -> Callable:
    """A training step of stage 1 on one random batch; returns the loss, still on the device."""
    torch.manual_seed(0)
    if plain:
        whole = reference.Reference(setting.backbone, classes).to(setting.device, memory_format=torch.channels_last)
        net = whole.net
    else:
        whole = net = build_model(setting.backbone, classes).to(setting.device, memory_format=torch.channels_last)
    net.train()
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 10_000, fp16=dtype == torch.float16)
    images, mask = random_batch(setting, batch, classes + 1)

    def step():
        with autocast(setting.device, dtype):
            logits = whole(images)
        if plain:
            loss = sum(reference.losses(logits.float(), mask, net.base_emb).values())
        else:
            loss = sum(pop_losses(logits, mask, net.base_emb, pixel_weight=1 / mask.numel()).values())
        optimization.backward(loss)
        optimization.step()
        return loss.detach()

    return step


def stage_2_step(setting: Setting, dtype: torch.dtype, plain: bool = False) -> Callable:
    """A training step of stage 2, 15 + 5 classes, one support and one base image."""
    torch.manual_seed(0)
    base = build_model(setting.backbone, 15).to(setting.device, memory_format=torch.channels_last)
    net = build_model(setting.backbone, 15, 5)
    net.start_from(base)
    net.freeze_base()
    net.to(setting.device, memory_format=torch.channels_last).train()
    frozen, head = fuse(base, dtype), Head(net)
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 10_000, fp16=dtype == torch.float16)
    images, mask = random_batch(setting, 2, 16)

    def step():
        with autocast(setting.device, dtype):
            if plain:
                logits = reference.classify(net, reference.decode(net.decoder, net.backbone(images)))
            else:
                logits = head(frozen.features(images))
        label, losses = (reference.pseudo_label, reference.losses) if plain else (pseudo_label, pop_losses)
        labels = torch.cat([mask[:1], label(mask[1:], logits[1:].detach().float(), 15)])
        scale = {} if plain else {'pixel_weight': 1 / mask.numel()}
        loss = sum(losses(logits.float() if plain else logits, labels, net.novel_emb, net.base_emb, **scale).values())
        optimization.backward(loss)
        optimization.step()
        return loss.detach()

    return step


def random_batch(setting: Setting, batch: int, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks of objects on the device."""
    images, masks = cases.random_batch(batch, num_labels, setting.size)
    return to_device(images, setting.device), masks.to(setting.device)


def make_validation(setting: Setting, place: str, dtype: torch.dtype, device: torch.device) -> Callable:
    """A function that validates on the embedded data; it has run once, so that features are kept."""
    torch.manual_seed(0)
    spec, root = DATASETS['shapes'], setting.data / 'list'
    data = FoldData(spec, setting.data, 0, root / spec.train_list, root / spec.val_list)
    val_set = data.validation((setting.size, setting.size), with_novel=True)
    net = build_model('resnet18', 15, 5).to(device).eval()
    batches = cache_features(
        fuse(net, dtype), evaluation_loader(val_set, 4, num_workers=0, device=device), (setting.size, setting.size),
        device, dtype, place=place, budget_gb=8, folder=setting.folder, log=lambda text: None,
    )  # fmt: skip
    evaluate(net, batches, device, dtype)
    return partial(evaluate, net, batches, device, dtype)


def milliseconds(call: Callable, rounds: int = 10) -> float:
    """Median time of a call on the GPU, after three to warm up."""
    times = []
    for i in range(rounds + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)
