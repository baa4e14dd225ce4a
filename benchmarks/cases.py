"""The calls that `run.py` times on the CPU: each path of the code by our side, in two precisions, and the plain side.

The plain side is `model.reference`: float32, contiguous tensors, a 512-channel map of each class through the MLP (all
maps of one MLP in a batch, as the published code does), the pyramid upsampled and concatenated.

Dimensions: B batch, Kb base classes, K logits.
"""

import functools
import re
from collections.abc import Callable

import torch

from benchmarks.steps import SIZE, Variant, network, on_device, random_batch, stage_1_step, stage_2_step
from engine.evaluation import evaluate
from engine.metrics import confusion_matrix
from engine.precision import autocast, computes_in_bfloat16, to_device
from model import reference
from model.kernels import fuse, keep_freed_memory

CPU = torch.device('cpu')
DTYPES = {'plain': torch.float32, 'fp32': torch.float32, 'fp16': torch.bfloat16}
SIDES = ('plain', 'fp32', 'fp16') if computes_in_bfloat16() else ('plain', 'fp32')


def make_call(path: str, setting: str, side: str, size: int = SIZE) -> Callable:
    """The call to be timed.

    Args:
        path: one of `PATHS`.
        setting: of that path; its numbers are class counts.
        side: one of `SIDES`.
        size: side of images in pixels.
    """
    if side != 'plain':
        keep_freed_memory()  # as the scripts do
    variant = Variant(CPU, DTYPES[side], plain=side == 'plain', size=size)
    return PATHS[path][0](variant, *map(int, re.findall(r'\d+', setting)))


def inference(variant: Variant, num_base: int, num_novel: int) -> Callable:
    """Logits of one image."""
    net = network(variant, num_base, num_novel).eval()
    images, _ = on_device(random_batch(1, 2, variant.size, CPU), CPU)
    if not variant.plain:
        net = fuse(net, variant.dtype)

    @torch.no_grad()
    def segment():
        with autocast(CPU, variant.dtype):
            return net(images if variant.plain else to_device(images, CPU))

    return segment


def cached_validation(variant: Variant, num_base: int, num_novel: int) -> Callable:
    """Prediction and confusion matrix of one validation image; ours from cached features."""
    net = network(variant, num_base, num_novel).eval()
    num_labels, size = num_base + num_novel + 1, variant.size
    images, mask = on_device(random_batch(1, num_labels, size, CPU), CPU)
    height = round(0.75 * size)  # what a photograph of 500x375 takes
    mask = mask[0, :height]
    if variant.plain:

        @torch.no_grad()
        def validate():
            prediction = reference.upsample(net(images), (size, size)).argmax(dim=1)[0, :height]
            return reference.confusion_matrix(mask.numpy(), prediction.numpy(), num_labels)

        return validate
    with torch.no_grad(), autocast(CPU, variant.dtype):
        maps = {name: values.half() for name, values in net.maps(to_device(images, CPU)).items()}
    item = {
        'maps': maps, 'mask': mask.byte()[None], 'shape': [mask.shape], 'canvas': [(size, size)], 'id': [''],
        'skipped': [],
    }  # fmt: skip
    return lambda: evaluate(net, [item], CPU, variant.dtype)


def confusion(variant: Variant, num_labels: int) -> Callable:
    """Confusion matrix of one 500x500 image; the published code counts with bincount on the CPU."""
    generator = torch.Generator().manual_seed(0)
    truth, prediction = torch.randint(0, num_labels, (2, 500, 500), generator=generator)
    truth[:20] = 255
    if variant.plain:
        return lambda: reference.confusion_matrix(truth.numpy(), prediction.numpy(), num_labels)
    return lambda: confusion_matrix(truth.byte(), prediction, num_labels)


PATHS = {
    'stage1_step': (stage_1_step, ('Kb=15', 'Kb=60')),
    'stage2_step': (stage_2_step, ('15+5', '60+20')),
    'kept_step': (functools.partial(stage_2_step, views_are_kept=True), ('15+5', '60+20')),
    'inference': (inference, ('15+5', '60+20')),
    'cached_validation': (cached_validation, ('15+5', '60+20')),
    'confusion_matrix': (confusion, ('81',)),
}
