"""The POP network: backbone, PSP decoder and orthogonal prototype head."""

from model import kernels
from model.backbones import BACKBONES, build_backbone
from model.pop import POP, Head
from model.psp import PSP

MODELS = ('pspnet_pop',)


def build_model(backbone: str, num_base: int, num_novel: int = 0, output_stride: int = 8) -> POP:
    """Build a POP segmenter with freshly initialised weights.

    Args:
        backbone: one of `BACKBONES`.
        num_base: Kb, number of base classes (background not counted), >= 1.
        num_novel: Kn, number of novel classes; 0 builds the stage-1 network.
        output_stride: 8, 16 or 32.

    Returns:
        Maps images [B, 3, H, W] to logits [B, 1 + Kb + Kn, h, w].

    Raises:
        ValueError: unknown backbone, output stride or class count.
    """
    features = build_backbone(backbone, output_stride)
    net = POP(features, PSP(features.out_channels), num_base, num_novel)
    kernels.accelerate(net)
    return net


__all__ = ['BACKBONES', 'MODELS', 'POP', 'PSP', 'Head', 'build_backbone', 'build_model']
