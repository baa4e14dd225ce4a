"""Networks and training steps of both stages, ours and plain, on any device: what `run.py` and `gpu.py` measure.

Ours calls what the scripts call: the stage's losses and its optimisation. The plain form is `model.reference` with a
training step as one would write it first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.features import KeptFeatures
from engine.optim import Optimization
from engine.precision import autocast, compile_features, to_device
from engine.stage import Stage
from ft_pop import NovelStage
from model import POP, Head, build_model, reference
from model.kernels import fuse
from train_base import BaseStage

SIZE = 473


@dataclass(frozen=True)
class Variant:
    """One way to compute the network.

    Attributes:
        device, dtype: where and in which precision.
        plain: the plain form instead of ours.
        size: side of images in pixels.
        backbone: name.
        compiled: by torch.compile, as --compile does; only ours.
    """

    device: torch.device
    dtype: torch.dtype
    plain: bool = False
    size: int = SIZE
    backbone: str = 'resnet50v2'
    compiled: bool = False


def network(variant: Variant, num_base: int, num_novel: int = 0) -> nn.Module:
    """A `POP`, or a `Reference` where the variant is plain; all have the same weights."""
    torch.manual_seed(0)
    make = reference.Reference if variant.plain else build_model
    net = make(variant.backbone, num_base, num_novel).to(variant.device)
    # on CPUs, the plain form has tensors as PyTorch makes them
    return net if variant.plain and variant.device.type == 'cpu' else net.to(memory_format=torch.channels_last)


def random_batch(size: int, num_labels: int, side: int, device: torch.device) -> dict:
    """What a loader gives: images [B, 3, side, side] and masks uint8 [B, side, side] on the CPU, pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator)
    # masks of objects rather than noise, as a crop's labels are
    cells = torch.randint(0, num_labels, (size, 1, 12, 12), generator=generator).float()
    batch = {'image': images, 'mask': F.interpolate(cells, (side, side)).byte()[:, 0]}
    return {key: tensor.pin_memory() for key, tensor in batch.items()} if device.type == 'cuda' else batch


def make_stage(kind: type[Stage], variant: Variant, net: POP, model: nn.Module, **more) -> Stage:
    """A stage that can compute losses, without what it logs and saves."""
    return kind(
        net=net, model=model, val_batches=(), device=variant.device, dtype=variant.dtype, panel=None, class_names=(),
        config={}, **more,
    )  # fmt: skip


def stage_1_step(variant: Variant, num_base: int, size: int = 2) -> Callable[[], torch.Tensor]:
    """One step of stage 1 with a batch of so many images: forward, losses, backward, optimiser; returns the loss."""
    net = network(variant, num_base).train()
    batch = random_batch(size, num_base + 1, variant.size, variant.device)
    if variant.plain:
        images, mask = on_device(batch, variant.device)
        return plain_step(variant, net, lambda logits: reference.losses(logits, mask, net.net.base_emb), images)
    if variant.compiled:
        compile_features(net)
    return our_step(make_stage(BaseStage, variant, net, net), batch)


def stage_2_step(
    variant: Variant, num_base: int, num_novel: int, views_are_kept: bool = False
) -> Callable[[], torch.Tensor]:
    """One step of stage 2 with a support image and a base image, or on kept features of them; returns the loss."""
    whole = network(variant, num_base, num_novel)
    net = whole.net if variant.plain else whole
    net.freeze_base()
    net.train()
    batch = random_batch(2, num_base + 1, variant.size, variant.device)
    if variant.plain:
        images, mask = on_device(batch, variant.device)

        def losses(logits):
            labels = torch.cat([mask[:1], reference.pseudo_label(mask[1:], logits[1:].detach(), num_base)])
            return reference.losses(logits, labels, net.novel_emb, net.base_emb)

        return plain_step(variant, whole, losses, images)
    frozen = fuse(net, variant.dtype)
    if variant.compiled:
        compile_features(frozen, frozen=True)
    halves = {
        name: {key: tensor[i : i + 1] for key, tensor in batch.items()} for i, name in enumerate(('support', 'base'))
    }
    kept = {name: keep(frozen, half, variant) for name, half in halves.items()} if views_are_kept else None
    for half in halves.values() if kept else ():
        half['row'] = torch.zeros(1, dtype=torch.int64)
    return our_step(make_stage(NovelStage, variant, net, Head(net), frozen=frozen, kept=kept), halves)


@torch.no_grad()
def keep(frozen: POP, batch: dict, variant: Variant) -> KeptFeatures:
    """Features of a batch of one image as `FeatureKeeper` keeps them."""
    images, mask = on_device(batch, variant.device)
    with autocast(variant.device, variant.dtype):
        maps = frozen.maps(to_device(images, variant.device))
    arrays = {name: values.permute(0, 2, 3, 1).half().contiguous() for name, values in maps.items()}
    size = tuple(mask.shape[1:])
    return KeptFeatures(
        arrays | {'mask': mask.byte().cpu()}, {0: {'id': '', 'shape': size, 'canvas': size}}, [0], variant.device
    )


def on_device(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and int64 masks of a batch, on the device."""
    images = batch['image'].to(device)
    return images if device.type == 'cpu' else to_device(images, device), batch['mask'].to(device).long()


def our_step(stage: Stage, batch: dict) -> Callable[[], torch.Tensor]:
    """A training step of ours with one batch, as `Trainer.step` makes it."""
    optimization = Optimization(stage.net, 1e-3, 0.9, 1e-4, 10_000, fp16=stage.dtype == torch.float16)
    halves = [batch] if 'mask' in batch else batch.values()
    pixels = sum(half['mask'].numel() for half in halves)

    def step():
        loss = sum(stage.losses(batch, pixel_weight=1 / pixels, micro_batches=1).values())
        optimization.backward(loss)
        optimization.step()
        return loss.detach()

    return step


def plain_step(variant: Variant, net: nn.Module, losses: Callable, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A training step as one would write it first; `losses` maps logits to named terms."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3, 0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(variant.device.type, enabled=variant.dtype == torch.float16)

    def step():
        optimizer.zero_grad()
        with autocast(variant.device, variant.dtype):
            logits = net(images)
        loss = sum(losses(logits.float()).values())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step
