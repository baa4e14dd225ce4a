"""The calls that `run.py` times: each path of the code by our side, in two precisions, and by the plain side.

The plain side is `model.reference`: float32, contiguous tensors, a 512-channel map of each class through the MLP (all
maps of one MLP in a batch, as the published code does), the pyramid upsampled and concatenated.

Dimensions: B batch, Kb base classes, K logits.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from engine.evaluation import evaluate
from engine.metrics import confusion_matrix
from engine.optim import Optimization
from engine.precision import autocast, computes_in_bfloat16, to_device
from model import Head, build_model, reference
from model.kernels import fuse, keep_freed_memory, return_freed_memory
from model.losses import pop_losses, pseudo_label

SIZE = 473
HEIGHT = 355  # of it, what a photograph of 500x375 takes
CPU = torch.device('cpu')
DTYPES = {'plain': torch.float32, 'fp32': torch.float32, 'fp16': torch.bfloat16}
SIDES = ('plain', 'fp32', 'fp16') if computes_in_bfloat16() else ('plain', 'fp32')


def make_call(path: str, setting: str, side: str) -> Callable:
    """The call to be timed.

    Args:
        path: one of `PATHS`.
        setting: of that path; its numbers are class counts.
        side: one of `SIDES`.
    """
    if side != 'plain':
        keep_freed_memory()  # as the scripts do
    return PATHS[path][0](side, *map(int, re.findall(r'\d+', setting)))


def random_batch(size: int, num_labels: int, side: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, side, side] and masks [B, side, side] of a batch of so many; the side is SIZE by default."""
    side = side or SIZE
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator)
    # masks of objects rather than noise, as a crop's labels are
    cells = torch.randint(0, num_labels, (size, 1, 12, 12), generator=generator).float()
    return images, F.interpolate(cells, (side, side)).long()[:, 0]


def network(side: str, num_base: int, num_novel: int = 0) -> nn.Module:
    """A side's resnet50v2, a `POP` or a `Reference`; all sides have the same weights."""
    torch.manual_seed(0)
    if side == 'plain':
        return reference.Reference('resnet50v2', num_base, num_novel)
    return build_model('resnet50v2', num_base, num_novel).to(memory_format=torch.channels_last)


def stage1_step(side: str, num_base: int, size: int = 2) -> Callable:
    """One step of stage 1: forward, loss, backward, optimiser."""
    net = network(side, num_base).train()
    images, mask = random_batch(size, num_base + 1)
    if side == 'plain':
        return plain_step(net, lambda logits: reference.losses(logits, mask, net.net.base_emb), images)
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 1000)

    def step():
        with autocast(CPU, DTYPES[side]):
            logits = net(to_device(images, CPU))
        return_freed_memory(CPU)
        optimization.backward(sum(pop_losses(logits, mask, net.base_emb).values()))
        optimization.step()

    return step


def stage2_step(side: str, num_base: int, num_novel: int) -> Callable:
    """One step of stage 2: a support image and a base image."""
    whole = network(side, num_base, num_novel)
    net = whole.net if side == 'plain' else whole
    images, mask = random_batch(2, num_base + 1)
    net.freeze_base()
    net.train()
    if side == 'plain':

        def losses(logits):
            labels = torch.cat([mask[:1], reference.pseudo_label(mask[1:], logits[1:].detach(), num_base)])
            return reference.losses(logits, labels, net.novel_emb, net.base_emb)

        return plain_step(whole, losses, images)
    frozen, head = fuse(net, DTYPES[side]), Head(net)
    optimization = Optimization(net, 1e-3, 0.9, 1e-4, 1000)

    def step():
        with autocast(CPU, DTYPES[side]):
            logits = head(frozen.features(to_device(images, CPU)))
        labels = torch.cat([mask[:1], pseudo_label(mask[1:], logits[1:], num_base)])
        optimization.backward(sum(pop_losses(logits, labels, net.novel_emb, net.base_emb).values()))
        optimization.step()

    return step


def plain_step(net: nn.Module, losses: Callable, images: torch.Tensor) -> Callable:
    """A training step as one would write it first; `losses` maps logits to named terms."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3, 0.9, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        sum(losses(net(images)).values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        optimizer.step()

    return step


def inference(side: str, num_base: int, num_novel: int) -> Callable:
    """Logits of one image."""
    net = network(side, num_base, num_novel).eval()
    images, _ = random_batch(1, 2)
    if side != 'plain':
        net = fuse(net, DTYPES[side])

    @torch.no_grad()
    def segment():
        with autocast(CPU, DTYPES[side]):
            return net(images if side == 'plain' else to_device(images, CPU))

    return segment


def cached_validation(side: str, num_base: int, num_novel: int) -> Callable:
    """Prediction and confusion matrix of one validation image; ours from cached features."""
    net = network(side, num_base, num_novel).eval()
    num_labels = num_base + num_novel + 1
    images, mask = random_batch(1, num_labels)
    mask = mask[0, :HEIGHT]
    if side == 'plain':

        @torch.no_grad()
        def validate():
            prediction = reference.upsample(net(images), (SIZE, SIZE)).argmax(dim=1)[0, :HEIGHT]
            return reference.confusion_matrix(mask.numpy(), prediction.numpy(), num_labels)

        return validate
    with torch.no_grad(), autocast(CPU, DTYPES[side]):
        features = net.features(to_device(images, CPU)).half()
    item = {
        'features': features, 'mask': mask.byte()[None], 'shape': [mask.shape], 'canvas': [(SIZE, SIZE)], 'id': [''],
        'skipped': [],
    }  # fmt: skip
    return lambda: evaluate(net, [item], CPU, DTYPES[side])


def confusion(side: str, num_labels: int) -> Callable:
    """Confusion matrix of one 500x500 image; the published code counts with bincount on the CPU."""
    generator = torch.Generator().manual_seed(0)
    truth, prediction = torch.randint(0, num_labels, (2, 500, 500), generator=generator)
    truth[:20] = 255
    if side == 'plain':
        return lambda: reference.confusion_matrix(truth.numpy(), prediction.numpy(), num_labels)
    return lambda: confusion_matrix(truth.byte(), prediction, num_labels)


PATHS = {
    'stage1_step': (stage1_step, ('Kb=15', 'Kb=60')),
    'stage2_step': (stage2_step, ('15+5', '60+20')),
    'inference': (inference, ('15+5', '60+20')),
    'cached_validation': (cached_validation, ('15+5', '60+20')),
    'confusion_matrix': (confusion, ('81',)),
}
