"""The networks: backbone, PSP decoder, and the head of a method."""

from collections.abc import Mapping

from model import kernels
from model.backbones import BACKBONES, build_backbone, find_backbone
from model.capl import CAPL
from model.finetuning import FineTuned
from model.joint import JointPOP
from model.lda import LDA
from model.network import Head, Network
from model.pop import POP
from model.psp import PSP

MODELS = {
    'pspnet_pop': POP,
    'pspnet_joint': JointPOP,
    'pspnet_lda': LDA,
    'pspnet_ft': FineTuned,
    'pspnet_capl': CAPL,
}


def base_model(model: str) -> str:
    """The row of `MODELS` whose networks of stage 1 a method starts from: its own, or `Network.BASE_MODEL`."""
    return MODELS[model].BASE_MODEL or model


def build_model(
    backbone: str,
    num_base: int,
    num_novel: int = 0,
    output_stride: int = 8,
    model: str = 'pspnet_pop',
    options: Mapping[str, str] | None = None,
) -> Network:
    """Build a segmenter with freshly initialised weights.

    Args:
        backbone: one of `BACKBONES`.
        num_base: Kb, number of base classes (background not counted), >= 1.
        num_novel: Kn, number of novel classes; 0 builds the stage-1 network.
        output_stride: 8, 16 or 32.
        model: one of `MODELS`.
        options: of the method, where it has any (`Network.OPTIONS`).

    Returns:
        Maps images [B, 3, H, W] to logits [B, 1 + Kb + Kn, h, w].

    Raises:
        ValueError: unknown model, option, backbone, output stride or class count.
    """
    if model not in MODELS:
        raise ValueError(f'model {model!r} not supported; choose one of {", ".join(MODELS)}')
    features = build_backbone(backbone, output_stride)
    method = MODELS[model]
    net = method(features, PSP(features.out_channels), num_base, num_novel, **method.choose(options))
    kernels.accelerate(net)
    return net


__all__ = [
    'BACKBONES',
    'MODELS',
    'POP',
    'PSP',
    'Head',
    'JointPOP',
    'Network',
    'base_model',
    'build_backbone',
    'build_model',
    'find_backbone',
]
