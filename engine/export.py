"""Networks as files that are used without this code: ONNX, and programs of torch.export.

Dimensions: B batch, K logits, H x W size of the exported network, h x w size of a photograph that is fitted into it.
"""

import copy
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.errors import InputError
from dataset import transforms
from dataset.legend import Legend
from engine.checkpoint import Checkpoint
from engine.evaluation import visible_logits
from model import PSP, Network, build_backbone
from model.kernels import fuse
from model.reference import upsample

BATCH_SIZES = {'image': {0: torch.export.Dim('batch', min=1)}}
Run = Callable[[np.ndarray], np.ndarray]  # an exported network: images [B, 3, H, W] to its output
OPTIONAL = ('onnx', 'onnxscript', 'onnxruntime')  # requirements-export.txt
METADATA = 'metadata.json'  # extra file of programs of torch.export
BATCH = 4  # of the check, after a batch of one
# relative to the largest logit; float32 sums in another order give less than a tenth of it
TOLERANCE = 1e-4


class InferenceNetwork(nn.Module):
    """A network for inference alone: batch normalisations are folded, normalisation and upsampling are inside.

    It consists of PyTorch's own operations, without the kernels of `build_model`.

    Args:
        net: with its final weights, on the CPU.
        config: of its checkpoint.
        size: (H, W) of images and outputs.
        labels: it returns labels; otherwise logits.

    Raises:
        InputError: the network needs to know what is padding.
    """

    def __init__(self, net: Network, config: dict, size: tuple[int, int], labels: bool) -> None:
        super().__init__()
        if not net.POSITIONWISE:
            raise InputError(
                f'{net.title} cannot be exported: it classifies with what the whole photograph shows, and a network '
                'of one size sees its padding too. Use utils.predict.'
            )
        plain = copy.deepcopy(net)
        plain.backbone = build_backbone(config['backbone'], config['os'])
        plain.decoder = PSP(plain.backbone.out_channels)
        plain.load_state_dict(net.state_dict())
        # fused weights are channels-last, which the formats of files do not know
        self.net = fuse(plain).to(memory_format=torch.contiguous_format)
        self.constants = self.net.constants()
        self.size, self.labels = size, labels
        self.mean, self.std = (
            torch.tensor(values)[:, None, None] for values in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            image: RGB [B, 3, H, W], uint8, or float32 in 0..1.

        Returns:
            Labels uint8 [B, H, W], or logits float32 [B, K, H, W]: background, base classes, novel classes.
        """
        values = image.float() / 255 if image.dtype == torch.uint8 else image
        logits = full_logits(self.net, (values - self.mean) / self.std, self.constants, self.size)
        return logits.argmax(dim=1).to(torch.uint8) if self.labels else logits

    def program(self, dtype: torch.dtype) -> torch.export.ExportedProgram:
        """Trace the network for images of a type, with any batch size."""
        example = torch.zeros(2, 3, *self.size, dtype=dtype)  # a batch of one would be taken for the only size
        with torch.no_grad():
            self(example)  # makes the decoder's constant matrices, so that they are constants of the trace
            program = torch.export.export(self, (example,), dynamic_shapes=BATCH_SIZES, strict=False)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if hasattr(module, 'graph') else ():
                node.meta.pop('stack_trace', None)  # lines of code with the paths of this machine
        return program


def full_logits(net: Network, images: torch.Tensor, constants, size: tuple[int, int]) -> torch.Tensor:
    """Logits [B, K, H, W] of normalised images [B, 3, H, W], as an evaluation makes them, with `net.constants()`."""
    maps = net.finish_maps(net.maps(images))
    return upsample(visible_logits(net, maps, constants, size, size), size)


def describe(checkpoint: Checkpoint, legend: Legend, size: tuple[int, int]) -> dict:
    """Metadata of an exported network, in types that JSON can hold.

    Returns:
        'names', 'class_ids' and 'colors' (RGB) of the labels; 'novel_labels'; 'size' (H, W); 'dataset', 'checkpoint'.
    """
    return {
        'names': list(legend.names),
        'class_ids': list(legend.class_ids),
        'colors': legend.colors[: len(legend.names)].tolist(),
        'novel_labels': list(legend.novel_labels),
        'size': list(size),
        'dataset': checkpoint.config['dataset'],
        'checkpoint': Path(checkpoint.path).name,
    }


def check_onnx():
    """Raise InputError where a package is missing or broken that ONNX needs."""
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f'--format onnx needs {name} ({error}): pip install -r requirements-export.txt') from error


def to_onnx(network: InferenceNetwork, dtype: torch.dtype, metadata: dict) -> tuple[bytes, Run]:
    """Convert a network to ONNX.

    Args:
        network: what is exported.
        dtype: of its images, uint8 or float32.
        metadata: of `describe`; entries of the file's `metadata_props`, each as JSON.

    Returns:
        Content of a file with input 'image' and output 'labels' or 'logits'; the same in onnxruntime on the CPU.
    """
    import onnxruntime

    output = 'labels' if network.labels else 'logits'
    exported = torch.onnx.export(
        network.program(dtype), dynamo=True, verbose=False, input_names=['image'], output_names=[output],
        dynamic_shapes=BATCH_SIZES,
    )  # fmt: skip
    for key, value in metadata.items():
        exported.model.metadata_props[key] = json.dumps(value)
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    return content, lambda images: session.run(None, {'image': images})[0]


def to_torch(network: InferenceNetwork, dtype: torch.dtype, metadata: dict) -> tuple[bytes, Run]:
    """Convert a network to a program of torch.export; as `to_onnx`, with the metadata as JSON in an extra file."""
    file = io.BytesIO()
    torch.export.save(network.program(dtype), file, extra_files={METADATA: json.dumps(metadata)})
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda images: loaded(torch.from_numpy(images)).detach().numpy()


FORMATS = {'onnx': to_onnx, 'torch': to_torch}
SUFFIXES = {'onnx': '.onnx', 'torch': '.pt2'}
ENGINES = {'onnx': 'onnxruntime', 'torch': 'torch.export'}
TYPES = {'uint8': torch.uint8, 'float': torch.float32}


def canvas(image: np.ndarray, size: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
    """A photograph as an exported network takes it: resized to fit, padded right and bottom with the mean colour.

    Args:
        image: RGB uint8 [h, w, 3].
        size: (H, W).
        dtype: uint8, where the mean colour is rounded, or float32.

    Returns:
        RGB [3, H, W], uint8 or float32 in 0..1.
    """
    small, _ = transforms.resize_to_fit(image, image[:, :, 0], size)
    pixels = np.empty((*size, 3), np.float32)
    pixels[:] = transforms.IMAGENET_MEAN
    pixels[: small.shape[0], : small.shape[1]] = small / np.float32(255)
    if dtype == torch.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    return pixels.transpose(2, 0, 1)


@dataclass
class Agreement:
    """How an exported network agrees with PyTorch's.

    Attributes:
        images, pixels: compared.
        differing: pixels with another label.
        difference: the largest one of logits; where the exported network returns labels, of PyTorch's logits of two
            labels that differ.
        scale: PyTorch's largest logit of a class.
    """

    images: int = 0
    pixels: int = 0
    differing: int = 0
    difference: float = 0
    scale: float = 0

    @property
    def holds(self) -> bool:
        """Whether logits differ by rounding only, and labels only where two logits are equal up to rounding."""
        return self.difference <= TOLERANCE * self.scale

    def add(self, expected: torch.Tensor, output: torch.Tensor):
        """Compare PyTorch's logits [B, K, H, W] with labels [B, H, W] or logits [B, K, H, W]."""
        labels = output.long() if output.dim() == 3 else output.argmax(dim=1)
        best, ours = expected.max(dim=1)
        self.scale = max(self.scale, float(expected[:, 1:].abs().max()))
        gap = best - expected.gather(1, labels[:, None])[:, 0]  # 0 where the label is ours, or as good
        largest = gap.max()
        if output.dim() == 4:
            # a background that is never predicted has a huge logit, and so are its roundings
            share = self.scale / expected.abs().clamp_min(self.scale)
            largest = torch.maximum(largest / 2, ((expected - output).abs() * share).max())
        self.images += len(labels)
        self.pixels += labels.numel()
        self.differing += int((labels != ours).sum())
        self.difference = max(self.difference, float(largest.nan_to_num(torch.inf)))

    def __str__(self) -> str:
        ties = ', all ties' if self.differing and self.holds else ''
        labels = f'labels differ at {self.differing:,} of {self.pixels:,} pixels{ties}'
        return f'{labels}; largest difference {self.difference:.1e} (logits reach {self.scale:.1f})'


@torch.no_grad()
def compare(
    run: Run, net: Network, images: Iterable[np.ndarray], size: tuple[int, int], dtype: torch.dtype
) -> Agreement:
    """Segment photographs with an exported network and with the network that it was made from.

    Args:
        run: the exported network.
        net: as trained, neither folded nor with its normalisation inside.
        images: RGB uint8 [h, w, 3] each.
        size, dtype: of the exported network's images.
    """
    constants = net.eval().constants()
    agreement = Agreement()
    for pixels in _batches(canvas(image, size, dtype) for image in images):
        values = pixels.astype(np.float32) / 255 if dtype == torch.uint8 else pixels
        normalised = (values.transpose(0, 2, 3, 1) - transforms.IMAGENET_MEAN) / transforms.IMAGENET_STD
        expected = full_logits(net, torch.from_numpy(normalised).permute(0, 3, 1, 2), constants, size)
        agreement.add(expected, torch.from_numpy(run(pixels)))
    return agreement


def _batches(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stack images: the first alone, then `BATCH` at a time, since an exported network takes batches of any size."""
    images = iter(images)
    for count in chain((1,), repeat(BATCH)):
        batch = list(islice(images, count))
        if not batch:
            return
        yield np.stack(batch)
