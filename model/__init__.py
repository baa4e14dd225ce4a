"""The POP network: backbone, PSP decoder and orthogonal prototype head."""

from model.backbones import BACKBONES, build_backbone
from model.pop import POP, Head
from model.psp import PSP

MODELS = ('pspnet_pop',)


def build_model(backbone, num_base, num_novel=0, output_stride=8):
    """Build a POP segmenter with freshly initialised weights.

    Args:
        backbone (str): a name from `BACKBONES`.
        num_base (int): Kb, number of base classes (background not counted), >= 1.
        num_novel (int): Kn, number of novel classes; 0 builds the stage-1 network.
        output_stride (int): 8, 16 or 32.

    Returns:
        POP: maps images [B, 3, H, W] to logits [B, 1 + Kb + Kn, h, w].

    Raises:
        ValueError: unknown backbone, output stride or class count.
    """
    network = build_backbone(backbone, output_stride)
    return POP(network, PSP(network.out_channels), num_base, num_novel)


__all__ = ['BACKBONES', 'MODELS', 'POP', 'PSP', 'Head', 'build_backbone', 'build_model']
